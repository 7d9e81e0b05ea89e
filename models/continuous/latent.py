"""Latent ordinary differential equations of series with irregular times (arXiv:1907.03907).

Shapes: B series, T times, V numbers of an observation, E size of the encoder's state, Z latents.

From one time to the next every series takes steps of its own length, so that it does not depend on the others.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from configs.sections.families.ode import LatentOdeConfig

from .ode import EVALUATIONS


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class LatentOde(nn.Module):
    """From observations to the values at their times, by an initial latent state at time 0."""

    def __init__(self, config: LatentOdeConfig):
        super().__init__()
        self.config, hidden = config, config.hidden
        self.backwards = two_layers(config.encoder_size, hidden, config.encoder_size)
        self.cell = nn.GRUCell(2 * config.inputs, config.encoder_size)
        self.posterior = nn.Linear(config.encoder_size, 2 * config.latents)
        self.forwards = two_layers(config.latents, hidden, config.latents)
        self.head = two_layers(config.latents, hidden, config.inputs)

    def forward(
        self, times_BT: Tensor, values_BTV: Tensor, given_BTV: Tensor, noise_BZ: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """([B, T, V] found, [B, Z] mean and logarithmic variance of the initial latent state), fp32.

        Args:
            given_BTV: bool, which values the encoder sees.
            noise_BZ: standard normal, makes the initial state a sample; None: it is the mean.
        """
        zero_B1 = torch.zeros_like(times_BT[:, :1])
        spans_TB = torch.cat([zero_B1, times_BT], 1).diff(dim=1).T
        mean_BZ, log_variance_BZ = self.posterior(self._encoded(spans_TB, values_BTV, given_BTV)).float().chunk(2, 1)
        z_BZ = mean_BZ if noise_BZ is None else mean_BZ + noise_BZ * (log_variance_BZ / 2).exp()
        found = []
        for span_B in spans_TB:
            z_BZ = self._moved(self.forwards, z_BZ, span_B)
            found.append(self.head(z_BZ.to(self._dtype)).float())
        return torch.stack(found, 1), mean_BZ, log_variance_BZ

    def _encoded(self, spans_TB: Tensor, values_BTV: Tensor, given_BTV: Tensor) -> Tensor:
        """[B, E] at time 0: an ODE-RNN from the last time to the first (section 3.2)."""
        own, last = self._dtype, values_BTV.shape[1] - 1
        e_BE = values_BTV.new_zeros(len(values_BTV), self.config.encoder_size)
        for place in range(last, -1, -1):
            given_BV = given_BTV[:, place]
            seen_B2V = torch.cat([values_BTV[:, place] * given_BV, given_BV.float()], 1)
            told_BE = self.cell(seen_B2V.to(own), e_BE.to(own)).float()
            e_BE = torch.where(given_BV.any(1, keepdim=True), told_BE, e_BE)
            e_BE = self._moved(self.backwards, e_BE, spans_TB[place])
        return e_BE.to(own)

    def _moved(self, change: nn.Module, y: Tensor, span_B: Tensor) -> Tensor:
        """The state after a time of its own for each series, fp32 as of `NeuralOde`."""
        config, own = self.config, self._dtype

        def scaled(_: Any, y: Tensor) -> Tensor:
            return change(y.to(own)).float() * span_B[:, None]

        if y.is_meta:  # shapes alone, which torchdiffeq cannot do without the times
            for _ in range(config.steps * EVALUATIONS[config.solver]):
                y = y + scaled(None, y)
            return y
        times = torch.linspace(0, 1, config.steps + 1, device=y.device)
        return odeint(scaled, y, times, method=config.solver)[-1]

    @property
    def _dtype(self) -> Any:
        """Of the weights, as the engine has them."""
        return self.posterior.weight.dtype
