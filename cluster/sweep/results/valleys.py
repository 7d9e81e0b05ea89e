"""The isoFLOP curves of a table: which kinds of models have them, the lowest point of each budget, and its parabola."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.scaling.allocation import Kind
from models.scaling.forms.dense import Array
from models.scaling.isoflop import Valley, approach2, valley
from models.scaling.refusal import Refusal
from models.scaling.table import Budgets, Table

POINTS = 40
"""Points along a line: more would not be visible."""


def name(kind: Kind) -> str:
    """The name of a kind: dense, or 8 experts, top 2."""
    if is_dense(kind):
        return "dense"
    words = {"experts": "{:g} experts", "top_k": "top {:g}", "granularity": "G = {:g}", "active_ratio": "{:.3g} active"}
    shape = {key: value for key, value in kind.shape.items() if np.isfinite(value)}
    if "experts" in shape and "top_k" in shape:
        shape.pop("active_ratio", None)  # follows from the two
    return ", ".join(words[key].format(value) for key, value in shape.items()) or "runs"


def is_dense(kind: Kind) -> bool:
    return kind.shape.get("experts", kind.shape.get("active_ratio", 0.0)) == 1.0


def is_curved(table: Table, kind: Kind, found: Budgets) -> bool:
    """Whether some common budget has three sizes of a kind."""
    index = found.level
    return found.common and any(
        len(np.unique(table.n[kind.rows[index[kind.rows] == b]])) > 2 for b in np.unique(index[kind.rows])
    )


def known_valleys(table: Table) -> tuple[Valley, ...]:
    """The valleys that approach 2 finds; none if there are too few budgets for it."""
    try:
        return approach2(table).valleys
    except Refusal:
        return ()


def lowest(table: Table, rows: NDArray[np.int64], known: Sequence[Valley]) -> Valley | None:
    """The valley of one budget's rows: among `known`, or fitted to the rows alone if none are known."""
    c, n, d, loss = (getattr(table, key)[rows] for key in ("c", "n", "d", "loss"))
    if known:
        near = min(known, key=lambda each: abs(np.log(c).mean() - np.log(each.c)))
        return near if abs(np.log(c).mean() - np.log(near.c)) < 0.05 else None
    try:
        return valley(c, n, d, loss)
    except Refusal:
        return None


def parabola(table: Table, rows: NDArray[np.int64], low: Valley) -> tuple[Array, Array]:
    """N and loss along a valley's parabola, over the sizes that it was fitted to: those nearest to the best one."""
    log_n = np.log(table.n[rows])
    best = log_n[table.loss[rows].argmin()]
    x = log_n[np.argsort(np.abs(log_n - best), kind="stable")[: low.rows]]
    x = np.linspace(x.min(), x.max(), POINTS)
    return np.exp(x), low.loss + low.curvature / 2 * (x - np.log(low.n)) ** 2
