"""Neural ordinary differential equations, solved by torchdiffeq (arXiv:1806.07366).

An adaptive solver takes the same steps for all examples of a micro-batch, by the error over all of them: an example's
output depends, within the tolerance, on the others. A micro-batch is the same examples in every topology.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchdiffeq import odeint, odeint_adjoint

from configs.sections.families.ode import ADAPTIVE, NeuralOdeConfig
from models.batch import Measured

EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4}
"""Per step."""


class Dynamics(nn.Module):
    """dy/dt of a row [B, width]."""

    def __init__(self, config: NeuralOdeConfig):
        super().__init__()
        self.into, self.out = nn.Linear(config.width + 1, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.out(self.into(with_time(t, y)).tanh())


class ConvDynamics(nn.Module):
    """dy/dt of an image [B, width, H, W], as in the paper's network for MNIST, but smooth: at ReLU's kinks the adjoint
    equation would miss the gradient by a per cent."""

    def __init__(self, config: NeuralOdeConfig):
        super().__init__()
        self.norms = nn.ModuleList(norm(config.width) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(config.width + 1, config.width, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        for normed, conv in zip(self.norms, self.convs, strict=False):
            y = conv(with_time(t, F.silu(normed(y))))
        return self.norms[2](y)


def with_time(t: Tensor, y: Tensor) -> Tensor:
    """Time as one more column, or channel."""
    return torch.cat([y, t.to(y.dtype).expand(len(y), 1, *y.shape[2:])], 1)


def used_by(module: nn.Module) -> tuple[Tensor, ...]:
    """The weights that its layers compute with: in another precision these are not the parameters themselves."""
    parts = [(part, name) for part in module.modules() for name, _ in part.named_parameters(recurse=False)]
    return tuple(getattr(part, name) for part, name in parts)


def norm(width: int) -> nn.Module:
    return nn.GroupNorm(32 if width % 32 == 0 else 1, width)


class NeuralOde(nn.Module):
    """From [B, inputs], or images, to [B, outputs]: classes' logits, or numbers. Measures `evaluations`, how often the
    solver asked for the equation's right-hand side."""

    def __init__(self, config: NeuralOdeConfig):
        super().__init__()
        self.config, width = config, config.width
        if not config.channels:
            self.stem: nn.Module = nn.Linear(config.inputs, width)
            self.dynamics: nn.Module = Dynamics(config)
            self.head: nn.Module = nn.Linear(width, config.outputs)
            return
        halves = [(norm(width), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1)) for _ in range(config.downsample)]
        self.stem = nn.Sequential(
            nn.Conv2d(config.channels, width, 3, padding=1), *(part for half in halves for part in half)
        )
        self.dynamics = ConvDynamics(config)
        self.head = nn.Sequential(
            norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, config.outputs)
        )

    def forward(self, inputs: Tensor, keys: Tensor | None = None) -> Measured:
        """`keys`: of dropout, which there is none of."""
        own: torch.dtype = (self.stem[0] if self.config.channels else self.stem).weight.dtype  # type: ignore[index, assignment, union-attr]
        y = self.stem((inputs if self.config.channels else inputs.flatten(1)).to(own))
        calls = 0

        def change(t: Tensor, state: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.dynamics(t, state.to(own)).float()

        y = self._shapes(change, y.float()) if y.is_meta else self._solved(change, y.float())
        return Measured(self.head(y.to(own)), {"evaluations": torch.full((), float(calls), device=y.device)})

    def _solved(self, change: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
        """The state at time 1, fp32 whatever the weights are: errors of a step are smaller than bf16 can tell. NaN
        where the solver finds none."""
        config = self.config
        times = torch.linspace(0, 1, 2 if config.solver in ADAPTIVE else config.steps + 1, device=y.device)
        asked: dict[str, Any] = {"rtol": config.rtol, "atol": config.atol, "method": config.solver}
        try:
            if config.adjoint and torch.is_grad_enabled():
                return odeint_adjoint(change, y, times, adjoint_params=used_by(self.dynamics), **asked)[-1]
            return odeint(change, y, times, **asked)[-1]
        except AssertionError:  # no step is small enough, since something is not finite: the trainer skips such a step
            return change(times[-1], y) * torch.nan  # of all weights, so that all have a gradient to reduce

    def _shapes(self, change: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
        """What `_solved` computes, of shapes alone, which torchdiffeq cannot do without the times.

        Raises:
            RuntimeError: nobody knows how many steps the solver will take.
        """
        if self.config.solver in ADAPTIVE:
            raise RuntimeError(f"model.solver={self.config.solver} chooses its steps: see `evaluations` in the record")
        count = self.config.steps * EVALUATIONS[self.config.solver]

        def all_steps(y: Tensor) -> Tensor:
            for _ in range(count):
                y = y + change(y.new_zeros(()), y)
            return y

        if self.config.adjoint:  # whose equation backwards in time computes the dynamics again
            with torch.no_grad():
                all_steps(y)
        return all_steps(y)
