"""Approaches 1 and 2: the best size of each budget, and how it grows with the budget."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from configs import counted

from .forms.dense import Array, Columns, Monomials
from .forms.newton import Objective
from .forms.solve import solve
from .refusal import Refusal
from .table import Table, budgets

WINDOWS = (2.0, 3.0, 4.0, 10.0)
"""A parabola is fitted to sizes within one of these factors of the best: narrow suits skewed valleys, wide noise."""


class Frontier(Monomials):
    """L_opt = E + K / C^gamma."""

    name = "frontier"
    source = "the compute-optimal frontier of Hoffmann et al., arXiv:2203.15556"
    needs = ("c",)
    linear = ("E", "K")
    nonlinear = ("gamma",)
    bounds = ((0.01, 1.0),)

    def exponents(self, x: Columns) -> Array:
        z = np.zeros((2, 1, len(x["c"])))
        z[1, 0] = -np.log(x["c"])
        return z


@dataclass(frozen=True)
class Valley:
    """The parabola of one budget."""

    c: float
    """FLOPs."""
    n: float
    """Parameters at the lowest point."""
    d: float
    """Tokens there."""
    loss: float
    std: float
    """Standard error of ln n."""
    curvature: float
    """Of the loss in ln n, positive."""
    rows: int


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * C^exponent."""

    factor: float
    exponent: float
    std: float
    """Standard error of the exponent."""

    def at(self, c: float) -> float:
        return float(self.factor * c**self.exponent)


@dataclass(frozen=True)
class Approach2:
    """Parabolas of the budgets, and power laws through their lowest points."""

    valleys: tuple[Valley, ...]
    refused: tuple[Refusal, ...]
    """Budgets without a usable parabola."""
    n: PowerLaw
    d: PowerLaw
    frontier: dict[str, float] | None
    """E, K, gamma; None: fewer than four budgets."""

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "a": self.n.exponent, "a_std": self.n.std, "b": self.d.exponent, "b_std": self.d.std,
            "N_factor": self.n.factor, "D_factor": self.d.factor, "frontier": self.frontier,
            "valleys": [{key: getattr(v, key) for key in ("c", "n", "d", "loss", "std", "rows")} for v in self.valleys],
            "refused": [{"kind": each.kind, "why": str(each)} for each in self.refused],
        }  # fmt: skip


def valley(c: Array, n: Array, d: Array, loss: Array, window: float = WINDOWS[-1]) -> Valley:
    """The parabola of loss in ln n through the runs of one budget within a factor `window` of its best size.

    Raises:
        Refusal: fewer than three sizes, a concave parabola, or a lowest point outside the sizes.
    """
    budget = float(np.exp(np.mean(np.log(c))))
    where = f"budget {budget:.3g}"
    if len(np.unique(n)) < 3:
        raise Refusal("few_sizes", f"{where}: {counted(len(np.unique(n)), 'size')}, but a parabola needs 3")
    centre = np.log(n[np.argmin(loss)])
    near = np.abs(np.log(n) - centre) <= np.log(window) + 1e-9
    if len(np.unique(n[near])) < 3:
        near = np.isin(n, np.unique(n)[np.argsort(np.abs(np.log(np.unique(n)) - centre))[:3]])
    x, y = np.log(n[near]) - centre, loss[near]
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    gram = np.linalg.pinv(design.T @ design)
    beta = gram @ (design.T @ y)
    if beta[2] <= 0:
        raise Refusal("concave", f"{where}: the loss is concave in ln N: add sizes or seeds to find its valley")
    low = -beta[1] / (2 * beta[2])
    if not x.min() < low < x.max():
        end = "smallest" if low <= x.min() else "largest"
        raise Refusal("edge", f"{where}: the lowest loss lies beyond the {end} size ({np.exp(centre):.3g})")
    spare = int(near.sum()) - 3
    residual = y - design @ beta
    variance = float(residual @ residual) / spare if spare > 0 else np.nan
    # d low / d beta, by the delta method.
    slope = np.array([0.0, -1 / (2 * beta[2]), beta[1] / (2 * beta[2] ** 2)])
    std = float(np.sqrt(slope @ gram @ slope * variance))
    tokens = np.polyval(np.polyfit(np.log(n), np.log(d), min(2, len(np.unique(n)) - 1)), low + centre)
    at = float(beta[0] + beta[1] * low + beta[2] * low**2)
    return Valley(
        budget, float(np.exp(low + centre)), float(np.exp(tokens)), at, std, float(2 * beta[2]), int(near.sum())
    )


