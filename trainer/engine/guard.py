"""What DeepSpeed lacks at ZeRO-0: clipping by the global norm, and skipping steps whose norm is not finite."""

from typing import Any

import torch
from torch import Tensor

from .precision import WorkingCopies


class Guarded:
    """Mixin over a torch optimizer for ZeRO-0: clip by the global norm, and skip steps whose norm is not finite.

    DeepSpeed does both inside its ZeRO and bf16 optimizers, and neither for a plain optimizer in fp32, where a single
    NaN gradient would ruin the weights.
    """

    param_groups: list[dict[str, Any]]
    max_norm = 0.0
    norm: Tensor
    """Gradient norm of the last step, before clipping."""
    not_finite: Tensor
    """1 if that norm is not finite, so that the step was skipped; else 0."""
    copies: WorkingCopies | None = None
    """Copies of the parameters, refreshed after every step."""
    found_inf: Tensor | None = None
    """1 if the norm is not finite. Optimizers that support torch.amp.GradScaler read it, on the device, to decide
    whether to leave weights and states unchanged."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        self.not_finite = (~self.norm.isfinite()).float()
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, self.norm, foreach=True)
        if getattr(self, "_step_supports_amp_scaling", False):
            self.found_inf = self.not_finite
        elif self.not_finite.item():  # adagrad, rmsprop, adafactor: the host waits for the norm
            return
        super().step(closure)  # type: ignore[misc]
        if self.copies:
            self.copies.refresh()


def guard(optimizer: Any, max_norm: float, copies: WorkingCopies | None = None) -> None:
    """Make an optimizer clip by the global norm (0: never), skip steps whose norm is not finite, refresh `copies`."""
    optimizer.__class__ = type(f"Guarded{type(optimizer).__name__}", (Guarded, type(optimizer)), {})
    optimizer.max_norm, optimizer.copies = max_norm, copies
