"""A figure as a list of marks, and how matplotlib draws it for print; `page` draws the same for the screen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from configs.units import short
from models.scaling.forms.dense import Array
from trainer.observe.plots.draw import BLUE, GREEN, ORANGE, RED

Scale = Literal["loss", "count", "flops", "share", "factor"]
"""What an axis holds; "share" (percent around zero) is linear, the others are logarithmic."""
DISTINCT = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9")
HEIGHT, MARGIN = 3.4, 0.03


@dataclass(frozen=True)
class Mark:
    """One line, cloud of points or band on a panel; x and y have the same length."""

    kind: Literal["line", "points", "band", "contour"]
    x: Array
    y: Array
    """For a contour its y axis, so that z has shape (len(y), len(x))."""
    colour: str = "black"
    label: str = ""
    """Legend entry, once per figure; "": none."""
    dash: bool = False
    marker: str = "o"
    size: float = 3.5
    low: Array | None = None
    """Lower and upper end of a band, or of points' error bars."""
    high: Array | None = None
    z: Array | None = None
    text: tuple[str, ...] = ()
    """Hover text of each point."""


@dataclass
class Panel:
    """One pair of axes."""

    x: tuple[str, Scale]
    y: tuple[str, Scale]
    """Label and scale of the axis."""
    marks: list[Mark] = field(default_factory=list)
    title: str = ""
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None
    """Limits of x and y; None: fit all marks. The first panel's y limits apply to all panels."""


@dataclass
class Picture:
    """Panels side by side, with one legend beside them."""

    name: str
    caption: str
    panels: list[Panel]
    legend: str = ""
    """Title of the legend, such as "FLOPs"."""


def sequence(count: int) -> list[str]:
    """Colours whose order colour-blind readers can see, dark to light; the palest are left out."""
    if count < 2:
        return [BLUE][:count]
    return [to_hex(colormaps["viridis"](share)) for share in np.linspace(0.0, 0.88, count)]


def distinct(count: int) -> list[str]:
    """Colours for categories: Okabe and Ito's, or a sequence if those are too few."""
    return list(DISTINCT[:count]) if count <= len(DISTINCT) else sequence(count)


def number(value: float, scale: Scale) -> str:
    """A value as its axis writes it: 300M, $10^{18}$, 2.5, +1%, 4x."""
    if scale == "flops":
        exponent = int(np.floor(np.log10(value) + 1e-9))
        factor = value / 10.0**exponent
        return ("" if abs(factor - 1) < 1e-6 else f"{factor:.3g}×") + f"$10^{{{exponent}}}$"
    if scale == "count":
        return short(value)
    return (
        f"{100 * value:+.3g}%".replace("-", "−")
        if scale == "share" and value
        else f"{value:g}×"
        if scale == "factor"
        else f"{value:g}"
    )


def ticks(low: float, high: float, scale: Scale, most: int = 6) -> list[float]:
    """A few round values between two ends."""
    if scale != "share" and (decades := np.log10(high / low)) > 1:
        first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
        for within in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**e for e in range(first, last + 1) for f in within if low <= f * 10.0**e <= high]
            if len(found) <= most:
                return found
        step = int(np.ceil(decades / most))
        return [10.0**e for e in range(first, last + 1) if e % step == 0 and low <= 10.0**e <= high]
    values = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(round(v, 12)) if abs(v) < 1e6 else float(v) for v in values if low <= v <= high]