def power_law(c: Array, y: Array, std: Array | None = None) -> PowerLaw:
    """Weighted least squares of ln y on ln c, weights 1 / std^2.

    Args:
        std: standard errors of ln y; None: all equal.
    """
    weights = np.ones(len(c)) if std is None else 1 / std**2
    design = np.stack([np.ones(len(c)), np.log(c)], axis=1)
    gram = np.linalg.inv((design * weights[:, None]).T @ design)
    beta = gram @ (design.T @ (weights * np.log(y)))
    residual = np.log(y) - design @ beta
    variance = float(weights @ residual**2) / (len(c) - 2) if len(c) > 2 else np.nan
    return PowerLaw(float(np.exp(beta[0])), float(beta[1]), float(np.sqrt(variance * gram[1, 1])))


def approach2(table: Table) -> Approach2:
    """Hoffmann et al.'s second approach: a parabola for each budget, and power laws through their lowest points.

    Of the WINDOWS that lose the fewest budgets, it uses the one whose ln N* scatter least about their power law.

    Raises:
        Refusal: fewer than three budgets have a usable parabola, or the runs share no budgets.
    """
    _require_common(table, "approach 2")
    tried = [_valleys(table, window) for window in WINDOWS]
    most = max(len(valleys) for valleys, _ in tried)
    full = [each for each in tried if len(each[0]) == most]

    def scatter(each: tuple[list[Valley], list[Refusal]]) -> float:
        c, n = (np.log([getattr(valley, key) for valley in each[0]]) for key in ("c", "n"))
        return float(np.std(n - np.polyval(np.polyfit(c, n, 1), c)))

    valleys, refused = min(full, key=scatter) if most > 2 else full[-1]
    if len(valleys) < 3:
        raise Refusal(
            "few_budgets",
            f"approach 2: {len(valleys)} of {len(valleys) + len(refused)} budgets have a valley in N, but it needs "
            "3" + "".join(f"\n{refusal}" for refusal in refused[:2]),
        )
    c, n, d, loss = (np.array([getattr(each, key) for each in valleys]) for key in ("c", "n", "d", "loss"))
    frontier = None
    if len(valleys) >= 4:
        form = Frontier()
        found = solve(form, {"c": c}, loss, Objective("log", 1e-3))
        frontier = form.coefficients(found.parameters)
    std = np.array([each.std for each in valleys])
    known = np.isfinite(std).all() and (std > 0).all()
    # A valley's standard error is itself uncertain: none weighs more than ten times the median.
    std = np.clip(std, np.median(std) / 3.2, None) if known else np.ones(len(std))
    return Approach2(tuple(valleys), tuple(refused), power_law(c, n, std), power_law(c, d, std), frontier)


def _valleys(table: Table, window: float) -> tuple[list[Valley], list[Refusal]]:
    index, _ = budgets(table)
    valleys, refused = [], []
    for budget in range(int(index.max()) + 1):
        rows = index == budget
        try:
            valleys.append(valley(table.c[rows], table.n[rows], table.d[rows], table.loss[rows], window))
        except Refusal as refusal:
            refused.append(refusal)
    return valleys, refused


def approach1(table: Table) -> tuple[PowerLaw, PowerLaw]:
    """Hoffmann et al.'s first approach: the best run at each budget, and power laws of its N and D.

    Args:
        table: finished runs, or points of loss curves with the FLOPs spent up to there.

    Raises:
        Refusal: fewer than three budgets whose best size has smaller and larger ones beside it, or the runs share no
            budgets.
    """
    _require_common(table, "approach 1")
    index, _ = budgets(table)
    every = [np.flatnonzero(index == b) for b in range(int(index.max()) + 1)]
    best = [
        low for rows in every
        if table.n[rows].min() < table.n[low := rows[table.loss[rows].argmin()]] < table.n[rows].max()
    ]  # fmt: skip
    if len(best) < 3:
        raise Refusal(
            "few_budgets",
            f"approach 1: {len(best)} of {len(every)} budgets have their lowest loss between two sizes, but a "
            "power law needs 3",
        )
    return power_law(table.c[best], table.n[best]), power_law(table.c[best], table.d[best])


def _require_common(table: Table, what: str) -> None:
    if not budgets(table).common:
        raise Refusal("few_budgets", f"{what}: it compares runs of the same budget, but these runs share none")


def best_approach1(table: Table, curves: Table | None) -> tuple[tuple[PowerLaw, PowerLaw], str]:
    """Approach 1 from final losses, which are lower than those in mid-run, else from loss curves; and which it was.

    Raises:
        Refusal: as `approach1`.
    """
    try:
        return approach1(table), "final losses"
    except Refusal:
        if curves is None or not len(curves):
            raise
        return approach1(curves), "loss curves"
