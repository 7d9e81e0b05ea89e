"""Intervals for what lies beyond a sweep: the law of its largest budgets, refitted, and its drift on those held back.

A law of few coefficients that is fitted to all runs of a sweep is never quite right, and its error grows with the
distance from the data; its bootstrap knows nothing of that. Here, instead:
1. The law is fitted where it is used: to the runs near the best of their budget, of the last few budgets.
2. It is `Crossed`, which contains approach 3 but does not tie the frontier's slope to the curvature of the valleys.
3. Refits weigh every run by an exponential variable (Bayesian bootstrap, Rubin 1981: no refit loses a budget), and
   their spread is widened by sqrt(runs / (runs - coefficients)), as regression's degrees of freedom ask for.
4. The same is done with the last budgets held back (rolling origin). What the errors there show beyond the refits'
   spread and a run's noise is drift: ln L leaves the law by tau times the distance in ln C, with a posterior of tau
   that is integrated over. Most of its prior says that there is none. ln N* has a drift of its own.
5. Where runs are so few or noisy that refits spread more than a likely drift, approach 3 for all budgets serves better,
   if it fits them as well.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .crossed import Crossed
from .drift import PRIOR, Drift, Window, columns, deviation, fit_windows, held_loss, held_size
from .forms import Approach3, Array, Form
from .newton import HUBER_LOG, Objective
from .predict import Kind, Optimum, columns_at, kinds, log_losses, optimum
from .refusal import Refusal
from .solve import solve
from .table import Table, budgets

NEAR, BEST = 0.1, 0.05
"""ln L above the best of its budget: over NEAR a run is far from the frontier, under BEST it stands for it."""
RECENT = 4
"""Budgets that the law is fitted to: the fewest that show a floor with one to spare."""
ORIGINS, HORIZONS = 4, 3
"""Origins that are looked at, and budgets beyond each."""
ALIKE = 1.5
"""Residuals of approach 3 for all budgets over those of `Crossed` for the last few, up to which it may hold for all."""
REFITS = 400
DRAWS = 8000


class Interval(NamedTuple):
    """An estimate and its bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Extrapolation:
    """The law near the frontier of a sweep's largest budgets, and how far it is to be trusted beyond."""

    table: Table
    kind: Kind
    form: Form
    window: Window
    last: float
    """FLOPs of the largest budget."""
    slope: float
    """- d ln L / d ln C of the frontier there."""
    loss_drift: Drift
    size_drift: Drift
    seed: int

    def at_budget(self, budget: float, level: float = 0.95) -> dict[str, Interval]:
        """Loss, n and d of the compute-optimal model of a budget, in FLOPs."""
        best, refits = self._optimum(self.window.parameters[None], budget), self._optimum(self.window.samples, budget)
        found = {
            "loss": self._interval(np.log(best.loss[0]), np.log(refits.loss), budget, self.loss_drift, level),
            "n": self._interval(np.log(best.n[0]), np.log(refits.n), budget, self.size_drift, level),
        }
        # The budget fixes D once N is chosen.
        d = np.exp(self.kind.log_tokens(np.log(np.array(found["n"])), budget))
        return found | {"d": Interval(float(d[0]), float(d[2]), float(d[1]))}

    def at_size(self, n: float, d: float, level: float = 0.95) -> Interval:
        """The loss of a model of n parameters after d tokens."""
        x = columns_at(self.kind, self.table, np.log([n]), np.log([d]))
        value, refits = (log_losses(self.form, p, x)[:, 0] for p in (self.window.parameters[None], self.window.samples))
        return self._interval(float(value[0]), refits, float(x["c"][0]), self.loss_drift, level)

    def deviation(self) -> float:
        """Standard deviation of the refits' ln L at the optimum of e times the last budget."""
        return self.window.spread * deviation(np.log(self._optimum(self.window.samples, np.e * self.last).loss))

    def record(self) -> dict[str, Any]:
        """What was done, for `--json`."""
        window = self.window
        return {
            "form": self.form.name,
            "coefficients": self.form.coefficients(window.parameters),
            "rows": int(window.rows.sum()),
            "budgets": len(np.unique(budgets(self.table)[window.rows])),
            "refits": len(window.samples),
            "spread": window.spread,
            "run_noise": window.noise,
            "last_budget": self.last,
            "loss_drift": self.loss_drift.record(),
            "size_drift": self.size_drift.record(),
        }

    def _optimum(self, parameters: Array, budget: float) -> Optimum:
        return optimum(self.form, parameters, self.table, budget, self.kind)

    def _interval(self, value: float, refits: Array, budget: float, drift: Drift, level: float) -> Interval:
        """From a logarithm and its refits."""
        generator = np.random.default_rng(self.seed)
        beyond = max(0.0, float(np.log(budget / self.last)))
        tau = generator.choice(drift.grid, DRAWS, p=drift.mass)
        draws = value + generator.choice(refits - value, DRAWS) * self.window.spread
        draws += tau * beyond * generator.normal(size=DRAWS)
        low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
        return Interval(*np.exp([value, min(low, value), max(high, value)]).tolist())


def extrapolate(
    table: Table,
    form: Form | None = None,
    kind: Kind | None = None,
    objective: Objective = HUBER_LOG,
    refits: int = REFITS,
    seed: int = 0,
) -> Extrapolation:
    """Fit the law of a sweep's largest budgets and see how it did on budgets held back.

    Args:
        form: another form, for all runs, such as a ladder of sizes or a table with experts needs; None: `Crossed`.
        kind: of model that is asked for; None: the table's first.
        refits: of the last fit; those with budgets held back take fewer.

    Raises:
        Refusal: fewer runs than the form needs.
    """
    kind = kind or kinds(table)[0]
    sweep = _Sweep(table, kind, objective, refits, seed)
    if form is not None:
        every = np.ones(len(table), dtype=bool)
        return sweep.extrapolation(form, solve(form, columns(form, table), table.loss, objective).parameters, every)
    near = sweep.above < NEAR
    dense = {"n": table.n[near], "d": table.d[near]}
    crossed = Crossed(*(float(np.exp(np.log(each).mean())) for each in (table.n, table.d)))
    start = solve(Approach3(), dense, table.loss[near], objective).parameters
    found = sweep.extrapolation(crossed, crossed.parameters(Approach3().coefficients(start)), near, RECENT)
    if found.deviation() < PRIOR * found.slope:
        return found
    plain = sweep.extrapolation(Approach3(), start, near)
    fits = plain.window.noise < ALIKE * found.window.noise
    spreads = [np.hypot(each.deviation(), np.sqrt(each.loss_drift.variance)) for each in (found, plain)]
    return plain if fits and spreads[1] < spreads[0] else found


class _Sweep:
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

    def extrapolation(
        self, form: Form, start: Array, usable: NDArray[np.bool_], recent: int | None = None
    ) -> Extrapolation:
        """The fit of the last `recent` budgets, and its drift by the same fits with the last budgets held back."""
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
        before, last = (
            optimum(form, whole.parameters[None], self.table, float(np.exp(self.centre[-1] - by)), self.kind)
            for by in (0.1, 0.0)
        )
        slope, size_slope = (
            abs(float(np.log(b[0] / a[0]))) / 0.1 for a, b in ((before.loss, last.loss), (before.n, last.n))
        )
        return Extrapolation(
            self.table, self.kind, form, whole, float(np.exp(self.centre[-1])), slope, Drift.of(losses, slope),
            Drift.of([each for each in sizes if each], size_slope), self.seed,
        )  # fmt: skip
