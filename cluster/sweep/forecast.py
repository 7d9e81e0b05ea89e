"""Predictions with intervals: the loss at a budget or of a model, and the compute-optimal choices."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .forms import Form
from .intervals import Extrapolation, Interval, extrapolate
from .predict import columns_at, kinds
from .table import Table

LEVEL = 0.95


class Rival(NamedTuple):
    """A kind of model that may be the best of a budget as well; see `Prediction`."""

    shape: Mapping[str, float]
    loss: Interval
    n: Interval
    d: Interval

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {key: getattr(self, key)._asdict() for key in ("loss", "n", "d")} | {"shape": dict(self.shape)}


@dataclass(frozen=True)
class Prediction:
    """What a fit says of a budget, or of a model."""

    budget: float
    """Training FLOPs."""
    loss: Interval
    """Of the law, nats per token."""
    run_loss: Interval
    """Of one run, which has noise of its own."""
    n: Interval
    """Parameters, in the table's convention; the best for the budget, or those given."""
    d: Interval
    """Training tokens."""
    shape: Mapping[str, float]
    """experts, top_k, ... of the best kind of model, where the table has several."""
    form: str
    convention: str
    level: float
    method: Mapping[str, Any]
    """How the interval was made."""
    warnings: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    """Kinds of models whose interval of the loss begins below the end of the best one's, by their loss: with `shape`,
    the experts and top_k among which the best is at this level."""

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        intervals = {key: getattr(self, key)._asdict() for key in ("loss", "run_loss", "n", "d")}
        return (
            asdict(self)
            | intervals
            | {"shape": dict(self.shape), "method": dict(self.method), "warnings": list(self.warnings)}
            | {"rivals": [each.summary() for each in self.rivals]}
        )


class Forecast:
    """Predictions from a table of runs. A law is fitted to each kind of models once, when it is first asked for.

    Args:
        form: None: `Crossed` near the largest budgets; or another, on all runs.
    """

    def __init__(self, table: Table, form: Form | None = None, seed: int = 0) -> None:
        self.table, self.form, self.seed = table, form, seed
        self.kinds = kinds(table)
        self._laws: dict[int, Extrapolation] = {}

    def at_budget(self, budget: float) -> Prediction:
        """The compute-optimal model of a budget and its loss; of several kinds of models, the best.

        Raises:
            Refusal: too few runs near the optimum of the largest budgets.
        """
        laws = [self._law(index) for index in range(len(self.kinds))]
        found = [law.at_budget(budget, LEVEL) for law in laws]
        best, *others = sorted(range(len(laws)), key=lambda each: found[each]["loss"].value)
        rivals = [
            Rival(laws[each].kind.shape, **found[each]) for each in others
            if found[each]["loss"].low <= found[best]["loss"].high
        ]  # fmt: skip
        return replace(_prediction(self.table, laws[best], budget, **found[best]), rivals=tuple(rivals))

    def at_size(self, n: float, d: float, shape: Mapping[str, float] | None = None) -> Prediction:
        """The loss of a model of n parameters after d tokens.

        Args:
            shape: of one of the table's kinds of models; None: the first.

        Raises:
            Refusal: too few runs near the optimum of the largest budgets.
        """
        law = self._law(0 if shape is None else [kind.shape for kind in self.kinds].index(dict(shape)))
        budget = float(columns_at(law.kind, law.table, np.log([n]), np.log([d]))["c"][0])
        return _prediction(self.table, law, budget, law.at_size(n, d, LEVEL), Interval(n, n, n), Interval(d, d, d))

    def _law(self, index: int) -> Extrapolation:
        """Of the runs of one kind alone: what a law of experts assumes of others does not touch it."""
        if index not in self._laws:
            kind = self.kinds[index]
            table = self.table.take(kind.rows)
            own = kind._replace(rows=np.arange(len(table)))
            self._laws[index] = extrapolate(table, self.form, own, seed=self.seed)
        return self._laws[index]


def _prediction(
    table: Table, law: Extrapolation, budget: float, loss: Interval, n: Interval, d: Interval
) -> Prediction:
    noise = 1.96 * max(each.window.noise for each in law.laws)
    down, up = np.hypot(np.log([loss.value / loss.low, loss.high / loss.value]), noise).tolist()
    return Prediction(
        budget=budget, loss=loss, n=n, d=d,
        run_loss=Interval(loss.value, loss.value * float(np.exp(-down)), loss.value * float(np.exp(up))),
        shape=law.kind.shape, form=" and ".join(each.form.name for each in law.laws), convention=table.convention,
        level=LEVEL, method=law.record(), warnings=_warnings(law, budget, n.value),
    )  # fmt: skip


def _warnings(law: Extrapolation, budget: float, n: float) -> tuple[str, ...]:
    found = []
    if (times := budget / law.last) > 100:
        found.append(f"{budget:.3g} FLOPs are {times:,.0f} times the largest fitted budget")
    sizes = law.table.n
    if not sizes.min() / 30 < n < sizes.max() * 30:
        found.append(f"N = {n:.3g} is far from the fitted sizes ({sizes.min():.3g} to {sizes.max():.3g})")
    if max(len(each.loss_drift.held) for each in law.laws) < 2:
        found.append("too few budgets to hold any back: the interval rests on the law being right")
    return tuple(found)
