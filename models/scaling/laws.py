"""A form fitted to a sweep's largest budgets, with the errors of the same fit when some of them are held out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .allocation import Kind, Optimum, kinds, optimum
from .drift import Drift, Window, columns, deviation, fit_windows, held_loss, held_size
from .forms.dense import Array, Form
from .forms.newton import Objective
from .forms.solve import at_bound
from .refusal import Refusal
from .table import SHARED, Budgets, Table, budgets

NEAR, BEST = 0.1, 0.05
"""ln L above the best of its budget: above NEAR a run is far from the frontier, below BEST it represents it."""
RECENT = 4
"""Budgets that a law is fitted to: the fewest that show a floor with one to spare."""
ORIGINS, HORIZONS = 4, 3
"""Most origins that are tried, and most budgets beyond each."""
SPARE, LEAST_SPARE = 4, 2
"""Runs in excess of coefficients: with fewer than SPARE earlier budgets are added, with fewer than LEAST_SPARE nothing
is fitted."""
VALLEY = 3
"""Fewest sizes of a budget's valley."""
YOUNG = 2.3
"""Factor on the standard errors of fits to fewer than RECENT budgets: 2.1 to 2.5 was seen for laws without drift."""


def has_valleys(table: Table, found: Budgets) -> bool:
    """Whether most runs share their budget with runs of other sizes, as in an isoFLOP design."""
    if not found.common:
        return False
    sizes = np.array([len(np.unique(table.n[found.level == b])) for b in range(int(found.level.max()) + 1)])
    return bool((sizes[found.level] >= VALLEY).mean() >= SHARED)


@dataclass(frozen=True)
class Law:
    """A form fitted to some of a sweep's runs, and the errors of such fits beyond their own runs."""

    form: Form
    window: Window
    slope: float
    """- d ln L / d ln C of the frontier at the largest budget."""
    loss_drift: Drift
    size_drift: Drift
    scatter: float
    """Standard deviation of the refits' ln L, one unit of ln C beyond the largest budget."""
    at_bound: tuple[str, ...]
    """Coefficients at the edge of what is allowed, which the runs do not determine."""

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
    """A table, grouped by budget."""

    def __init__(self, table: Table, kind: Kind, objective: Objective, refits: int, seed: int) -> None:
        self.table, self.kind, self.objective, self.refits, self.seed = table, kind, objective, refits, seed
        found = budgets(table)
        # Models of several kinds have no valley in common.
        self.index, self.valleys = found.level, len(kinds(table)) == 1 and has_valleys(table, found)
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
        """The fit to the last `recent` budgets, and its drift, from the same fit with the last budgets held out.

        Args:
            start: parameters near the optimum, shape (P,).
            usable: runs that may be used for the fit, shape (rows,).
            recent: None: all budgets.

        Raises:
            Refusal: fewer runs than the form needs.
        """
        recent = recent or self.count
        masks = {}
        for origin in range(self.count, max(1, self.count - 1 - ORIGINS), -1):
            first = max(0, origin - recent)
            while first and (usable & (self.index < origin) & (self.index >= first)).sum() < form.size + SPARE:
                first -= 1
            rows = usable & (self.index < origin) & (self.index >= first)
            if rows.sum() >= form.size + LEAST_SPARE and len(np.unique(self.index[rows])) > 1:
                masks[origin] = rows
        if self.count not in masks:
            raise Refusal(
                "few_rows",
                f"{form.name} needs at least {form.size + LEAST_SPARE} runs at two budgets or more to predict, but "
                f"there are {int(usable.sum())}",
            )
        generator = np.random.default_rng(self.seed)
        whole, *others = fit_windows(form, self.table, masks, start, self.objective, self.refits, generator)
        losses, sizes = [], []
        for window in others:
            for budget in range(window.origin, min(self.count, window.origin + HORIZONS)):
                rows = self.index == budget
                distance = float(self.centre[budget] - self.centre[window.origin - 1])
                loss = held_loss(form, self.table, window, rows & (self.above < BEST), distance)
                size = None
                if self.valleys:
                    size = held_size(form, self.table, window, rows & (self.above < NEAR), distance, self.kind)
                # Fits to few budgets count in full as evidence of drift only if there is no other.
                doubt = YOUNG if window.origin < RECENT < self.count else 1.0
                losses.append(loss._replace(std=doubt * loss.std))
                sizes += [size._replace(std=doubt * size.std)] if size else []
        before, last = (self._optimum(form, whole.parameters[None], self.last * np.exp(-by)) for by in (0.1, 0.0))
        slope, size_slope = (
            abs(float(np.log(b[0] / a[0]))) / 0.1 for a, b in ((before.loss, last.loss), (before.n, last.n))
        )
        scatter = whole.spread * deviation(np.log(self._optimum(form, whole.samples, self.last * np.e).loss))
        drifts = Drift.of(losses, slope), Drift.of(sizes, size_slope)
        edge = at_bound(form, columns(form, self.table, whole.rows), whole.parameters)
        return Law(form, whole, slope, *drifts, scatter, edge)

    def _optimum(self, form: Form, parameters: Array, budget: float) -> Optimum:
        return optimum(form, parameters, self.table, budget, self.kind)
