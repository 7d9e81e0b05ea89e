"""Plots of a MoE run: which experts the tokens go to, and how the routers behave.

Shapes: S records, L MoE layers, E experts.
"""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from models.moe.collapse import STARVED

from .draw import BLUE, GREEN, ORANGE, RED, Records, column, legend, log_scale, smooth

COLUMNS = 600
"""Columns of a heat map; each averages the steps that it covers."""
LAYERS = 6
"""Layers with a panel of their own; of a deeper model, the first, the last and the least balanced at the end."""
NUMBERED = 128
"""A map of at most this many cells shows the value in each."""
WIDEST = 4.0
"""The colours span this many times an even share, down to its inverse."""


def expert_load(train: Records) -> Figure | None:
    """Load of every expert over steps, one panel per layer; None if no expert loads are recorded."""
    records = _with_load(train)
    if not records:
        return None
    groups = [group for group in np.array_split(np.arange(len(records)), COLUMNS) if len(group)]
    steps = column(records, "step")
    step = np.array([steps[group].mean() for group in groups])
    relative_SLE = np.array([_relative([records[i] for i in group]) for group in groups])
    layers = _worth_seeing(relative_SLE[-max(len(step) // 10, 1) :].mean(0))
    figure = Figure(figsize=(6.5, 1.2 + 1.1 * len(layers)))
    panels = figure.subplots(len(layers), sharex=True, squeeze=False)[:, 0]
    edges = np.concatenate([step[:1] - 0.5, (step[1:] + step[:-1]) / 2, step[-1:] + 0.5])
    experts = np.arange(relative_SLE.shape[2] + 1) - 0.5
    for panel, layer in zip(panels, layers, strict=True):
        _heat(panel, edges, experts, relative_SLE[:, layer].T)
        panel.set_ylabel(f"MoE layer {layer}\nexpert")
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[-1].set_xlabel("step")
    _scale(figure, list(panels), relative_SLE[:, layers])
    return figure


def expert_map(train: Records) -> Figure | None:
    """All layers and experts at the beginning, in the middle and at the end; None if no expert loads are recorded."""
    records = _with_load(train)
    if not records:
        return None
    length = -(-len(records) // 10)
    starts = sorted({0, (len(records) - length) // 2, len(records) - length})
    windows = [records[start : start + length] for start in starts]
    relative = [_relative(window) for window in windows]
    layers, experts = relative[0].shape
    figure = Figure(figsize=(6.5, 1.0 + len(windows) * (0.5 + np.clip(0.2 * layers, 0.4, 2.2))))
    panels = figure.subplots(len(windows), sharex=True, squeeze=False)[:, 0]
    for panel, window, values_LE in zip(panels, windows, relative, strict=True):
        _heat(panel, np.arange(experts + 1) - 0.5, np.arange(layers + 1) - 0.5, values_LE)
        panel.set_label("<no steps>")
        first, last = window[0]["step"], window[-1]["step"]
        panel.set_title(f"step {first}" if first == last else f"mean over steps {first} to {last}", loc="left")
        panel.set_ylabel("MoE layer")
        panel.invert_yaxis()
        panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        if values_LE.size <= NUMBERED:
            for (layer, expert), value in np.ndenumerate(values_LE):
                if np.isfinite(value):
                    dark = value < STARVED or abs(np.log(value)) > np.log(0.6 * WIDEST)
                    panel.text(
                        expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=6,
                        color="white" if dark else "black",
                    )  # fmt: skip
    panels[-1].set_xlabel("expert")
    _scale(figure, list(panels), np.array(relative))
    return figure


def routers(train: Records, events: Records) -> Figure | None:
    """The routers' balance and confidence over steps, mean and worst layer; None if no expert loads are recorded."""
    records = _with_load(train)
    if not records:
        return None
    step = column(records, "step")
    load_SLE = np.array([record["expert_load"] for record in records])
    experts = load_SLE.shape[2]
    shown: list[tuple[str, np.ndarray, Any]] = [
        ("MaxVio\n(max / even − 1)", load_SLE.max(2) * experts - 1, np.max),
        ("experts without\na token", (load_SLE == 0).sum(2).astype(float), np.max),
        ("entropy / ln E", _by_layer(records, "router_entropy") / np.log(max(experts, 2)), np.min),
        ("confidence\n(largest score)", _by_layer(records, "router_confidence"), np.max),
        ("dropped (%)", 100 * _by_layer(records, "dropped"), np.max),
    ]
    shown = [panel for i, panel in enumerate(shown) if i < 2 or np.nansum(panel[1]) > 0]
    figure = Figure(figsize=(6.5, 0.8 + 1.25 * len(shown)))
    panels = figure.subplots(len(shown), sharex=True)
    for panel, (label, values_SL, worst) in zip(panels, shown, strict=True):
        for name, colour, values_S in (
            ("worst layer", ORANGE, worst(values_SL, axis=1)),
            ("mean over layers", BLUE, values_SL.mean(1)),
        ):
            panel.plot(step, values_S, color=colour, alpha=0.3, linewidth=0.6)
            panel.plot(step, smooth(values_S), color=colour, label=name)
        panel.set_ylabel(label)
    for panel in panels[1:]:
        panel.set_ylim(0, None)
    for name, marker, colour in (("experts_collapsed", "v", RED), ("experts_recovered", "^", GREEN)):
        if steps := [event["step"] for event in events if event["event"] == name]:
            panels[1].plot(
                steps, [0.06] * len(steps), marker, color=colour, markersize=4, label=name.partition("_")[2],
                transform=panels[1].get_xaxis_transform(),
            )  # fmt: skip
            legend(panels[1])
    panels[-1].set_xlabel("step")
    log_scale(panels[0])
    legend(panels[0])
    return figure


def _with_load(train: Records) -> Records:
    return [record for record in train if record.get("expert_load") is not None and len(record["expert_load"])]


def _relative(records: Records) -> np.ndarray:
    """Mean load over these records, [L, E], relative to an even share."""
    load_LE = np.mean([record["expert_load"] for record in records], axis=0)
    return load_LE * load_LE.shape[1]


def _worth_seeing(relative_LE: np.ndarray) -> list[int]:
    """At most `LAYERS` layers, chosen as said there; a starved expert weighs more than any other imbalance."""
    last = len(relative_LE) - 1
    least_even = np.lexsort((-relative_LE.var(1), -(relative_LE < STARVED).sum(1))).tolist()
    inner = [layer for layer in least_even if layer not in (0, last)]
    return sorted({0, last, *inner[: LAYERS - 2]})


def _by_layer(records: Records, key: str) -> np.ndarray:
    """Values of a key, [S, L]; NaN in records without it."""
    layers = len(records[0]["expert_load"])
    return np.array([record.get(key) or [None] * layers for record in records], float)


def _heat(axes: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray) -> None:
    """Red: more than an even share, blue: less, white: even, black: starved, see `models.moe.collapse`."""
    cmap = colormaps["RdBu_r"].with_extremes(bad="black")
    shown = np.ma.masked_where(values < STARVED, values)
    axes.pcolormesh(x, y, shown, cmap=cmap, norm=LogNorm(1 / WIDEST, WIDEST), rasterized=True)
    axes.grid(False)


def _scale(figure: Figure, panels: list[Axes], values: np.ndarray) -> None:
    mesh = panels[0].collections[0]
    bar = figure.colorbar(mesh, ax=panels, extend="both", ticks=[0.25, 0.5, 1, 2, 4], shrink=0.8, aspect=30)
    bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])
    bar.ax.minorticks_off()
    bar.set_label("share of tokens / even share")
    if (values < STARVED).any():
        starved = Patch(color="black", label=f"under {STARVED:.0%} of an even share")
        figure.legend(handles=[starved], loc="outside lower right")
