"""Predictions with intervals: the loss at a budget or of a model, and the compute-optimal choices."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from configs import ConfigError

from .fit import Fits, draw, fit_form
from .forms import Array
from .predict import Kind, columns_at, kinds, log_losses, optimum
from .solve import refit
from .table import budgets

LEVEL = 0.95
FAR, NEAR = 0.1, 0.05
"""ln L above the best of its budget: over FAR a run is not used, under NEAR it counts as optimal."""
HORIZONS, ORIGINS = 3, 4
"""Budgets ahead, and origins, that are looked at."""
PRIOR = 0.1
"""Scale of the drift expected beforehand, in slopes of the frontier."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; `low == high` where it was given."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """What a fit says of a budget, or of a model."""

    budget: float
    """Training FLOPs."""
    loss: Estimate
    """Nats per token."""
    n: Estimate
    """Parameters, in the table's convention; the best for the budget, or those given."""
    d: Estimate
    """Training tokens."""
    shape: Mapping[str, float]
    """experts, top_k, ... of the best kind of model, where the table has several."""
    form: str
    convention: str
    level: float
    method: Mapping[str, Any]
    """How the interval was made."""
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"shape": dict(self.shape), "method": dict(self.method), "warnings": list(self.warnings)}


def at_budget(fits: Fits, budget: float, seed: int = 0) -> Prediction:
    """The compute-optimal model of a budget and its loss.

    Raises:
        ConfigError: the chosen form has no optimum there.
    """
    fits = near_optimal(fits)
    fit, table = fits.best, fits.table
    found = []
    for kind in kinds(table):
        best = optimum(fit.form, fit.solution.parameters[None], table, budget, kind)
        found.append((float(best.loss[0]), kind, best))
    _, kind, best = min(found, key=lambda each: each[0])
    samples = optimum(fit.form, fit.samples, table, budget, kind)
    drift = Drift.of(fits, kind)
    generator = np.random.default_rng(seed)
    loss = drift.interval(float(best.loss[0]), samples.loss, budget, generator)
    n, d = (_spread(getattr(best, key)[0], getattr(samples, key)) for key in ("n", "d"))
    return Prediction(
        budget, loss, n, d, kind.shape, fits.chosen, table.convention, LEVEL, drift.record(budget),
        _warnings(fits, budget, best.n[0], kind),
    )  # fmt: skip


def near_optimal(fits: Fits) -> Fits:
    """The chosen form fitted to the runs near the best of their budget: far ones are often just trained badly.

    Raises:
        ConfigError: the form has no tokens, or was fitted without refits.
    """
    _needs_sizes(fits)
    table, form = fits.table, fits.best.form
    index, best = budgets(table), np.full(len(table), np.inf)
    for budget in range(int(index.max()) + 1):
        best[index == budget] = table.loss[index == budget].min()
    far = table.loss > best * np.exp(FAR)
    if not far.any() or (~far).sum() < 2 * form.size:
        return fits
    table = table.without(far, f"over {FAR:g} in ln L above the best of its budget")
    found = fit_form(form, table, fits.best.objective, len(fits.best.samples), validate=False)
    return replace(fits, table=table, fits={**fits.fits, fits.chosen: found})


def at_size(fits: Fits, n: float, d: float, kind: Kind | None = None, seed: int = 0) -> Prediction:
    """The loss of a model of n parameters after d tokens.

    Args:
        kind: of model, where the table has several; None: the first.
    """
    fits = near_optimal(fits)
    fit, table = fits.best, fits.table
    kind = kind or kinds(table)[0]
    x = columns_at(kind, table, np.log([n]), np.log([d]))
    budget = float(x["c"][0])
    value = float(np.exp(log_losses(fit.form, fit.solution.parameters[None], x))[0, 0])
    samples = np.exp(log_losses(fit.form, fit.samples, x))[:, 0]
    drift = Drift.of(fits, kind)
    loss = drift.interval(value, samples, budget, np.random.default_rng(seed))
    return Prediction(
        budget, loss, Estimate(n, n, n), Estimate(d, d, d), kind.shape, fits.chosen, table.convention, LEVEL,
        drift.record(budget), _warnings(fits, budget, n, kind),
    )  # fmt: skip


