"""Reconstruction of series: what was observed at all times, from what was observed at some of them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from configs.sections.pairs import TASK_ENDS
from models.batch import SeriesBatch
from models.noise import normal, uniform

from .samples import Table
from .task import Modules, Nets, Sums, Task, Value

SHOWN = 3
"""Series of a sample."""


class SeriesReconstruction(Task):
    """The negative evidence lower bound of a series, in nats: that of its observations, which are normal around what is
    found with the standard deviation model.noise, plus model.beta times the divergence of the latent state's
    distribution from its prior. Of model.given=first only the observations that are not given count. Those given are a
    function of (seed, example), and of the example alone in evaluations.

    Recorded besides: `kl`, that divergence, and the mean squared errors per observation, in units of the variance, of
    what was given, `mse_given`, and of what was not, `mse_hidden`.
    """

    takes, gives = TASK_ENDS["series_reconstruction"]
    reads = "series"

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "series"

    @property
    def _model(self) -> Any:
        return self.config.model

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """`errors`: sums of squared errors, and numbers of observations: of those given and of those not."""
        return {"kl": (), "errors": (2, 2)}

    def given(self, batch: SeriesBatch, seed: int, use: str) -> Tensor:
        """Bool [B, T, V]: the observations that the encoder sees."""
        real_BT = batch.observed.any(2)
        if self._model.given == "all":
            return batch.observed
        order_BT = torch.arange(real_BT.shape[1], device=real_BT.device).expand_as(real_BT).float()
        if self._model.given == "random":
            order_BT = uniform(seed, batch.example_ids, use, (real_BT.shape[1],))
        rank_BT = order_BT.masked_fill(~real_BT, math.inf).argsort(dim=1, stable=True).argsort(1)
        kept_B = (self._model.share * real_BT.sum(1)).round().clamp(min=1)
        return batch.observed & (rank_BT < kept_B[:, None])[..., None]

    def loss(self, nets: Nets, batch: SeriesBatch, phase: str) -> Sums:
        seed = self.config.run.seed
        noise = normal(seed, batch.example_ids, "latents", (self._model.latents,))
        return self._compared(nets, batch, self.given(batch, seed, "given times"), noise)

    def evaluate(self, nets: Nets, batch: SeriesBatch) -> Sums:
        return self._compared(nets, batch, self.given(batch, 0, "held-out times"), None)

    def _compared(self, nets: Nets, batch: SeriesBatch, given: Tensor, noise: Tensor | None) -> Sums:
        found, mean, log_variance = nets["model"](batch.times, batch.values, given, noise)
        hidden, real = batch.observed & ~given, (batch.example_ids >= 0).float()
        counted = hidden if self._model.given == "first" else batch.observed
        squares = (found - batch.values).square()
        nll = squares / (2 * self._model.noise**2) + math.log(self._model.noise) + math.log(2 * math.pi) / 2
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        losses = (nll * counted).sum((1, 2)) + self._model.beta * kl
        kinds = torch.stack([given, hidden]) & (real > 0)[:, None, None]
        errors = torch.stack([(squares * kinds).sum((1, 2, 3)), kinds.sum((1, 2, 3))], 1)
        return Sums((losses * real).sum(), real.sum(), {"kl": (kl * real).sum(), "errors": errors})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        found = super().metrics({"kl": extra["kl"]}, weight)
        for name, (total, count) in zip(("mse_given", "mse_hidden"), extra["errors"], strict=True):
            if count:
                found[name] = total / count
        return found

    def samples(self, nets: Modules, batch: SeriesBatch) -> Table:
        """What was observed of a few series, whether it was given, and what was found."""
        given = self.given(batch, 0, "held-out times")
        made, *_ = nets["model"](batch.times, batch.values, given)
        rows: list[list[str | float]] = []
        for example, place, number in batch.observed[:SHOWN].nonzero().tolist():
            where = example, place, number
            values = [float(batch.times[example, place]), number, float(batch.values[where]), float(made[where])]
            rows.append([int(batch.example_ids[example]), *values, "yes" if given[where] else "no"])
        return Table(["example", "time", "number", "observed", "found", "given"], rows)
