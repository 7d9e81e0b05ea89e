"""Pictures of a fitted sweep: isoFLOP curves, frontier, contours, residuals, and the efficiency of experts."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.scaling.allocation import Kind, columns_at, kinds, log_losses
from models.scaling.curves import Curve, compute, curve
from models.scaling.fitting import Fits
from models.scaling.forms.dense import Array
from models.scaling.predictions import Forecast, Frontier
from models.scaling.refusal import Refusal
from models.scaling.table import Table, budgets
from trainer.observe.plots.draw import BLUE, GREY, RED, spread

from .figures import Mark, Panel, Picture, Scale, distinct, number, sequence
from .page import save
from .valleys import POINTS, is_curved, is_dense, known_valleys, lowest, name, parabola

PAGE = "sweep.html"
BEYOND = 3.0
"""Lines extend beyond the table's largest FLOPs by this factor."""
MISSED = 1.01
"""Factor by which a run's FLOPs may differ from the end of a range."""
PANELS, ENTRIES = 3, 9
CONVENTION = {
    "total": "all parameters", "active": "active parameters", "given": "parameters",
    "without_embeddings": "active parameters without embeddings", "with_head": "active parameters without embedding",
}  # fmt: skip
FLOPS: tuple[str, Scale] = ("training FLOPs C", "flops")
LOSS: tuple[str, Scale] = ("loss (nats per token)", "loss")


Group = tuple[str, str, NDArray[np.int64]]
"""Label, colour and rows."""


class Prediction(NamedTuple):
    """What was predicted at a budget, and what a run then reached."""

    c: float
    """FLOPs."""
    loss: float
    low: float
    high: float
    """Ends of the interval."""
    found: float | None = None


def draw(
    fits: Fits, folder: Path, predictions: Sequence[Prediction] = (), forecast: Forecast | None = None
) -> list[Path]:
    """Draw a fitted table.

    Args:
        forecast: what `predictions` were made by; the frontier is then its, and not that of the chosen form.

    Returns:
        The files: isoflop.png, frontier.png, contours.png, residuals.png and, of a table with dense and MoE models,
        efficiency.png, each if the table has what it shows; and sweep.html, all of them interactive. If no form can be
        relied on, only isoflop.png and frontier.png, without lines of a form.
    """
    table = fits.table
    found = kinds(table)
    furthest = max([float(table.c.max()), *(each.c for each in predictions)]) * BEYOND
    c = np.concatenate(
        [np.geomspace(table.c.min(), table.c.max(), POINTS), np.geomspace(table.c.max(), furthest, 9)[1:]]
    )
    expected = _expected(forecast, c)
    if fits.chosen is None:
        runs = (_isoflop(table, found), _frontier(fits, found, (), expected, predictions))
        return save([picture for picture in runs if picture is not None], Path(folder), PAGE)
    best = fits.best
    curves = [curve(best, table, kind, c) for kind in found]
    every = (
        _isoflop(table, found),
        _frontier(fits, found, curves, expected, predictions),
        _contours(fits, found, curves) if {"n", "d"} <= set(best.form.needs) else None,
        _residuals(fits, found),
        _efficiency(fits, found, curves),
    )
    return save([picture for picture in every if picture is not None], Path(folder), PAGE)


def _size(table: Table) -> tuple[str, Scale]:
    return f"{CONVENTION[table.convention]} N", "count"


def _isoflop(table: Table, found: Sequence[Kind]) -> Picture | None:
    """Loss against size, a parabola for each budget, and the line through the valleys."""
    groups, shared = _by_budget(table), budgets(table)
    panels = []
    for kind in spread([kind for kind in found if is_curved(table, kind, shared)], PANELS):
        panel = Panel(_size(table), LOSS, title=name(kind) if len(found) > 1 else "")
        valleys, known = [], known_valleys(table.take(kind.rows))
        for label, colour, of_budget in groups:
            rows = np.intersect1d(kind.rows, of_budget)
            if not len(rows):
                continue
            panel.marks.append(_runs(table, rows, table.n[rows], table.loss[rows], colour, label))
            low = lowest(table, rows, known)
            if low is None:
                valleys.append((np.nan, np.nan))  # the line is broken there
                continue
            valleys.append((low.n, low.loss))
            panel.marks.append(Mark("line", *parabola(table, rows, low), colour))
        n, loss = np.array(valleys).T
        if np.isfinite(n).any():
            panel.marks.append(Mark("line", n, loss, "black", dash=True))
            panel.marks.append(Mark("points", n, loss, "black", "lowest point", marker="D", size=4))
        panels.append(panel)
    caption = "Loss against size at each budget, with the parabola in ln N near the best size and its lowest point."
    return Picture("isoflop", caption, panels, "FLOPs") if panels else None


def _by_budget(table: Table) -> list[Group]:
    """The rows of each budget; of many budgets only some are in the legend."""
    index = budgets(table).level
    colours = sequence(int(index.max()) + 1)
    labelled = set(spread(range(len(colours)), ENTRIES))
    groups = []
    for budget, colour in enumerate(colours):
        rows = np.flatnonzero(index == budget)
        c = float(np.exp(np.log(table.c[rows]).mean()))
        groups.append((number(float(f"{c:.2g}"), "flops") if budget in labelled else "", colour, rows))
    return groups


