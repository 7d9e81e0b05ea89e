"""Load balancing of experts from outside the model: losses and load metrics from hooks on every router.

Hooks on the `gate` linears see the logits in a plain model and in one whose MoE blocks the engine replaced.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs import ModelConfig


class RouterStats(NamedTuple):
    """Of one forward pass over S tokens and L MoE layers; padding counts.

    Attributes:
        aux_loss: scalar, differentiable, mean over layers of E * sum_e f_e * P_e, where f_e is the share of the S * k
            assignments that went to expert e and P_e its mean probability (Switch Transformers, arXiv:2101.03961,
            eq. 4). 1 under perfect balance for any k.
        z_loss: scalar, differentiable, mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906,
            eq. 5).
        load: [L, E] fp32, f_e of each layer.
        max_violation: [L] fp32, E * max_e f_e - 1 (arXiv:2408.15664, eq. 4): 0 under perfect balance.
    """

    aux_loss: Tensor
    z_loss: Tensor
    load: Tensor
    max_violation: Tensor


class RouterTap:
    """Listens to the routers of `module`.

    Only calls within the module's own forward pass count: activation checkpointing calls the routers again in the
    backward pass.

    Args:
        mean_over_parts: where the module is given parts of sequences; see `router_stats`.
    """

    def __init__(
        self, module: nn.Module, config: ModelConfig, mean_over_parts: Callable[[Tensor], Tensor] | None = None
    ):
        self._top_k, self._mean_over_parts = config.top_k, mean_over_parts
        self._gates = [part for name, part in module.named_modules() if name.endswith(".gate")]
        self._listening = False
        module.register_forward_pre_hook(self._open)
        module.register_forward_hook(self._close)
        for gate in self._gates:
            gate.register_forward_hook(self._hear)

    def collect(self) -> RouterStats | None:
        """Losses and loads of the last forward pass, which is then forgotten; None if no router was called."""
        heard = [gate.__dict__.pop(_HEARD) for gate in self._gates if _HEARD in gate.__dict__]
        if not heard:
            return None
        logits_LSE = torch.stack([logits.flatten(0, -2).float() for logits in heard])
        return router_stats(logits_LSE, self._top_k, self._mean_over_parts)

    def _open(self, module: nn.Module, args: object) -> None:
        for gate in self._gates:
            gate.__dict__.pop(_HEARD, None)
        self._listening = True

    def _close(self, module: nn.Module, args: object, output: object) -> None:
        self._listening = False

    def _hear(self, gate: nn.Module, args: object, output: Tensor) -> None:
        # Kept on the gate itself: torch.compile would make a variant per layer of a hook that knew its layer.
        if self._listening:
            setattr(gate, _HEARD, output)


_HEARD = "heard_logits"


def router_stats(
    logits_LSE: Tensor, top_k: int, mean_over_parts: Callable[[Tensor], Tensor] | None = None
) -> RouterStats:
    """Balancing losses and loads from the router logits of L layers; see `RouterStats`.

    Args:
        mean_over_parts: differentiable mean over the equally large parts of a micro-batch that the S tokens are one of.
    """
    layers, tokens, experts = logits_LSE.shape
    logsumexp_LS = logits_LSE.logsumexp(-1)
    mean_prob_LE = (logits_LSE - logsumexp_LS[..., None]).exp().mean(1)
    square_L = logsumexp_LS.square().mean(1)
    with torch.no_grad():
        choice_LA = logits_LSE.topk(top_k, dim=-1).indices.view(layers, -1)
        count_LE = torch.zeros(layers, experts, device=logits_LSE.device)
        count_LE.scatter_add_(1, choice_LA, torch.ones_like(choice_LA, dtype=count_LE.dtype))
        load_LE = count_LE / (tokens * top_k)
    if mean_over_parts is not None:
        means = mean_over_parts(torch.cat((mean_prob_LE, square_L[:, None], load_LE), dim=1))
        mean_prob_LE, square_L, load_LE = means[:, :experts], means[:, experts], means[:, experts + 1 :].detach()
    return RouterStats(
        aux_loss=experts * (load_LE * mean_prob_LE).sum(-1).mean(),
        z_loss=square_L.mean(),
        load=load_LE,
        max_violation=experts * load_LE.amax(-1) - 1,
    )
