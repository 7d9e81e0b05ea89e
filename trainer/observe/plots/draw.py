"""Shared by the plots of a run: their style, and turning a column of the record into a line on an axis."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
STYLE: Any = {
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Records = Sequence[dict[str, Any]]


@contextmanager
def own_style() -> Iterator[None]:
    """STYLE over matplotlib's own defaults: a `matplotlibrc` in the working directory could make it run LaTeX."""
    with style.context(["default", STYLE]):
        yield


def legend(axes: Axes) -> None:
    if axes.child_axes:  # the second axis takes the legend's place
        axes.legend(loc="upper right")
    else:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=4)


def log_scale(axes: Axes) -> None:
    if not any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def column(records: Records, key: str) -> np.ndarray:
    """Values of a key as floats; NaN where it is absent or null."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a window of about a fortieth of the points; NaNs are left out."""
    half = len(values) // 80
    finite = np.isfinite(values)
    window = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, values, 0.0), window)[half : half + len(values)]
    count = np.convolve(finite.astype(float), window)[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def robust_limits(axes: Axes, values: np.ndarray) -> None:
    """From zero to somewhat above the 99th percentile: the first step, which compiles, would flatten the rest."""
    finite = values[np.isfinite(values)]
    if len(finite):
        axes.set_ylim(0, 1.25 * np.percentile(finite, 99) if len(finite) > 20 else None)


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