def _runs(
    table: Table, rows: NDArray[np.int64], x: Array, y: Array, colour: str, label: str = "", size: float = 3.5
) -> Mark:
    """Points of runs, with their names as hover text."""
    text = tuple(f"{table.run[i]}: N {number(table.n[i], 'count')}, D {number(table.d[i], 'count')}" for i in rows)
    return Mark("points", x, y, colour, label, text=text, size=size)


def _expected(forecast: Forecast | None, c: Array) -> dict[int, Frontier]:
    """The predicted frontier of each kind of models, by its number; without those that cannot be predicted."""
    if forecast is None:
        return {}
    found = {}
    for index in range(len(forecast.kinds)):
        with contextlib.suppress(Refusal):
            found[index] = forecast.frontier(c, index)
    return found


def _frontier(
    fits: Fits,
    found: Sequence[Kind],
    curves: Sequence[Curve],
    expected: Mapping[int, Frontier],
    predictions: Sequence[Prediction],
) -> Picture:
    """Loss of every run against its FLOPs, and the frontier with its interval: predicted, or else fitted."""
    table = fits.table
    panel = Panel(FLOPS, LOSS)
    colours = distinct(len(found)) if len(found) > 1 else [GREY]
    for kind, colour in zip(found, colours, strict=True):
        label = name(kind) if len(found) > 1 else "runs"
        panel.marks.append(_runs(table, kind.rows, table.c[kind.rows], table.loss[kind.rows], colour, label, 2.6))
    for index, line in expected.items():
        panel.marks += _predicted(line, colours[index] if len(found) > 1 else BLUE, len(found) == 1)
    for each, colour in zip(curves, colours, strict=True) if curves and not expected else ():
        shade = colour if len(found) > 1 else BLUE
        label = "" if len(found) > 1 else f"{_words(fits)}, 95%"
        panel.marks += _banded(each.c, each.loss, each.loss_samples, shade, label)
    if fits.approach2 and len(found) == 1:
        lows = fits.approach2.valleys
        c, loss = np.array([v.c for v in lows]), np.array([v.loss for v in lows])
        panel.marks.append(Mark("points", c, loss, "black", "lowest point\nof a parabola", marker="D", size=4))
    if predictions:
        c, loss, low, high = (np.array([getattr(p, key) for p in predictions]) for key in ("c", "loss", "low", "high"))
        panel.marks.append(Mark("points", c, loss, RED, "predicted, 95%", low=low, high=high, size=4))
        reached = [each for each in predictions if each.found is not None]
        if reached:
            c, loss = np.array([p.c for p in reached]), np.array([float(p.found or 0) for p in reached])
            panel.marks.append(Mark("points", c, loss, "black", "reached", marker="x", size=5))
    if expected:
        forms = sorted({line.form for line in expected.values()})
        missing = [name(kind) for index, kind in enumerate(found) if index not in expected]
        caption = (
            f"Loss against training FLOPs: all runs, and what `muster sweep predict` gives for a budget, by "
            f"{', '.join(forms)}, with its 95% interval; dashed: beyond the runs that the law is fitted to."
            + (f" No law can be relied on for {', '.join(missing)}." if missing else "")
        )
        return Picture(
            "frontier", caption, [panel], "lines: {}\nbands: 95%".format(",\n".join(forms)) if len(found) > 1 else ""
        )
    if not curves:
        return Picture("frontier", "Loss against training FLOPs: all runs. No form is reliable.", [panel])
    words = f"{_words(fits)} by {fits.chosen}"
    caption = f"Loss against training FLOPs: all runs, and the {words}; bands: 95% of the bootstrap."
    return Picture("frontier", caption, [panel], f"lines: {_words(fits)},\nbands: 95%" if len(found) > 1 else "")


def _predicted(line: Frontier, colour: str, alone: bool) -> list[Mark]:
    """The predicted frontier: solid over the runs that the law is fitted to, dashed where it is extrapolated."""
    first, last = line.fitted
    marks = [Mark("band", line.c, line.loss, colour, "95% interval" if alone else "", low=line.low, high=line.high)]
    inside = (line.c >= first / MISSED) & (line.c <= last * MISSED)
    marks.append(Mark("line", line.c[inside], line.loss[inside], colour, f"best loss by\n{line.form}" if alone else ""))
    before, after = np.flatnonzero(line.c <= first * MISSED), np.flatnonzero(line.c >= last / MISSED)
    marks += [
        Mark("line", line.c[rows], line.loss[rows], colour, "extrapolated", dash=True)
        for rows in (before, after) if len(rows) > 1
    ]  # fmt: skip
    return marks


def _words(fits: Fits) -> str:
    return "compute-optimal loss" if "d" in fits.best.form.needs else "loss at the runs' tokens"


def _banded(c: Array, y: Array, samples: Array, colour: str, label: str = "") -> list[Mark]:
    marks = [Mark("line", c, y, colour, label)]
    if len(samples) and np.isfinite(samples).any(axis=0).all():
        low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
        marks.insert(0, Mark("band", c, y, colour, low=low, high=high))
    return marks


