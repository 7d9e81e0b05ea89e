"""The global optimum of a form on a table, and many refits of it at once, in plain numpy.

Given the exponents gamma, a form is linear in its coefficients theta: a grid over gamma with a small non-negative
least-squares problem at each point (variable projection, Golub and Pereyra 1973) shows every basin, and the best of
them are polished together. The polish is Newton's method on the true objective, with the majoriser of iteratively
reweighted least squares where Newton's step does not descend; residuals far over Huber's delta make the objective
nearly L1, where Gauss-Newton alone crawls. Thousands of bootstrap refits are one batch of the same polish.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .dense import Array, Columns, Form
from .newton import FLOOR, HUBER_LOG, Descent, Objective, Prior

TOLERANCE = 1e-6
"""Largest scaled gradient of a converged fit."""
GRID = {1: 96, 2: 28, 3: 14, 4: 8, 5: 6, 6: 4}
"""Points along each gamma."""
BLOCKS = {1: 8, 2: 4, 3: 3, 4: 2, 5: 2, 6: 2}
"""Blocks along each gamma; the best point of each block is polished."""
CANDIDATES = 48
"""Most points of the grid that are polished."""
SMOOTHING = 15
"""Steps on the smoothed objective."""
FINALISTS, PATIENCE = 8, 2000
"""Polished points that descend further if the best has not converged, and their most steps: the kinks of a nearly L1
objective in six exponents can take hundreds."""


@dataclass(frozen=True)
class Solution:
    """The best of all basins."""

    parameters: Array
    """Shape (J + G,)."""
    value: float
    """Of the objective, with weights of mean 1."""
    converged: bool
    gradient: float
    """Largest scaled entry of the gradient, 0 at an optimum."""
    agreeing: int
    """Polished candidates that ended at this optimum."""
    candidates: int
    at_bound: tuple[str, ...]
    """Coefficients at the edge of what is allowed."""


def solve(
    form: Form, x: Columns, loss: Array, objective: Objective = HUBER_LOG, weights: Array | None = None
) -> Solution:
    """Fit a form from scratch: grid, variable projection, polish.

    Args:
        x: the columns that the form needs, each of shape (rows,).
        loss: shape (rows,).
        weights: of the rows; None: all 1.
    """
    weights = np.ones(len(loss)) if weights is None else weights
    starts = _starts(form, x, loss, weights)
    which = np.arange(len(starts))
    every = np.broadcast_to(weights, (len(starts), len(loss)))
    if np.isfinite(objective.delta):
        smooth, _, _ = minimise(form, x, loss, every, starts, _wide(form, x, loss, starts[0], objective), SMOOTHING)
        starts, which = _distinct(np.concatenate([smooth, starts[:8]]))
        every = np.broadcast_to(weights, (len(starts), len(loss)))
    found, values, gradients = minimise(form, x, loss, every, starts, objective)
    best = int(np.argmin(values))
    if gradients[best] >= TOLERANCE:
        last = np.argsort(values)[:FINALISTS]
        found[last], values[last], gradients[last] = minimise(
            form, x, loss, every[last], found[last], objective, PATIENCE
        )
        best = int(np.argmin(values))
    same = values <= values[best] * (1 + 1e-6) + 1e-15
    return Solution(
        parameters=found[best], value=float(values[best]), converged=bool(gradients[best] < TOLERANCE),
        gradient=float(gradients[best]), agreeing=int(same[which].sum()), candidates=len(which),
        at_bound=at_bound(form, x, found[best]),
    )  # fmt: skip


def solve_parts(
    form: Form, x: Columns, loss: Array, parts: NDArray[np.bool_], start: Array, objective: Objective = HUBER_LOG
) -> tuple[Array, Array]:
    """Fit a form to several parts of a table at once, each overlapping the one before, such as growing ones.

    Each starts from the whole table's optimum, from the best points of its own grid, and last from the optima of the
    parts beside it: no fit should end above the one that `solve` finds for the part alone.

    Args:
        parts: rows of each part, shape (K, rows).
        start: the whole table's optimum, shape (J + G,).

    Returns:
        Parameters (K, J + G), and the objective of each, with weights of 1 (K,).
    """
    weights, part = parts.astype(float), np.arange(len(parts))
    grids = []
    for rows in parts:
        some = {key: values[rows] for key, values in x.items()}
        grids.append(_starts(form, some, loss[rows], np.ones(rows.sum())))
    starts, which = np.concatenate(grids), np.repeat(part, [len(each) for each in grids])
    if np.isfinite(objective.delta):
        wide = _wide(form, x, loss, start, objective)
        starts, _, _ = minimise(form, x, loss, weights[which], starts, wide, SMOOTHING)
    both, _ = _distinct(np.column_stack([which, starts]))
    starts = np.concatenate([np.broadcast_to(start, (len(parts), form.size)), both[:, 1:]])
    which = np.concatenate([part, both[:, 0].astype(int)])
    best, value = _best_of_each(form, x, loss, weights, which, starts, objective)
    if len(parts) > 1:
        which, beside = np.concatenate([part, part[1:], part[:-1]]), np.concatenate([best, best[:-1], best[1:]])
        best, value = _best_of_each(form, x, loss, weights, which, beside, objective)
    return best, value * parts.mean(axis=1)


def _best_of_each(
    form: Form, x: Columns, loss: Array, weights: Array, part: NDArray[np.int64], starts: Array, objective: Objective
) -> tuple[Array, Array]:
    """The best end of each part's starts, and the objective there; see `solve_parts`."""
    found, values, gradients = minimise(form, x, loss, weights[part], starts, objective)
    order = np.lexsort([values, part])
    first = np.flatnonzero(np.diff(part[order], prepend=-1))
    slow = [order[k : k + FINALISTS] for k in first if gradients[order[k]] >= TOLERANCE]
    slow = [of_one[part[of_one] == part[of_one[0]]] for of_one in slow]
    if slow:
        last = np.concatenate(slow)
        found[last], values[last], _ = minimise(form, x, loss, weights[part[last]], found[last], objective, PATIENCE)
        order = np.lexsort([values, part])
    return found[order[first]], values[order[first]]


