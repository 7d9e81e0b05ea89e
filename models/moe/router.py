"""Routers: which experts a token goes to and with what weights, the same in a plain model and under expert parallelism.

Shapes: B sequences, T tokens of each, S = B * T tokens, H hidden size, E experts, k experts per token.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import ModelConfig
from models.decoder.layers import hashed, jitter, salt

from .experts import Routing


class Router(nn.Linear):
    """Logits of every expert, in fp32 whatever the precision: top-k choices depend on small differences."""

    def forward(self, x_SH: Tensor) -> Tensor:
        if x_SH.dtype == torch.bfloat16 and (x_SH.is_cuda or self.weight.dtype == torch.bfloat16):
            return _Logits.apply(x_SH, self.weight)
        return F.linear(x_SH.float(), self.weight.float())


class _Logits(torch.autograd.Function):
    """The same for bf16 tokens: no fp32 copy of them is kept, and gradients are bf16 products of the upper and lower
    half of the fp32 gradient, 16 bits of it in total.

    On a GPU the logits are computed likewise: fp32 weights are three bf16 numbers each, whose products with bf16 tokens
    are exact, and which are added up in fp32, at many times the rate of fp32 products.
    """

    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_SH, weight_EH)
        if x_SH.is_cuda:
            parts = bf16_parts(weight_EH, 3)
            return _product(x_SH, torch.cat(parts).t()).unflatten(1, (len(parts), -1)).sum(1)
        weight_HE = weight_EH.float().t()
        # On a CPU one piece at a time, which stays in the cache.
        return torch.cat([x.float() @ weight_HE for x in x_SH.split(_CACHED)])

    @staticmethod
    def backward(ctx: Any, dlogits_SE: Tensor) -> tuple[Tensor, Tensor]:
        x_SH, weight_EH = ctx.saved_tensors
        upper_SE, lower_SE = bf16_parts(dlogits_SE, 2)
        parts = bf16_parts(weight_EH, 2)
        d_SxE, weight_xEH = [upper_SE, lower_SE], [parts[0], parts[0]]
        if len(parts) > 1:
            d_SxE, weight_xEH = [*d_SxE, upper_SE], [*weight_xEH, parts[1]]
        dx_SH = torch.cat(d_SxE, dim=1) @ torch.cat(weight_xEH)
        both_2ES = torch.cat([upper_SE, lower_SE], dim=1).t()
        upper_EH, lower_EH = (_product(both_2ES, x_SH) if x_SH.is_cuda else both_2ES @ x_SH).chunk(2)
        return dx_SH, (upper_EH + lower_EH).to(weight_EH.dtype)


def bf16_parts(x: Tensor, most: int) -> list[Tensor]:
    """bf16 tensors whose sum is x, to 8 bits for each of them: one if x is bf16, three hold all of an fp32 number."""
    if x.dtype == torch.bfloat16:
        return [x]
    parts = []
    for _ in range(most):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]
    return parts


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Product of bf16 matrices on a GPU, in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]


_CACHED = 512
"""Number of tokens whose fp32 copy stays in the cache."""


class Heard(NamedTuple):
    """Statistics of one layer's router, as means over tokens, so that they can be averaged over parts of a batch.

    Attributes:
        prob: [G, E] fp32, differentiable: mean score of each expert, scores of a token normalised to sum to 1. G is B
            where the loss balances each sequence, else 1.
        load: [G, E] fp32: each expert's share of the S * k assignments, dropped ones included.
        square: scalar, differentiable: mean of logsumexp(logits)^2.
        entropy: scalar: mean over tokens of the entropy of the normalised scores, in nats.
        confidence: scalar: mean over tokens of the largest normalised score.
        dropped: scalar: share of the assignments dropped for capacity.
        choice: [S, k] int64, the experts themselves.
    """

    prob: Tensor
    load: Tensor
    square: Tensor
    entropy: Tensor
    confidence: Tensor
    dropped: Tensor
    choice: Tensor


def heard(
    config: ModelConfig,
    sequences: int,
    logits_SE: Tensor | None,
    scores_SE: Tensor | None,
    choice_Sk: Tensor,
    kept_Sk: Tensor | None,
) -> Heard:
    """Summarise one router call; without logits (hash routing) the loss terms are those of perfect balance."""
    experts, device = config.num_experts, choice_Sk.device
    groups = sequences if config.aux_loss_over == "sequence" else 1
    zero = torch.zeros((), device=device)
    with torch.no_grad():
        choice_GA = choice_Sk.view(groups, -1)
        ones_GA = torch.ones(choice_GA.shape, device=device)
        load_GE = torch.zeros(groups, experts, device=device).scatter_add_(1, choice_GA, ones_GA) / choice_GA.shape[1]
        dropped = zero if kept_Sk is None else 1 - kept_Sk.float().mean()
    if logits_SE is None or scores_SE is None:
        even = torch.full((groups, experts), 1 / experts, device=device)
        return Heard(even, load_GE, zero, zero, zero, dropped, choice_Sk)
    logsumexp_S = logits_SE.logsumexp(-1)
    prob_SE = scores_SE if config.router == "softmax" else scores_SE / scores_SE.sum(-1, keepdim=True)
    with torch.no_grad():
        if config.router == "softmax":
            entropy = (logsumexp_S - torch.linalg.vecdot(prob_SE, logits_SE)).mean()  # needs fewer logarithms
        else:
            entropy = torch.special.entr(prob_SE).sum(-1).mean()
        confidence = prob_SE.amax(-1).mean()
    prob_GE = prob_SE.view(groups, -1, experts).mean(1)
    return Heard(prob_GE, load_GE, logsumexp_S.square().mean(), entropy, confidence, dropped, choice_Sk)


class Chooser:
    """Chooses the experts of one MoE layer, by `model.router` and what goes with it.

    Not a module: the engine may replace the MoE block and its gate by its own, which then use the same chooser.

    Args:
        layer: index, from 0.

    Attributes:
        bias: [E] fp32, added to the scores for the choice only (DeepSeek-V3); None without `model.router_bias_rate`.
        global_load: [E] fp32, each expert's share of the assignments of the step before, over the global batch.
        listening: whether the next call is recorded, see `models.moe.balance.RouterTap`; with gradients every call is.
        heard: the record of the last call.
    """

    def __init__(self, config: ModelConfig, layer: int):
        self.config, self.layer = config, layer
        experts = config.num_experts
        self.bias = None if config.router_bias_rate is None else torch.zeros(experts, device="cpu")
        even = torch.full((experts,), 1 / experts, device="cpu")
        self.global_load = even if config.aux_loss_over == "global_batch" else None
        self.listening = False
        self.heard: Heard | None = None
        self._salt = salt(layer)
        self._tokens_BT: Tensor | None = None
        self._keys_BT: Tensor | None = None
        self._training = False

    def prepare(self, tokens_BT: Tensor, keys_BT: Tensor | None, training: bool) -> None:
        """Set the inputs of the next call.

        Args:
            tokens_BT: ids.
            keys_BT: int64, from `dropout_keys`; None outside training.
        """
        self._tokens_BT, self._keys_BT, self._training = tokens_BT, keys_BT, training

    def __call__(self, gate: nn.Module | None, x_SH: Tensor) -> Routing:
        """Route the tokens passed to `prepare`; `gate` computes their logits (None with model.router=hash)."""
        config, tokens_BT = self.config, self._tokens_BT
        assert tokens_BT is not None
        logits_SE = scores_SE = None
        if config.router == "hash":
            choice_Sk = hash_choice(tokens_BT.flatten(), config.num_experts, config.top_k, self._salt)
            weight_Sk = torch.full(choice_Sk.shape, 1 / config.top_k, device=x_SH.device)
        else:
            assert gate is not None
            if config.router_jitter and self._keys_BT is not None:
                x_SH = jitter(x_SH, self._keys_BT.flatten(), config.router_jitter)
            logits_SE = gate(x_SH)
            scores_SE = logits_SE.softmax(-1) if config.router == "softmax" else logits_SE.sigmoid()
            choice_Sk = self._choice(scores_SE.detach())
            weight_Sk = scores_SE.gather(1, choice_Sk)
            if config.norm_topk_prob:
                weight_Sk = weight_Sk / (weight_Sk.sum(-1, keepdim=True) + 1e-20)
        weight_Sk = weight_Sk * config.router_scale
        kept_Sk = None
        if config.capacity_factor and self._training:
            kept_Sk = within_capacity(choice_Sk, config.num_experts, config.capacity(len(choice_Sk)))
            weight_Sk = weight_Sk * kept_Sk
        # Even if nobody reads it: a recomputed layer must save for backward the same tensors as before, and a compiler
        # drops what is not kept anywhere.
        if torch.is_grad_enabled() or self.listening:
            self.heard = heard(config, len(tokens_BT), logits_SE, scores_SE, choice_Sk, kept_Sk)
        return Routing(choice_Sk, weight_Sk, kept_Sk)

    def _choice(self, scores_SE: Tensor) -> Tensor:
        config = self.config
        if self.bias is not None:
            self.bias = self.bias.to(scores_SE.device)
            scores_SE = scores_SE + self.bias
        if config.top_groups < config.expert_groups:
            best = 1 if config.router == "softmax" else 2
            groups_SGe = scores_SE.unflatten(1, (config.expert_groups, -1))
            used_Sg = groups_SGe.topk(best, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
            unused_SG = torch.ones_like(groups_SGe[..., 0], dtype=torch.bool).scatter_(1, used_Sg, False)
            scores_SE = groups_SGe.masked_fill(unused_SG[..., None], -torch.inf).flatten(1)
        return scores_SE.topk(config.top_k, dim=-1).indices


def choosers(module: nn.Module) -> Iterator[Chooser]:
    """The choosers of every MoE layer of a module, in layer order."""
    for part in module.modules():
        if isinstance(chooser := getattr(part, "chooser", None), Chooser) and hasattr(part, "mlp"):
            yield chooser


def within_capacity(choice_Sk: Tensor, num_experts: int, limit: int) -> Tensor:
    """[S, k] bool: whether an assignment is among the first `limit` of its expert, in the order of tokens.

    That order is causal: which later tokens there are changes nothing for an earlier one.
    """
    expert_A = choice_Sk.flatten()
    order_A = expert_A.argsort(stable=True)
    counts_E = expert_A.new_zeros(num_experts).scatter_add_(0, expert_A, torch.ones_like(expert_A))
    first_E = counts_E.cumsum(0) - counts_E
    turn_A = torch.arange(len(expert_A), device=expert_A.device) - first_E[expert_A[order_A]]
    return torch.empty_like(expert_A, dtype=torch.bool).index_copy_(0, order_A, turn_A < limit).view_as(choice_Sk)


def hash_choice(tokens_S: Tensor, num_experts: int, top_k: int, salt: Tensor) -> Tensor:
    """[S, k] int64: the expert that (token id, salt) hashes to and its neighbours (Hash Layers, arXiv:2106.04426)."""
    first_S = hashed(tokens_S, salt) % num_experts
    return (first_S[:, None] + torch.arange(top_k, device=tokens_S.device)) % num_experts
