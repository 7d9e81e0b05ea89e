"""Extrapolation error of a fitted law, estimated from held-out budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .allocation import Kind, log_losses, optimum
from .forms.dense import Array, Form
from .forms.newton import Objective, Prior
from .forms.solve import minimise
from .table import Table

PRIOR = 0.15
"""Prior scale of the drift, as a fraction of the frontier's slope d ln L / d ln C, or d ln N* / d ln C."""
HOLDS = 0.7
"""Prior probability of no drift: the largest with which at least 90% of the next budgets' best losses are covered after
any 3 to 10 budgets of every second table of Porian et al. (arXiv:2406.19146)."""
HELD_REFITS = 64


class Held(NamedTuple):
    """Error of a fit to the smaller budgets at a larger one."""

    origin: int
    """Number of budgets that it was fitted to."""
    distance: float
    """In ln C, from the last of them."""
    error: float
    """Observed minus predicted ln L at the best runs, or ln N*."""
    std: float
    """Standard error of that, from refits and noise."""


@dataclass(frozen=True)
class Drift:
    """Posterior of tau, the error's standard deviation per unit of ln C."""

    grid: Array
    mass: Array
    held: tuple[Held, ...]

    @classmethod
    def of(cls, held: Sequence[Held], slope: float) -> "Drift":
        """The posterior, given errors on held-out budgets.

        Args:
            slope: of the frontier per unit of ln C; the prior's scale is a fraction of it.
        """
        relative = np.geomspace(0.02, 30, 50)
        # A half-t with 4 degrees of freedom, on a logarithmic grid.
        slab = relative * (1 + relative**2 / 4) ** -2.5
        prior = np.concatenate([[HOLDS], (1 - HOLDS) * slab / slab.sum()])
        grid = np.concatenate([[0.0], PRIOR * slope * relative])
        log_mass = np.log(prior)
        for origin in {each.origin for each in held}:
            _, distance, error, std = np.array([each for each in held if each.origin == origin]).T
            variance = std**2 + np.outer(grid, distance) ** 2 + 1e-14
            # The errors of one fit at several budgets depend on each other: together they count as one observation.
            log_mass += (-0.5 * np.log(variance) - 0.5 * error**2 / variance).mean(axis=1)
        mass = np.exp(log_mass - log_mass.max())
        return cls(grid, mass / mass.sum(), tuple(held))

    @property
    def std(self) -> float:
        """Standard deviation of the error per unit of ln C."""
        return float(np.sqrt(self.grid**2 @ self.mass))

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        held = [{"budgets": o, "ln_c": h, "error": e, "std": s} for o, h, e, s in self.held]
        return {"per_ln_c": float(self.grid @ self.mass), "none": float(self.mass[0]), "held_back": held}


