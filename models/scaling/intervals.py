"""Intervals for extrapolation beyond a sweep: the law of its largest budgets, refitted, and its drift on held-out ones.

A law of few coefficients that is fitted to all runs of a sweep is never quite right, and its error grows with the
distance from the data, of which a bootstrap shows nothing. So here:
1. The law is fitted where it is used: to the runs near the best of their budget, in the last few budgets.
2. It is `Crossed`, which contains approach 3 but does not tie the frontier's slope to the curvature of the valleys.
   Where runs share no valleys, all are used, and a prior holds it near approach 3: they may not determine N*.
3. Refits weight every run by an exponential variable (Bayesian bootstrap, Rubin 1981: no refit loses a budget), under
   Huber's loss with a delta of 1.345 standard deviations of the noise; their spread is widened by
   sqrt(runs / (runs - coefficients)) and Student's t, as the degrees of freedom of a regression require.
4. The same is done with the last budgets held out (rolling origin). Errors there in excess of the refits' spread and a
   run's noise are drift: ln L departs from the law by tau times the distance in ln C (and in ln N, from the best size),
   and the posterior of tau is integrated over. Most of its prior mass is at no drift. ln N* has its own drift.
5. If runs are so few or noisy that the refits scatter more than the drift, approach 3 on all budgets gets equal weight,
   provided that it fits about as well.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .allocation import Kind, columns_at, kinds, log_losses, optimum
from .drift import Drift, columns
from .forms.crossed import Crossed
from .forms.dense import Approach3, Array, Form
from .forms.newton import HUBER_LOG, Objective
from .forms.solve import solve
from .laws import NEAR, RECENT, Law, Sweep
from .refusal import Refusal
from .table import Table

NOISY = 0.1
"""Scatter of the refits, in slopes of the frontier, above which more runs and fewer coefficients are worth a bias."""
ALIKE = 1.5
"""Approach 3 on all budgets is used if its noise is below this multiple of that of `Crossed` on the last few."""
INTERACTION = 0.05
"""Prior standard deviation of `Crossed`'s alpha_D and beta_N where no valleys show them. The medians of their sizes in
the 11 tables of Porian et al. (arXiv:2406.19146) with untuned optimisers are 0.07 and 0.08, errors of the fits
included."""
REFITS = 400
DRAWS = 8000


class Interval(NamedTuple):
    """An estimate and its bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Extrapolation:
    """The law near the frontier of a sweep's largest budgets, and how far it can be trusted beyond them."""

    table: Table
    kind: Kind
    laws: tuple[Law, ...]
    """Of equal weight."""
    last: float
    """FLOPs of the largest budget."""
    seed: int
    notes: tuple[str, ...] = ()
    """What was left out of it, and why."""

    def at_budget(self, budget: float, level: float = 0.95) -> dict[str, Interval]:
        """Loss, n and d of the compute-optimal model of a budget, in FLOPs."""
        losses, sizes = [], []
        for law in self.laws:
            best, refits = (optimum(law.form, p, self.table, budget, self.kind) for p in law.parameters)
            losses.append((float(np.log(best.loss[0])), np.log(refits.loss), law.loss_drift))
            sizes.append((float(np.log(best.n[0])), np.log(refits.n), law.size_drift))
        loss, n = self._interval(losses, budget, level), self._interval(sizes, budget, level)
        # The budget fixes D once N is chosen.
        d = np.exp(self.kind.log_tokens(np.log(np.array(n)), budget))
        return {"loss": loss, "n": n, "d": Interval(float(d[0]), float(d[2]), float(d[1]))}

    def at_size(self, n: float, d: float, level: float = 0.95) -> Interval:
        """The loss of a model of n parameters after d tokens."""
        x = columns_at(self.kind, self.table, np.log([n]), np.log([d]))
        found = []
        for law in self.laws:
            best, refits = (log_losses(law.form, p, x)[:, 0] for p in law.parameters)
            found.append((float(best[0]), refits, law.loss_drift))
        budget = float(x["c"][0])
        return self._interval(found, budget, level, self._aside(n, budget))

    def _aside(self, n: float, budget: float) -> float:
        """Distance of a size from the frontier in ln N."""
        law = self.laws[0]
        frontier = optimum(law.form, law.parameters[0], self.table, budget, self.kind)
        return float(np.log(n / frontier.n[0]))

    def record(self) -> dict[str, Any]:
        """What was done, for `--json`."""
        return {"last_budget": self.last, "laws": [law.record() for law in self.laws]}

    def _interval(
        self, found: list[tuple[float, Array, Drift]], budget: float, level: float, aside: float = 0.0
    ) -> Interval:
        """The interval of a quantity, from its logarithm, refits and drift under each law.

        Args:
            aside: distance from the frontier in ln N.
        """
        generator = np.random.default_rng(self.seed)
        beyond = np.hypot(max(0.0, np.log(budget / self.last)), aside)
        draws = []
        for (value, refits, drift), law in zip(found, self.laws, strict=True):
            count = DRAWS // len(found)
            freedom = law.window.freedom
            # Student's t: the runs' noise is estimated from their residuals.
            widen = law.window.spread * np.sqrt(freedom / generator.chisquare(freedom, count))
            draw = value + generator.choice(refits - value, count) * widen
            tau = generator.choice(drift.grid, count, p=drift.mass)
            draws.append(draw + tau * beyond * generator.normal(size=count))
        low, high = np.percentile(np.concatenate(draws), [50 * (1 - level), 50 * (1 + level)])
        value = float(np.mean([each[0] for each in found]))
        return Interval(*np.exp([value, min(low, value), max(high, value)]).tolist())


def extrapolate(
    table: Table,
    form: Form | None = None,
    kind: Kind | None = None,
    objective: Objective = HUBER_LOG,
    refits: int = REFITS,
    seed: int = 0,
) -> Extrapolation:
    """Fit the law of a sweep's largest budgets, or of all runs if they share no valleys, and measure its error on
    held-out budgets.

    Args:
        form: another form, for all runs, as a ladder of sizes or a table with experts needs; None: `Crossed`.
        kind: the kind of model to predict; None: the table's first.
        refits: of the last fit; those with budgets held out take fewer.

    Raises:
        Refusal: fewer runs than the form needs.
    """
    kind = kind or kinds(table)[0]
    sweep = Sweep(table, kind, objective, refits, seed)
    if form is not None:
        start = solve(form, columns(form, table), table.loss, objective).parameters
        laws = [sweep.law(form, start, np.ones(len(table), dtype=bool))]
    else:
        # Without valleys nothing shows which runs are far from the frontier, or how the last budgets alone behave.
        near = (sweep.above < NEAR) | (not sweep.valleys)
        dense = {"n": table.n[near], "d": table.d[near]}
        n, d = (float(np.exp(np.log(each).mean())) for each in (table.n, table.d))
        crossed = Crossed(n, d, np.inf if sweep.valleys else INTERACTION)
        start = solve(Approach3(), dense, table.loss[near], objective).parameters
        crossed_start = crossed.parameters(Approach3().coefficients(start))
        try:
            laws = [sweep.law(crossed, crossed_start, near, RECENT if sweep.valleys else None)]
        except Refusal:
            laws = []
        if not laws or (sweep.valleys and laws[0].scatter > max(NOISY * laws[0].slope, laws[0].loss_drift.std)):
            plain = sweep.law(Approach3(), start, near)
            if not laws or plain.window.noise < ALIKE * laws[0].window.noise:
                laws.append(plain)
    return Extrapolation(table, kind, tuple(laws), sweep.last, seed)
