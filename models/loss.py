"""Cross-entropy of the language-model head that never materialises the logits of a whole batch.

Shapes: S tokens, H hidden size, V vocabulary, C tokens of one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.compiler import compiled

IGNORE = -100
"""Label of tokens that are not trained on."""


class LossOutput(NamedTuple):
    """Sum of the token cross-entropies in nats (scalar fp32), and the number of labels in it (scalar int64)."""

    loss_sum: Tensor
    tokens: Tensor


def chunked_cross_entropy(hidden_SH: Tensor, weight_VH: Tensor, labels_S: Tensor, chunk: int) -> LossOutput:
    """Sum of -log softmax(hidden @ weight.T)[label] over labels that are not -100.

    Gradients of hidden and weight are made chunk by chunk in the forward pass, while the chunk's logits are in memory
    (Liger kernel, arXiv:2410.10989, section 3.2).

    Args:
        chunk: tokens whose logits are in memory at once.
    """
    with_grad = torch.is_grad_enabled() and (hidden_SH.requires_grad or weight_VH.requires_grad)
    loss = _ChunkedCrossEntropy.apply(hidden_SH, weight_VH, labels_S, chunk, with_grad)
    return LossOutput(loss, (labels_S != IGNORE).sum())


def nan_if_infinite(loss: Tensor) -> Tensor:
    """An infinite loss can have finite gradients; set to NaN, they fail the engine's norm check."""
    return loss * (loss.detach() * 0 + 1)


CPU_ROWS = 64
"""Rows of logits per block on CPU: they stay in its cache."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, with_grad: bool) -> Tensor:
        chunk = min(chunk, len(labels))
        rows = CPU_ROWS if hidden.device.type == "cpu" else chunk
        logits_CV = hidden.new_empty(chunk, len(weight))
        d_hidden = torch.empty_like(hidden) if with_grad else hidden
        d_weight, losses = None, []
        for h, dh, target in zip(hidden.split(chunk), d_hidden.split(chunk), labels.split(chunk), strict=True):
            logits = torch.mm(h, weight.t(), out=logits_CV[: len(h)])
            for part, labels_R in zip(logits.split(rows), target.split(rows), strict=True):
                losses.append((_in_two_passes() if part.is_cuda else _loss_and_gradient)(part, labels_R, with_grad))
            if with_grad:
                torch.mm(logits, weight, out=dh)
                part = logits.t() @ h
                # Many chunks are accumulated in fp32; a single one needs no wider sum than the product's own.
                d_weight = part if d_weight is None else d_weight.float().add_(part)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(ctx.dtype), None, None, None


def _loss_and_gradient(logits_RV: Tensor, labels_R: Tensor, with_grad: bool) -> Tensor:
    """Summed cross-entropy of some rows, whose logits are overwritten by their gradient."""
    trained = labels_R != IGNORE
    index = labels_R.clamp(min=0)[:, None]
    logits32 = logits_RV.float()
    target = logits32.gather(1, index)
    largest = logits32.amax(-1, keepdim=True)
    p = torch.softmax(logits32, -1, out=logits32 if with_grad else None)
    # logsumexp from a probability that cannot underflow: that of the largest logit, at least 1 / V.
    loss = ((largest - p.amax(-1, keepdim=True).log_() - target)[:, 0] * trained).sum()
    if with_grad:
        p.scatter_add_(1, index, p.new_full(index.shape, -1.0)).mul_(trained[:, None])
        if p is not logits_RV:
            logits_RV.copy_(p)
    return loss


@functools.cache
def _in_two_passes() -> Callable[[Tensor, Tensor, bool], Tensor]:
    """`_loss_and_gradient` for GPUs, where separate operations would be ten passes over the logits in fp32."""
    return compiled(_one_formula, dynamic=False)


def _one_formula(logits_RV: Tensor, labels_R: Tensor, with_grad: bool) -> Tensor:
    trained, index = labels_R != IGNORE, labels_R.clamp(min=0)[:, None]
    logits32 = logits_RV.float()
    logsumexp_R1 = logits32.logsumexp(-1, keepdim=True)
    loss = ((logsumexp_R1 - logits32.gather(1, index))[:, 0] * trained).sum()
    if with_grad:
        is_label = torch.arange(logits_RV.shape[1], device=logits_RV.device) == index
        logits_RV.copy_(((logits32 - logsumexp_R1).exp() - is_label.float()) * trained[:, None])
    return loss