def _distinct(starts: Array) -> tuple[Array, NDArray[np.int64]]:
    """Starts without those that have met another, and the index in it of each."""
    _, first, which = np.unique(starts.round(3), axis=0, return_index=True, return_inverse=True)
    return starts[first], which


def _wide(form: Form, x: Columns, loss: Array, start: Array, objective: Objective) -> Objective:
    """With a Huber delta above most residuals, which smooths away local minima of the nearly L1 objective."""
    scale = np.median(np.abs(form.log_loss(start[None], x)[0] - np.log(loss)))
    unit = 1.0 if objective.scale == "log" else float(np.median(loss))
    return Objective(objective.scale, max(objective.delta, 3 * unit * float(scale)))


def refit(
    form: Form, x: Columns, loss: Array, weights: Array, start: Array, objective: Objective = HUBER_LOG
) -> tuple[Array, NDArray[np.bool_]]:
    """Fit a form once for each row of weights, from the optimum of the whole table.

    Args:
        loss: shape (rows,), or (B, rows) where each refit has losses of its own.
        weights: shape (B, rows), such as how often each row was drawn.
        start: shape (J + G,) or (B, J + G).

    Returns:
        Parameters (B, J + G), and whether each fit converged (B,).
    """
    if np.ndim(start) > 1 or np.ndim(loss) > 1:
        start = np.broadcast_to(start, (len(weights), form.size))
        found, _, gradients = minimise(form, x, loss, weights, start, objective)
        return found, gradients < TOLERANCE
    # Of few runs, many draws are the same.
    distinct, which = np.unique(weights, axis=0, return_inverse=True)
    found, _, gradients = minimise(
        form, x, loss, distinct, np.broadcast_to(start, (len(distinct), form.size)), objective
    )  # fmt: skip
    return found[which], gradients[which] < TOLERANCE


def at_bound(form: Form, x: Columns, parameters: Array) -> tuple[str, ...]:
    """Names of the coefficients at the edge of what is allowed: a term that has vanished, an exponent at its bound."""
    terms = len(form.linear)
    logs = parameters[:terms, None] + form.log_terms(parameters[None, terms:], x)[0]
    shares = (logs - np.logaddexp.reduce(logs, axis=0)).mean(axis=1)
    gone = [name for name, share in zip(form.linear, shares, strict=True) if share < FLOOR / 2]
    edge = [
        name
        for name, value, (low, high) in zip(form.nonlinear, parameters[terms:], form.bounds, strict=True)
        if min(value - low, high - value) < 1e-3 * (high - low)
    ]
    return (*gone, *edge)