def ends_of(picture: Picture) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Ends of x and y of each panel, with a margin: panels side by side share their y."""
    marks = [mark for panel in picture.panels for mark in panel.marks]
    first = picture.panels[0]
    ys = np.concatenate([part for m in marks for part in (m.y, m.low, m.high) if part is not None])
    high = first.limits[1] if first.limits else _ends(ys, first.y[1])
    return [
        (panel.limits[0] if panel.limits else _ends(np.concatenate([m.x for m in panel.marks]), panel.x[1]), high)
        for panel in picture.panels
    ]


def _ends(values: Array, scale: Scale) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    values = values if scale == "share" else np.log(values)
    low, high = float(values.min()), float(values.max())
    margin = MARGIN * (high - low) or 0.1
    ends = low - margin, high + margin
    return ends if scale == "share" else (float(np.exp(ends[0])), float(np.exp(ends[1])))


def paper(picture: Picture) -> Figure:
    """The picture, drawn by matplotlib."""
    count = len(picture.panels)
    figure = Figure(figsize=(1.6 + max(4.2, 2.7 * count), HEIGHT))
    shown: dict[str, Any] = {}
    every = figure.subplots(1, count, squeeze=False)[0]
    for i, (panel, axes, limits) in enumerate(zip(picture.panels, every, ends_of(picture), strict=True)):
        axes.set(xscale=_scale(panel.x[1]), yscale=_scale(panel.y[1]), xlim=limits[0], ylim=limits[1])
        axes.set(xlabel=panel.x[0], ylabel="" if i else panel.y[0], title=panel.title)
        few = 6 if count == 1 else 4  # labels of narrow panels would overlap
        for axis, scale, ends, most in (
            (axes.xaxis, panel.x[1], limits[0], few),
            (axes.yaxis, panel.y[1], limits[1], 6),
        ):
            at = ticks(*ends, scale, most)
            axis.set_major_locator(FixedLocator(at))
            axis.set_minor_locator(NullLocator())
            axis.set_ticklabels([number(value, scale) for value in at])
        axes.tick_params(labelleft=i == 0)
        for mark in panel.marks:
            handle = _PAPER[mark.kind](axes, mark)
            if mark.label:
                shown.setdefault(mark.label, handle)
    if shown:
        figure.set_figheight(max(HEIGHT, 0.6 + 0.19 * len(shown)))
        figure.legend(
            list(shown.values()), list(shown), loc="outside right upper", title=picture.legend or None,
            title_fontsize=8, alignment="left",
        )  # fmt: skip
    return figure


def _scale(scale: Scale) -> str:
    return "linear" if scale == "share" else "log"


def _line(axes: Axes, mark: Mark) -> Any:
    return axes.plot(mark.x, mark.y, color=mark.colour, linestyle="--" if mark.dash else "-", zorder=3)[0]


def _points(axes: Axes, mark: Mark) -> Any:
    if mark.low is not None and mark.high is not None:
        axes.vlines(mark.x, mark.low, mark.high, color=mark.colour, linewidth=1, zorder=4)
    return axes.plot(
        mark.x, mark.y, linestyle="none", marker=mark.marker, markersize=mark.size, color=mark.colour, zorder=4,
        markeredgecolor=mark.colour if mark.marker == "x" else "white",
        markeredgewidth=1.3 if mark.marker == "x" else 0.3,
    )[0]  # fmt: skip


def _band(axes: Axes, mark: Mark) -> Any:
    assert mark.low is not None
    assert mark.high is not None
    return axes.fill_between(mark.x, mark.low, mark.high, color=mark.colour, alpha=0.2, linewidth=0)


def _contour(axes: Axes, mark: Mark) -> Any:
    assert mark.z is not None
    levels = contour_levels(mark.z)
    if not levels:  # a form that is flat here
        return None
    drawn = axes.contour(mark.x, mark.y, mark.z, levels=levels, colors=sequence(len(levels)), linewidths=0.9)
    axes.clabel(drawn, fmt=lambda level: f"{level:g}", fontsize=7)
    return drawn


_PAPER: dict[str, Callable[[Axes, Mark], Any]] = {
    "line": _line, "points": _points, "band": _band, "contour": _contour,
}  # fmt: skip


def contour_levels(z: Array) -> list[float]:
    """About a dozen round levels, evenly spaced in the loss, from the lowest up to where most of the map lies."""
    low, high = np.nanmin(z), np.nanpercentile(z, 70)
    return [float(v) for v in MaxNLocator(12, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low < v < high]
