"""A form fitted to a sweep's largest budgets, with what the same fit got wrong with some of them held back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .drift import Drift, Window, deviation, fit_windows, held_loss, held_size
from .forms import Array, Form
from .newton import Objective
from .predict import Kind, Optimum, optimum
from .refusal import Refusal
from .table import Table, budgets

NEAR, BEST = 0.1, 0.05
"""ln L above the best of its budget: over NEAR a run is far from the frontier, under BEST it stands for it."""
RECENT = 4
"""Budgets that a law is fitted to: the fewest that show a floor with one to spare."""
ORIGINS, HORIZONS = 4, 3
"""Origins that are looked at, and budgets beyond each."""


@dataclass(frozen=True)
class Law:
    """A form fitted to some of a sweep's runs, and what fits like it got wrong beyond theirs."""

    form: Form
    window: Window
    slope: float
    """- d ln L / d ln C of the frontier at the largest budget."""
    loss_drift: Drift
    size_drift: Drift

    scatter: float
    """Standard deviation of the refits' ln L, one unit of ln C beyond the largest budget."""

    @property
    def parameters(self) -> tuple[Array, Array]:
        """Those of the fit, shape (1, P), and of its refits, shape (B, P)."""
        return self.window.parameters[None], self.window.samples

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        window = self.window
        return {
            "form": self.form.name,
            "coefficients": self.form.coefficients(window.parameters),
            "runs": int(window.rows.sum()),
            "refits": len(window.samples),
            "spread": window.spread,
            "run_noise": window.noise,
            "loss_drift": self.loss_drift.record(),
            "size_drift": self.size_drift.record(),
        }


class Sweep:
    """A table by budgets."""

    def __init__(self, table: Table, kind: Kind, objective: Objective, refits: int, seed: int) -> None:
        self.table, self.kind, self.objective, self.refits, self.seed = table, kind, objective, refits, seed
        self.index = budgets(table)
        self.count = int(self.index.max()) + 1
        log_loss = np.log(table.loss)
        best = np.full(self.count, np.inf)
        np.minimum.at(best, self.index, log_loss)
        self.above = log_loss - best[self.index]
        """ln L above the best run of the same budget."""
        self.centre = np.array([np.log(table.c[self.index == b]).mean() for b in range(self.count)])
        self.last = float(np.exp(self.centre[-1]))
        """FLOPs of the largest budget."""

    def law(self, form: Form, start: Array, usable: NDArray[np.bool_], recent: int | None = None) -> Law:
        """The fit to the last `recent` budgets, and its drift by the same fits with the last budgets held back.

        Args:
            start: parameters near the optimum, shape (P,).
            usable: runs that may be fitted, shape (rows,).
            recent: None: all.

        Raises:
            Refusal: fewer runs than the form needs.
        """
        recent = recent or self.count
        masks = {}
        for origin in range(self.count, max(1, self.count - 1 - ORIGINS), -1):
            rows = usable & (self.index < origin) & (self.index >= origin - recent)
            if rows.sum() > form.size + 1 and len(np.unique(self.index[rows])) > 1:
                masks[origin] = rows
        if self.count not in masks:
            raise Refusal("few_rows", f"{form.name}: {usable.sum()} runs for {form.size} coefficients")
        if self.count > RECENT:
            # The errors of fewer budgets scatter more than their refits do: they tell of drift where nothing else does.
            masks = {origin: rows for origin, rows in masks.items() if origin >= RECENT}
        generator = np.random.default_rng(self.seed)
        whole, *others = fit_windows(form, self.table, masks, start, self.objective, self.refits, generator)
        losses, sizes = [], []
        for window in others:
            for budget in range(window.origin, min(self.count, window.origin + HORIZONS)):
                rows = self.index == budget
                distance = float(self.centre[budget] - self.centre[window.origin - 1])
                losses.append(held_loss(form, self.table, window, rows & (self.above < BEST), distance))
                sizes.append(held_size(form, self.table, window, rows & (self.above < NEAR), distance, self.kind))
        before, last = (self._optimum(form, whole.parameters[None], self.last * np.exp(-by)) for by in (0.1, 0.0))
        slope, size_slope = (
            abs(float(np.log(b[0] / a[0]))) / 0.1 for a, b in ((before.loss, last.loss), (before.n, last.n))
        )
        scatter = whole.spread * deviation(np.log(self._optimum(form, whole.samples, self.last * np.e).loss))
        loss_drift = Drift.of(losses, slope)
        return Law(form, whole, slope, loss_drift, Drift.of([each for each in sizes if each], size_slope), scatter)

    def _optimum(self, form: Form, parameters: Array, budget: float) -> Optimum:
        return optimum(form, parameters, self.table, budget, self.kind)
