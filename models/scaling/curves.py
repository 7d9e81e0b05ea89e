"""Curves of a fitted form: the lowest loss against FLOPs for each kind of model, and the FLOPs that reach a loss."""

from typing import NamedTuple

import numpy as np

from .allocation import Kind, columns_at, log_losses, optimum
from .fitting import Fit
from .forms.dense import Array
from .table import Table

SAMPLES = 300
"""Number of bootstrap refits that a band is drawn from."""


class Curve(NamedTuple):
    """Loss of a kind of models against FLOPs, shape (budgets,); samples of shape (refits, budgets)."""

    c: Array
    n: Array
    loss: Array
    n_samples: Array
    loss_samples: Array


def curve(fit: Fit, table: Table, kind: Kind, c: Array) -> Curve:
    """The lowest loss at each budget; for a form without tokens, the loss at the median tokens of the kind's runs."""
    parameters = np.concatenate([fit.solution.parameters[None], fit.samples[:SAMPLES]])
    if "d" in fit.form.needs:
        found = [optimum(fit.form, parameters, table, float(budget), kind) for budget in c]
        n, loss = np.stack([each.n for each in found], 1), np.stack([each.loss for each in found], 1)
    else:
        # ln C = ln N + ln D + cost(ln N), and cost is a line in ln N.
        log_d = np.log(np.median(table.d[kind.rows]))
        slope, level = np.pad(kind.cost, (2 - len(kind.cost), 0))
        log_n = (np.log(c) - log_d - level) / (1 + slope)
        x = columns_at(kind, table, log_n, np.full_like(log_n, log_d))
        loss = np.exp(log_losses(fit.form, parameters, x))
        n = np.broadcast_to(np.exp(log_n), loss.shape)
    return Curve(c, n[0], loss[0], n[1:], loss[1:])


def compute(losses: Array, c: Array, reached: Array) -> Array:
    """FLOPs at which a falling curve of losses over c reaches the given losses; NaN outside it."""
    falling = np.minimum.accumulate(losses)
    return np.exp(np.interp(-np.log(reached), -np.log(falling), np.log(c), left=np.nan, right=np.nan))
