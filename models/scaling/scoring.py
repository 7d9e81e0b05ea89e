"""Predicted losses beside actual ones, for runs above the budgets that a law was fitted to."""

from typing import Any, NamedTuple

import numpy as np

from configs import ConfigError
from configs.units import scientific

from .fitting import check, named
from .predictions import Forecast
from .refusal import Refusal
from .table import Table, budgets


class Score(NamedTuple):
    """One prediction; losses in nats per token."""

    run: str
    budget: float
    """Training FLOPs that the run spends, or spent."""
    predicted: float
    low: float
    high: float
    form: str
    loss: float | None
    """None: the run has not finished."""
    status: str
    """Of the run; "AFTERWARDS": the prediction was made after the run had ended, so it is none."""

    @property
    def error(self) -> float | None:
        """(actual - predicted) / predicted."""
        return None if self.loss is None else self.loss / self.predicted - 1

    @property
    def inside(self) -> bool | None:
        """Whether the loss lies in the interval."""
        return None if self.loss is None else self.low <= self.loss <= self.high

    @property
    def counts(self) -> bool:
        return self.loss is not None and self.status == "FINISHED"


def score(table: Table, max_budget: float, form: str | None = None) -> tuple[list[Score], list[tuple[str, str]]]:
    """Test a fit to the budgets up to `max_budget` on the runs above it: on each, and on the best of each
    budget that several share.

    Returns:
        The scores; and (run, reason) for each that cannot be predicted.

    Raises:
        ConfigError: no runs are above, or those below cannot be fitted.
    """
    above = table.c > 1.01 * max_budget
    if not above.any() or above.all():
        raise ConfigError(
            f"--max-budget {max_budget:g}: the sweep's runs spend {table.c.min():.3g} to {table.c.max():.3g} "
            "FLOPs; choose a value with runs on both sides"
        )
    held, below = table.take(above), table.without(above, f"over --max-budget {max_budget:g}")
    check(below)
    forecast = Forecast(below, named(form) if form else None)
    found: list[Score] = []
    left_out: list[tuple[str, str]] = []
    unique = held.extra.get("unique", np.full(len(held), np.inf))

    def add(name: str, row: int, shape: dict[str, float] | None) -> None:
        c, u, loss = float(held.c[row]), float(unique[row]), float(held.loss[row])
        try:
            if shape is None:
                each = forecast.at_budget(c, u)
            else:
                each = forecast.at_size(float(held.n[row]), float(held.d[row]), shape, u)
        except Refusal as refusal:
            if refusal.kind != "repeats":  # of the law as a whole
                raise
            left_out.append((name, str(refusal)))
        else:
            found.append(Score(name, c, *each.run_loss, each.form, loss, "FINISHED"))

    for i in range(len(held)):
        shape = {key: float(held.extra[key][i]) for key in forecast.kinds[0].shape}
        try:
            add(held.run[i], i, shape)
        except Refusal as refusal:
            if refusal.kind != "few_kinds":
                raise
            left_out.append((held.run[i], f"the smaller budgets have no model of this kind: {refusal}"))
    level, common = budgets(table)
    level = level[above]
    for rows in [np.flatnonzero(level == each) for each in np.unique(level)] if common else []:
        if len(rows) < 2:  # a single run is not the best of anything
            continue
        best = int(rows[held.loss[rows].argmin()])
        add(f"best of {scientific(float(held.c[best]))}", best, None)
    return found, left_out


def to_json(found: list[Score]) -> dict[str, Any]:
    """The scores as plain values, with how many of those that count are inside their intervals."""
    counted = [each for each in found if each.counts]
    errors = [abs(each.error) for each in counted if each.error is not None]
    return {
        "scores": [each._asdict() | {"error": each.error, "inside": each.inside} for each in found],
        "finished": len(counted), "inside": sum(bool(each.inside) for each in counted),
        "mean_absolute_error": float(np.mean(errors)) if errors else None,
    }  # fmt: skip