def _contours(fits: Fits, found: Sequence[Kind], curves: Sequence[Curve]) -> Picture:
    """Loss of the chosen form over FLOPs and size, and the size that is best at each budget."""
    table, form = fits.table, fits.best.form
    panels = []
    n_ends = table.n.min() / 1.5, table.n.max() * 2
    for kind, each in spread(list(zip(found, curves, strict=True)), PANELS):
        panel = Panel(FLOPS, _size(table), title=name(kind) if len(found) > 1 else "")
        c, n = np.geomspace(each.c[0] / 1.3, each.c[-1], 120), np.geomspace(*n_ends, 100)
        rows = [columns_at(kind, table, np.log(n), kind.log_tokens(np.log(n), budget)) for budget in c]
        z = np.exp(np.stack([log_losses(form, fits.best.solution.parameters[None], x)[0] for x in rows], axis=1))
        panel.marks.append(Mark("contour", c, n, z=z))
        panel.limits = (float(c[0]), float(c[-1])), (float(n[0]), float(n[-1]))
        panel.marks.append(_runs(table, kind.rows, table.c[kind.rows], table.n[kind.rows], GREY, "runs", 2.6))
        panel.marks += _banded(each.c, each.n, each.n_samples, RED, "best size, 95%")
        if fits.approach2:
            law = fits.approach2.n
            panel.marks.append(
                Mark("line", c, np.array([law.at(float(b)) for b in c]), "black", "approach 2", dash=True)
            )
        panels.append(panel)
    by = fits.chosen
    caption = f"Loss by {by}, over training FLOPs and size, in nats per token, and the best size at each budget."
    return Picture("contours", caption, panels)


def _residuals(fits: Fits, found: Sequence[Kind]) -> Picture:
    """How far runs lie above the fit, against size and FLOPs."""
    table, best = fits.table, fits.best
    fitted = log_losses(best.form, best.solution.parameters[None], {k: table.columns[k] for k in best.form.needs})[0]
    residual = np.log(table.loss) - fitted
    panels = []
    if len(found) > 1:
        groups: list[Group] = [(name(k), shade, k.rows) for k, shade in zip(found, distinct(len(found)), strict=True)]
    else:
        groups = _by_budget(table)
    for axis, values in ((_size(table), table.n), (FLOPS, table.c)):
        panel = Panel(axis, ("ln loss − ln fit", "share"))
        ends = np.array([values.min() / 1.2, values.max() * 1.2])
        width = np.full(2, best.residual)
        panel.marks = [
            Mark("band", ends, 0 * ends, GREY, "root mean square", low=-width, high=width),
            Mark("line", ends, 0 * ends, GREY),
        ]  # fmt: skip
        panel.marks += [_runs(table, rows, values[rows], residual[rows], shade, label) for label, shade, rows in groups]
        panels.append(panel)
    caption = f"Residuals of {fits.chosen}; their root mean square: {best.residual:.2%}."
    return Picture("residuals", caption, panels, "" if len(found) > 1 else "FLOPs")


def _efficiency(fits: Fits, found: Sequence[Kind], curves: Sequence[Curve]) -> Picture | None:
    """C_dense / C: what a dense model would need for a MoE model's loss, over what that took."""
    table = fits.table
    dense = next((kind for kind in found if is_dense(kind)), None)
    if dense is None or len(found) < 2:
        return None
    far = np.geomspace(table.c.min() / 1e2, table.c.max() * 1e4, 3 * POINTS)
    reference = curve(fits.best, table, dense, far)
    index = budgets(table).level
    panel = Panel(FLOPS, ("compute efficiency C(dense) / C", "factor"))
    colours = distinct(len(found))
    for kind, each, colour in zip(found, curves, colours, strict=True):
        if kind is dense:
            continue
        inside = each.c <= table.c.max() * (1 + 1e-9)
        gain = compute(reference.loss, far, each.loss[inside]) / each.c[inside]
        samples = np.array([
            compute(line, far, losses[inside]) / each.c[inside]
            for line, losses in zip(reference.loss_samples, each.loss_samples, strict=True)
        ]).reshape(-1, inside.sum())  # fmt: skip
        panel.marks += _banded(each.c[inside], gain, samples, colour, name(kind))
        best = np.array([
            rows[table.loss[rows].argmin()]
            for b in np.unique(index[kind.rows]) if len(rows := kind.rows[index[kind.rows] == b])
        ])  # fmt: skip
        c = table.c[best]
        panel.marks.append(_runs(table, best, c, compute(reference.loss, far, table.loss[best]) / c, colour, size=3))
    panel.marks.append(
        Mark("line", table.c[[table.c.argmin(), table.c.argmax()]], np.ones(2), GREY, "dense", dash=True)
    )
    caption = ("FLOPs that a dense model needs for the same loss, over the model's own, with 95% of the bootstrap; "
               "points: the best run of each budget against the dense fit.")  # fmt: skip
    return Picture("efficiency", caption, [panel])
