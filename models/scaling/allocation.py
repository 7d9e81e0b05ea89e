"""Compute-optimal allocation by a fitted form: the lowest loss of a budget, and the size and tokens that reach it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .forms.dense import Array, Columns, Form
from .table import Table

RANGE, POINTS = np.log(1e4), 400
"""The optimum is searched within about this factor of the table's sizes, first on a grid of this many sizes, then
between them."""
SHAPE = ("experts", "top_k", "granularity", "active_ratio")
"""Columns that distinguish kinds of models."""


class Kind(NamedTuple):
    """Models of one kind (dense, or with a given number of experts), and their cost per token.

    ln(C / (N D)) is a polynomial in ln N, fitted to the table's rows: ln 6 if C is 6 N D, and more if exact FLOPs
    include attention and the head.
    """

    shape: dict[str, float]
    cost: NDArray[np.float64]
    rows: NDArray[np.int64]
    unique: float = np.inf
    """Unique tokens available; a model trained on more repeats them."""

    def log_tokens(self, log_n: Array, budget: float) -> Array:
        """ln D that spends a budget at sizes N."""
        return np.log(budget) - log_n - np.polyval(self.cost, log_n)


@dataclass(frozen=True)
class Optimum:
    """Compute-optimal choices, one for each parameter vector: arrays of shape (B,)."""

    n: Array
    d: Array
    loss: Array
    shape: dict[str, float]


def kinds(table: Table) -> list[Kind]:
    """The kinds of models in a table."""
    names = [name for name in SHAPE if name in table.extra]
    keys = np.stack([table.extra[name] for name in names], axis=1) if names else np.zeros((len(table), 1))
    found = []
    for key in np.unique(keys, axis=0):
        rows = np.flatnonzero((keys == key).all(axis=1))
        log_n, ratio = np.log(table.n[rows]), np.log(table.c[rows] / (table.n[rows] * table.d[rows]))
        sizes = len(np.unique(table.n[rows]))
        # A constant cost is not fitted to noise; for extrapolation a line is safer than a parabola.
        degree = 0 if np.ptp(ratio) < 1e-3 or sizes < 2 else 1
        found.append(Kind(dict(zip(names, key.tolist(), strict=False)), np.polyfit(log_n, ratio, degree), rows))
    return found


def repeats(table: Table) -> NDArray[np.bool_]:
    """Which runs repeat some of their tokens, shape (rows,)."""
    unique = table.extra.get("unique")
    return np.zeros(len(table), dtype=bool) if unique is None else table.d > 1.01 * unique


def columns_at(kind: Kind, table: Table, log_n: Array, log_d: Array) -> dict[str, Array]:
    """Columns of hypothetical models of a kind, each of shape (points,)."""
    n, d = np.exp(log_n), np.exp(log_d)
    c = np.exp(log_n + log_d + np.polyval(kind.cost, log_n))
    others = {name: np.full_like(n, value) for name, value in kind.shape.items()}
    if "unique" in table.extra:
        others["unique"] = np.minimum(d, kind.unique)
    return {"n": n, "d": d, "c": c} | others


def optimum(form: Form, parameters: Array, table: Table, budget: float, kind: Kind) -> Optimum:
    """The size that reaches the lowest loss at a budget, for each parameter vector.

    Args:
        parameters: shape (B, J + G).
        budget: training FLOPs.
    """
    sizes = np.log(table.n[kind.rows] if len(kind.rows) else table.n)
    log_n = np.linspace(sizes.min() - RANGE / 2, sizes.max() + RANGE, POINTS)
    losses = log_losses(form, parameters, columns_at(kind, table, log_n, kind.log_tokens(log_n, budget)))
    best = np.clip(losses.argmin(axis=1), 1, POINTS - 2)
    every = np.arange(len(parameters))
    left, middle, right = (losses[every, best + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    shift = np.clip(shift, -1, 1)
    at = log_n[best] + shift * (log_n[1] - log_n[0])
    loss = middle - 0.25 * (left - right) * shift
    return Optimum(np.exp(at), np.exp(kind.log_tokens(at, budget)), np.exp(loss), kind.shape)


def log_losses(form: Form, parameters: Array, x: Columns) -> Array:
    """ln L, shape (B, points), computed in parts to limit memory."""
    rows = max(1, 1_000_000 // (len(form.linear) * len(next(iter(x.values())))))
    return np.concatenate([form.log_loss(parameters[i : i + rows], x) for i in range(0, len(parameters), rows)])