@dataclass(frozen=True)
class Drift:
    """How far the law leaves the truth beyond the fitted budgets, in ln L per ln C, as held-back budgets showed.

    The error of a prediction h = ln(C / C_last) beyond the last fitted budget has the variance of the refits plus
    (tau h)^2. The scale tau is not known: its posterior is taken over a grid from the errors that fits to the smaller
    budgets made on the larger ones (rolling origin), with a heavy-tailed prior whose scale is a tenth of the frontier's
    own slope, and half of its mass on a law that holds. A run has noise of its own, too.
    """

    last: float
    """FLOPs of the last fitted budget."""
    grid: Array
    posterior: Array
    noise: float
    """Standard deviation of one run's ln L."""
    errors: tuple[tuple[float, float, float], ...]
    """(h, error in ln L, standard error) of each held-back budget."""

    @classmethod
    def of(cls, fits: Fits, kind: Kind) -> "Drift":
        """From the fits to the smaller budgets."""
        fit, table = fits.best, fits.table.take(kind.rows)
        index = budgets(table)
        count = int(index.max()) + 1
        centre = np.array([np.log(table.c[index == b]).mean() for b in range(count)])
        errors = []
        for origin, parameters, samples in _origins(fits, kind, index):
            for held in range(origin, min(count, origin + HORIZONS)):
                rows = np.flatnonzero(index == held)
                near = rows[table.loss[rows] <= table.loss[rows].min() * np.exp(NEAR)]
                x = {name: table.columns[name][near] for name in fit.form.needs}
                refits = log_losses(fit.form, samples, x).mean(axis=1)
                low, high = np.percentile(refits, [16, 84])
                error = float((np.log(table.loss[near]) - log_losses(fit.form, parameters[None], x)[0]).mean())
                std = float(np.hypot((high - low) / 2, fit.residual_noise / np.sqrt(len(near))))
                errors.append((origin, float(centre[held] - centre[origin - 1]), error, std))
        whole, parameters = kind._replace(rows=np.arange(len(table))), fit.solution.parameters[None]
        ends = [optimum(fit.form, parameters, table, float(np.exp(centre[-1] + by)), whole) for by in (-0.1, 0.0)]
        slope = abs(float(np.log(ends[1].loss[0] / ends[0].loss[0]))) / 0.1
        relative = np.geomspace(0.01, 30, 60)
        prior = relative * (1 + relative**2 / 4) ** -2.5  # half-t of 4 degrees of freedom on a logarithmic grid
        prior = np.concatenate([[0.5], 0.5 * prior / prior.sum()])
        grid = np.concatenate([[0.0], PRIOR * slope * relative])
        log_likelihood = np.zeros(len(grid))
        for origin in {each[0] for each in errors}:
            _, h, error, std = np.array([each for each in errors if each[0] == origin]).T
            variance = std**2 + np.outer(grid, h) ** 2 + 1e-12
            # Errors of one origin are one error seen at several budgets: they count as one.
            log_likelihood += (-0.5 * np.log(variance) - 0.5 * error**2 / variance).mean(axis=1)
        posterior = prior * np.exp(log_likelihood - log_likelihood.max())
        kept = tuple((h, error, std) for _, h, error, std in errors)
        return cls(float(np.exp(centre[-1])), grid, posterior / posterior.sum(), fit.residual_noise, kept)

    def interval(self, value: float, samples: Array, budget: float, generator: np.random.Generator) -> Estimate:
        """The estimate with its interval, from refits of it."""
        beyond = max(0.0, float(np.log(budget / self.last)))
        draws = generator.choice(np.log(samples), 8000)
        tau = generator.choice(self.grid, 8000, p=self.posterior)
        draws = draws + generator.normal(size=8000) * np.hypot(tau * beyond, self.noise)
        low, high = np.exp(np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]))
        return Estimate(value, min(float(low), value), max(float(high), value))

    def record(self, budget: float) -> dict[str, Any]:
        return {
            "interval": "bootstrap over runs, noise of a run, and drift beyond the fitted budgets by rolling origin",
            "beyond_ln_c": max(0.0, float(np.log(budget / self.last))),
            "drift_per_ln_c": float(self.grid @ self.posterior),
            "no_drift": float(self.posterior[0]),
            "run_noise": self.noise,
            "held_back": [{"ln_c": h, "error": error, "std": std} for h, error, std in self.errors],
        }


def _origins(fits: Fits, kind: Kind, index: Any) -> list[tuple[int, Array, Array]]:
    """(number of budgets, parameters, refits) of fits to the smaller budgets."""
    fit = fits.best
    table = fits.table.take(kind.rows)
    x = {name: table.columns[name] for name in fit.form.needs}
    found = []
    count = int(index.max()) + 1
    for origin in range(count - 1, max(1, count - 1 - ORIGINS), -1):
        rows = np.flatnonzero(index < origin)
        if len(rows) < fit.form.size + 2:
            continue
        some = {name: values[rows] for name, values in x.items()}
        weights = np.concatenate([np.ones((1, len(rows))), draw(table.take(rows), 64, np.random.default_rng(origin))])
        refits, _ = refit(fit.form, some, table.loss[rows], weights, fit.solution.parameters, fit.objective)
        found.append((origin, refits[0], refits[1:]))
    return found


def _spread(value: float, samples: Array) -> Estimate:
    low, high = np.percentile(samples, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(value), min(float(low), float(value)), max(float(high), float(value)))


def _needs_sizes(fits: Fits) -> None:
    if not {"n", "d"} <= set(fits.best.form.needs):
        raise ConfigError(
            f"{fits.chosen} says nothing of tokens, so nothing of a budget: choose another with --form, such as "
            "approach3"
        )
    if not len(fits.best.samples):
        raise ConfigError("a prediction needs the bootstrap's refits: leave --bootstraps 0 out")


def _warnings(fits: Fits, budget: float, n: float, kind: Kind) -> tuple[str, ...]:
    table, found = fits.table, []
    if (times := budget / table.c.max()) > 100:
        found.append(f"{budget:.3g} FLOPs are {times:,.0f} times the largest fitted budget")
    sizes = table.n[kind.rows]
    if not sizes.min() / 30 < n < sizes.max() * 30:
        found.append(f"N = {n:.3g} is far from the fitted sizes ({sizes.min():.3g} to {sizes.max():.3g})")
    if fits.approach2 and len(fits.approach2.refused) > len(fits.approach2.valleys):
        found.append("most budgets have no valley in N: the optimum is not inside the sizes that were trained")
    return tuple(found)
