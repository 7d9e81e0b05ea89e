"""Experts that are hardly chosen any more: which, for how many steps, and when that counts as a collapse."""

from collections.abc import Sequence

import numpy as np

from models.tasks.task import Change

STARVED = 0.01
"""Fraction of an even share below which an expert is starved. Loads of a healthy router vary within about a factor of
two, even with weak balancing, and an expert that learns from a hundredth of its tokens falls further behind."""
COLLAPSED = 100
"""Steps in a row after which a starved expert has collapsed. At the start of training experts can go unused for some
steps, and small batches leave one without a token now and then; a hundred steps in a row are neither."""

Starved = list[list[int]]
"""For how many steps in a row each expert has been starved, [MoE layers][experts]."""


def after_step(starved: Starved, load: Sequence[Sequence[float]]) -> tuple[Starved, list[Change]]:
    """Count one more step.

    Args:
        starved: before it; empty before the first.
        load: each expert's share of the assignments over the whole global batch, [MoE layers][experts].

    Returns:
        the counts after it, and what is to be recorded: `experts_collapsed` and `experts_recovered`, each with the
        experts by the number of the MoE layer (from 0, as in `expert_load`), and `collapsed`, how many there are in the
        whole model after this step.
    """
    if not load:
        return [], []
    load_LE = np.asarray(load)
    before_LE = np.asarray(starved) if starved else np.zeros(load_LE.shape, int)
    low_LE = load_LE * load_LE.shape[1] < STARVED
    now_LE = np.where(low_LE, before_LE + 1, 0)
    collapsed = int((now_LE >= COLLAPSED).sum())
    changes = [
        Change(event, {"experts": _by_layer(which_LE), "collapsed": collapsed})
        for event, which_LE in (
            ("experts_collapsed", now_LE == COLLAPSED),
            ("experts_recovered", (before_LE >= COLLAPSED) & ~low_LE),
        )
        if which_LE.any()
    ]
    return now_LE.tolist(), changes


def _by_layer(which_LE: np.ndarray) -> dict[str, list[int]]:
    return {str(layer): np.flatnonzero(row_E).tolist() for layer, row_E in enumerate(which_LE) if row_E.any()}
