"""Cross-entropy of the language-model head that never holds the logits of a whole batch.

Shapes: S tokens, H hidden size, V vocabulary, C tokens of one chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


class LossOutput(NamedTuple):
    """Sum of the token cross-entropies in nats (scalar fp32), and how many labels it ran over (scalar int64)."""

    loss_sum: Tensor
    tokens: Tensor


def chunked_cross_entropy(hidden_SH: Tensor, weight_VH: Tensor, labels_S: Tensor, chunk: int) -> LossOutput:
    """Sum of -log softmax(hidden @ weight.T)[label] over labels that are not -100.

    Gradients of hidden and weight are made chunk by chunk in the forward pass, while the chunk's logits stand
    (Liger kernel, arXiv:2410.10989, section 3.2).

    Args:
        chunk: tokens whose logits stand in memory at once.
    """
    with_grad = torch.is_grad_enabled() and (hidden_SH.requires_grad or weight_VH.requires_grad)
    loss = _ChunkedCrossEntropy.apply(hidden_SH, weight_VH, labels_S, chunk, with_grad)
    return LossOutput(loss, (labels_S != IGNORE).sum())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, with_grad):
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_weight = (torch.empty_like(hidden), None) if with_grad else (None, None)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part], labels[part]
            logp = F.log_softmax(h @ weight.t(), dim=-1, dtype=torch.float32)
            trained = target != IGNORE
            index = target.clamp(min=0)[:, None]
            loss -= (logp.gather(1, index)[:, 0] * trained).sum()
            if not with_grad:
                continue
            d_logits = logp.exp_()
            d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0))
            d_logits = d_logits.mul_(trained[:, None]).to(h.dtype)
            torch.mm(d_logits, weight, out=d_hidden[part])
            d_part = d_logits.t() @ h
            if len(labels) <= chunk:
                d_weight = d_part
            else:  # fp32: bf16 would lose what many chunks add
                d_weight = d_part.float() if d_weight is None else d_weight.add_(d_part)
        if with_grad:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(ctx.dtype), None, None, None