def _starts(form: Form, x: Columns, loss: Array, weights: Array) -> Array:
    """Parameter vectors of the best points of the grid, shape (at most CANDIDATES, J + G); robust to outliers."""
    axes = []
    for low, high in form.bounds:
        count = GRID[len(form.bounds)]
        # Positive exponents may have any size and are spaced logarithmically; those that may be negative evenly.
        inner = np.geomspace(low, high, count + 2) if low > 0 else np.linspace(low, high, count + 2)
        axes.append(inner[1:-1])
    gamma = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    robust = weights
    for _ in range(2):
        theta, error = _project(form, gamma, x, loss, robust)
        best = theta[int(np.argmin(error))], gamma[int(np.argmin(error))]
        residual = np.abs(form.log_loss(np.concatenate([np.log(np.maximum(best[0], 1e-300)), best[1]])[None], x)[0]
                          - np.log(loss))  # fmt: skip
        scale = max(float(np.median(residual)), 1e-9)
        robust = weights / np.maximum(1.0, residual / (3 * scale)) ** 2
    chosen = _basins(error, [len(axis) for axis in axes])
    theta, gamma = theta[chosen], gamma[chosen]
    # A coefficient that the projection set to zero starts small, so that the polish can bring it back.
    typical = np.exp(np.median(form.log_terms(gamma, x), axis=-1))
    target = np.exp(np.median(np.log(loss)) / form.power(gamma))[:, None]
    theta = np.maximum(theta, 1e-3 * target / typical)
    return np.concatenate([np.log(theta), gamma], axis=1)


def _basins(error: Array, shape: list[int]) -> NDArray[np.int64]:
    """Indices of the grid's local minima and of the best point in each block of the grid, best first.

    The blocks are there because, with outliers, the basin of the squared error need not be that of the objective.
    """
    grid = np.pad(error.reshape(shape), 1, constant_values=np.inf)
    inner = tuple(slice(1, -1) for _ in shape)
    lowest = np.ones(shape, dtype=bool)
    for axis in range(len(shape)):
        for step in (-1, 1):
            lowest &= grid[inner] <= np.roll(grid, step, axis)[inner]
    order = np.argsort(error)
    blocks = np.zeros(shape, dtype=int)
    for along, count in zip(np.indices(shape), shape, strict=True):
        blocks = blocks * BLOCKS[len(shape)] + along * BLOCKS[len(shape)] // count
    _, first = np.unique(blocks.ravel()[order], return_index=True)
    chosen = lowest.ravel()[order]
    chosen[first] = True
    return order[chosen][:CANDIDATES]


def _project(form: Form, gamma: Array, x: Columns, loss: Array, weights: Array) -> tuple[Array, Array]:
    """The best theta >= 0 for each gamma, by least squares on the relative residual.

    Returns:
        theta (B, J) and the squared error (B,).
    """
    thetas, errors = [], []
    rows = max(1, 2_000_000 // (len(form.linear) * len(loss)))
    for start in range(0, len(gamma), rows):
        part = gamma[start : start + rows]
        target = np.log(loss) / form.power(part)[:, None]
        phi = np.exp(np.minimum(form.log_terms(part, x) - target[:, None], 300.0))
        size = np.sqrt((phi**2 * weights).sum(-1)) + 1e-300
        phi /= size[:, :, None]
        gram, right = (phi * weights) @ phi.transpose(0, 2, 1), phi @ weights
        theta, error = _nonnegative(gram, right, float(weights.sum()))
        # The residual of L itself, not of its root.
        thetas.append(theta / size)
        errors.append(error * form.power(part) ** 2)
    return np.concatenate(thetas), np.concatenate(errors)


def _nonnegative(gram: Array, right: Array, total: float) -> tuple[Array, Array]:
    """min |phi theta - 1|^2 over theta >= 0 for small J, by trying every set of nonzero coefficients."""
    batch, terms = right.shape
    best, error = np.zeros((batch, terms)), np.full(batch, total)
    for count in range(1, terms + 1):
        for chosen in itertools.combinations(range(terms), count):
            index = list(chosen)
            part = gram[:, index][:, :, index] + 1e-13 * np.eye(count)
            theta = np.linalg.solve(part, right[:, index, None])[..., 0]
            value = total - (theta * right[:, index]).sum(-1)
            better = (theta >= 0).all(-1) & (value < error)
            error = np.where(better, value, error)
            full = np.zeros((batch, terms))
            full[:, index] = theta
            best = np.where(better[:, None], full, best)
    return best, np.maximum(error, 0.0)


def minimise(
    form: Form,
    x: Columns,
    loss: Array,
    weights: Array,
    start: Array,
    objective: Objective,
    iterations: int = 200,
    prior: Prior | None = None,
) -> tuple[Array, Array, Array]:
    """Descend from each start to a local optimum.

    Args:
        loss: shape (rows,) or (B, rows).
        weights: shape (B, rows).
        start: shape (B, J + G).
        prior: of gamma, for weights of mean 1.

    Returns:
        Parameters (B, J + G), the objective (B,), and the largest scaled entry of the gradient (B,).
    """
    log_loss = np.broadcast_to(np.log(loss), weights.shape)
    return Descent(form, x, log_loss, weights, objective, prior).run(np.array(start, dtype=float), iterations)