@dataclass(frozen=True)
class Window:
    """Fits of one form to the first budgets of a table."""

    origin: int
    """Number of budgets that they are fitted to."""
    rows: NDArray[np.bool_]
    parameters: Array
    """Shape (P,)."""
    samples: Array
    """Refits, shape (B, P)."""
    spread: float
    """Factor on the refits' deviations."""
    noise: float
    """Standard deviation of one run's ln L."""

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the residuals."""
        return int(self.rows.sum()) - len(self.parameters)


def fit_windows(
    form: Form,
    table: Table,
    masks: Mapping[int, NDArray[np.bool_]],
    start: Array,
    objective: Objective,
    refits: int,
    generator: np.random.Generator,
) -> list[Window]:
    """Fits and refits of every window, each as one batch of the optimiser; the first window gets `refits`, the others
    fewer."""
    x, origins = columns(form, table), list(masks)
    rows = np.array([masks[origin] for origin in origins])
    # A window's optimum may lie in another basin than the whole table's: the other starts can find it.
    starts = np.tile(start, (4, 1))
    theta = len(form.linear)
    starts[1:, theta:] += 0.1 * generator.normal(size=(3, form.size - theta))
    starts = np.repeat(starts, len(rows), axis=0)
    scale, share = np.array(form.scales), rows.mean(axis=1)

    def prior(noise: float, window: NDArray[np.int64], deviates: Array | float = 0.0) -> Prior | None:
        if np.isinf(scale).all():
            return None
        # Weights are scaled to a mean of 1 over all rows, those of no weight too.
        precision = (noise**2 / share[window])[:, None] * scale**-2.0
        return Prior(np.broadcast_to(np.where(np.isinf(scale), 0.0, scale) * deviates, precision.shape), precision)

    each = np.arange(len(rows))
    known = prior(_noise(form, table, rows[0], start), np.tile(each, 4))
    found, values, _ = minimise(
        form, x, table.loss, np.tile(rows, (4, 1)).astype(float), starts, objective, prior=known
    )
    best = values.reshape(4, -1).argmin(axis=0)
    parameters = found.reshape(4, len(rows), -1)[best, np.arange(len(rows))]
    noise = _noise(form, table, rows[0], parameters[0])
    if objective.scale == "log" and np.isfinite(objective.delta):
        # Huber's usual tuning constant for this noise: refits of a nearly L1 objective scatter half as much again.
        objective = Objective("log", max(objective.delta, 1.345 * noise))
        parameters, _, _ = minimise(
            form, x, table.loss, rows.astype(float), parameters, objective, prior=prior(noise, each)
        )
    _, run = np.unique(np.array(table.run), return_inverse=True)
    weights = generator.exponential(size=(max(refits, HELD_REFITS), int(run.max()) + 1))[:, run]
    counts = [refits] + [HELD_REFITS] * (len(rows) - 1)
    batch = np.concatenate([weights[:many] * mask for many, mask in zip(counts, rows, strict=True)])
    # A refit draws the prior's mean, as it draws the weights of the runs (randomised maximum a posteriori).
    deviates = generator.normal(size=(len(batch), len(scale))) if np.isfinite(scale).any() else 0.0
    samples, _, _ = minimise(
        form, x, table.loss, batch, np.repeat(parameters, counts, axis=0), objective, 40,
        prior(noise, np.repeat(each, counts), deviates),
    )  # fmt: skip
    ends = np.split(samples, np.cumsum(counts)[:-1])
    windows = []
    for i, origin in enumerate(origins):
        many = int(rows[i].sum())
        spread = float(np.sqrt(many / (many - form.size)))
        noise = _noise(form, table, rows[i], parameters[i])
        windows.append(Window(origin, rows[i], parameters[i], ends[i], spread, noise))
    return windows


def _noise(form: Form, table: Table, rows: NDArray[np.bool_], parameters: Array) -> float:
    """Standard deviation of one run's ln L, from the median residual."""
    residual = form.log_loss(parameters[None], columns(form, table, rows))[0] - np.log(table.loss[rows])
    # Under a nearly L1 objective, as many residuals as coefficients are near zero whatever the noise.
    return 1.4826 * float(np.median(np.sort(np.abs(residual))[form.size :]))


def columns(form: Form, table: Table, rows: Any = slice(None)) -> dict[str, Array]:
    return {name: table.columns[name][rows] for name in form.needs}


def deviation(refits: Array) -> float:
    """Standard deviation, from quantiles that a few stray refits do not move."""
    low, high = np.percentile(refits, [16, 84])
    return float(high - low) / 2


def held_loss(form: Form, table: Table, window: Window, rows: NDArray[np.bool_], distance: float) -> Held:
    x = columns(form, table, rows)
    predicted, refits = (log_losses(form, p, x).mean(axis=1) for p in (window.parameters[None], window.samples))
    error = float(np.log(table.loss[rows]).mean() - predicted[0])
    std = np.hypot(window.spread * deviation(refits), window.noise / np.sqrt(rows.sum()))
    return Held(window.origin, distance, error, float(std))


def held_size(
    form: Form, table: Table, window: Window, rows: NDArray[np.bool_], distance: float, kind: Kind
) -> Held | None:
    """The error in ln N*, against a parabola of ln L in ln N; None if there are fewer than four sizes, the parabola has
    no minimum among them, or the form models repeated tokens."""
    if "unique" in form.needs:
        return None
    log_n = np.log(table.n[rows])
    if len(np.unique(log_n)) < 4:
        return None
    centre, scale = log_n.mean(), log_n.std()
    design = np.vander((log_n - centre) / scale, 3)
    gram = np.linalg.inv(design.T @ design)
    bend, slope, _ = gram @ design.T @ np.log(table.loss[rows])
    lowest = -slope / (2 * bend)
    if bend <= 0 or not design[:, 1].min() <= lowest <= design[:, 1].max():
        return None
    # Delta method.
    gradient = np.array([slope / (2 * bend**2), -1 / (2 * bend), 0.0])
    seen = scale * window.noise * np.sqrt(gradient @ gram @ gradient)
    budget = float(np.exp(np.log(table.c[rows]).mean()))
    predicted, refits = (
        np.log(optimum(form, p, table, budget, kind).n) for p in (window.parameters[None], window.samples)
    )
    std = float(np.hypot(window.spread * deviation(refits), seen))
    return Held(window.origin, distance, float(centre + scale * lowest - predicted[0]), std)
