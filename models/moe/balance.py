"""Load balancing of experts: statistics of a router's decisions, and the losses that keep the experts' loads even.

Shapes: L MoE layers, B sequences, T tokens of each, S = B * T tokens, E experts, k experts per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs import ModelConfig

from .router import Heard, choosers


class RouterStats(NamedTuple):
    """Of one forward pass over S tokens and L MoE layers; padding counts.

    Attributes:
        aux_loss: scalar, differentiable, mean over layers of E * sum_e f_e * P_e, where f_e is the share of the S * k
            assignments that went to expert e and P_e its mean normalised score (Switch Transformers, arXiv:2101.03961,
            eq. 4). 1 under perfect balance for any k. With `model.aux_loss_over=sequence` the mean over sequences of
            each one's own (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20); with `global_batch` f_e is that of the whole
            step before (arXiv:2501.11873, whose f_e of the step itself is not known until its last micro-batch).
        z_loss: scalar, differentiable, mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906,
            eq. 5).
        load: [L, E] fp32, f_e of each layer.
        entropy, confidence, dropped: [L] fp32, see `Heard`.
    """

    aux_loss: Tensor
    z_loss: Tensor
    load: Tensor
    entropy: Tensor
    confidence: Tensor
    dropped: Tensor

    def by_layer(self) -> Tensor:
        """[L, E + 3]: load, entropy, confidence and dropped of each layer."""
        return torch.cat([self.load, torch.stack([self.entropy, self.confidence, self.dropped], dim=1)], dim=1)


class RouterTap:
    """Collects what the routers of `module` decide.

    Only calls within the module's own forward pass count: activation checkpointing calls the routers a second time in
    the backward pass.

    Args:
        mean_over_parts: differentiable mean over the equally large parts of a micro-batch's sequences, where the module
            is given one of them.
    """

    def __init__(
        self, module: nn.Module, config: ModelConfig, mean_over_parts: Callable[[Tensor], Tensor] | None = None
    ):
        self._config, self._mean_over_parts = config, mean_over_parts
        self.choosers = list(choosers(module))
        module.register_forward_pre_hook(self._open)
        module.register_forward_hook(self._close)

    def collect(self) -> RouterStats | None:
        """Losses and loads of the last forward pass, which are then cleared; None if no router was called."""
        global_loads = [chooser.global_load for chooser in self.choosers]
        layers = self._heard()
        return router_stats(layers, global_loads, self._mean_over_parts) if layers else None

    def choices(self) -> list[Tensor]:
        """[S, k] of each layer in the last forward pass, which are then cleared."""
        return [layer.choice for layer in self._heard()]

    def _heard(self) -> list[Heard]:
        layers = [chooser.heard for chooser in self.choosers if chooser.heard]
        for chooser in self.choosers:
            chooser.heard = None
        return layers

    def _open(self, module: nn.Module, args: object) -> None:
        for chooser in self.choosers:
            chooser.listening, chooser.heard = True, None

    def _close(self, module: nn.Module, args: object, output: object) -> None:
        for chooser in self.choosers:
            chooser.listening = False


def router_stats(
    layers: list[Heard],
    global_loads: list[Tensor | None],
    mean_over_parts: Callable[[Tensor], Tensor] | None = None,
) -> RouterStats:
    """Balancing losses and loads of L layers; see `RouterStats` and, for `mean_over_parts`, `RouterTap`."""
    prob_LGE = torch.stack([layer.prob for layer in layers])
    load_LGE = torch.stack([layer.load for layer in layers])
    rest_L4 = torch.stack(
        [torch.stack([layer.square, layer.entropy, layer.confidence, layer.dropped]) for layer in layers]
    )
    if mean_over_parts is not None:
        sizes = [prob_LGE[0].numel(), load_LGE[0].numel(), 4]
        flat = torch.cat([prob_LGE.flatten(1), load_LGE.flatten(1), rest_L4], dim=1)
        prob, load, rest_L4 = mean_over_parts(flat).split(sizes, dim=1)
        prob_LGE, load_LGE = prob.view_as(prob_LGE), load.view_as(load_LGE).detach()
    target_LGE = load_LGE
    if global_loads and global_loads[0] is not None:
        target_LGE = torch.stack([load for load in global_loads if load is not None])[:, None].to(load_LGE.device)
    experts = load_LGE.shape[-1]
    entropy_L, confidence_L, dropped_L = rest_L4[:, 1:].detach().unbind(1)
    return RouterStats(
        aux_loss=experts * (target_LGE * prob_LGE).sum(-1).mean(),
        z_loss=rest_L4[:, 0].mean(),
        load=load_LGE.mean(1),
        entropy=entropy_L,
        confidence=confidence_L,
        dropped=dropped_L,
    )
