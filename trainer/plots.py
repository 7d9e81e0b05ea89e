"""The record of a run as pictures: loss, optimizer, throughput and expert load."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .record import Line, MetricsIndex, read_events

POINTS = 3000
"""Steps drawn of a longer run, evenly spaced: more than a page has dots."""
COLUMNS = 600
"""Of a heat map: steps between are averaged."""
LAYERS = 6
"""Layers drawn of a deeper model, evenly spaced."""
# Okabe and Ito's palette, which colour-blind readers tell apart.
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


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw what the record holds into RUN_DIR/plots.

    Returns:
        The files: loss.png, optimizer.png, throughput.png and, of a MoE run, expert_load.png. Nothing is recorded
        yet: an empty list.
    """
    run_dir = Path(run_dir)
    events = read_events(run_dir)
    index = MetricsIndex(run_dir)
    index.update()
    index.forget_rolled_back(events)
    lines = sorted(index.lines)
    chosen = _spread([line for line in lines if not line.evaluation], POINTS)
    train = list(index.read(chosen))
    if not train:
        return []
    evaluations = list(index.read([line for line in lines if line.evaluation]))
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    marks = _marks(index.lines, events)
    written = []
    with rc_context(STYLE):
        for name, figure in (
            ("loss", _loss(train, evaluations, events)),
            ("optimizer", _optimizer(train)),
            ("throughput", _throughput(train)),
            ("expert_load", _expert_load(train)),
        ):
            if figure is None:
                continue
            for axes in figure.axes:
                if axes.get_label() != "<colorbar>":
                    _draw_marks(axes, marks)
            figure.suptitle(run_dir.resolve().name, fontsize=10)
            FigureCanvasAgg(figure)
            path = folder / f"{name}.png"
            figure.savefig(path)
            written.append(path)
    return written


def _loss(train: Records, evaluations: Records, events: Records) -> Figure:
    figure = Figure(figsize=(6.5, 4.0))
    axes = figure.add_subplot()
    step, loss = _column(train, "step"), _column(train, "loss")
    smooth = _smooth(loss)
    axes.plot(step, loss, color=BLUE, alpha=0.3, linewidth=0.7)
    axes.plot(step, smooth, color=BLUE, label="training (line: smoothed)")
    shown = [loss]
    if evaluations:
        held_out = _column(evaluations, "eval_loss")
        axes.plot(
            _column(evaluations, "step"), held_out, color=RED, marker="o", markersize=3.5, label="held-out", zorder=4
        )
        shown.append(held_out)
        if np.isfinite(held_out[-1]):
            axes.annotate(
                f"{held_out[-1]:.3f}", (evaluations[-1]["step"], held_out[-1]), (0, 6), textcoords="offset points",
                color=RED, fontsize=8, ha="right",
            )  # fmt: skip
    if entropy := _unigram_entropy(events):
        axes.axhline(entropy, color=GREY, linestyle="--", linewidth=1, label=f"unigram entropy {entropy:.2f}")
        shown.append(np.array([entropy]))
    values = np.concatenate(shown)
    if np.isfinite(values).any():
        # The smoothed line decides the upper end: a spike would flatten everything else.
        low, high = np.nanmin(values), np.nanmax(np.concatenate([smooth, *shown[1:]]))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low) + 1e-6)
    skipped = [record["step"] for record in train if record.get("skipped")]
    if skipped:
        axes.plot(
            skipped, [0.02] * len(skipped), "x", color="black", markersize=4, label="skipped step",
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    if per_step := _last(train, "tokens") / max(train[-1]["step"], 1):
        top = axes.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
        top.set_xlabel("tokens")
    _legend(axes)
    return figure


def _optimizer(train: Records) -> Figure:
    figure = Figure(figsize=(6.5, 4.2))
    upper, lower = figure.subplots(2, sharex=True)
    step, norm = _column(train, "step"), _column(train, "grad_norm")
    upper.plot(step, _column(train, "lr"), color=BLUE)
    upper.set(ylabel="learning rate", ylim=(0, None))
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    lower.plot(step, norm, color=ORANGE, alpha=0.35, linewidth=0.7)
    lower.plot(step, _smooth(norm), color=ORANGE)
    lower.set(xlabel="step", ylabel="gradient norm")
    _log_scale(lower)
    return figure


def _throughput(train: Records) -> Figure:
    figure = Figure(figsize=(6.5, 5.4))
    panels = figure.subplots(3, sharex=True)
    step, speed = _column(train, "step"), _column(train, "tokens_per_second")
    panels[0].plot(step, speed, color=BLUE, alpha=0.35, linewidth=0.7)
    panels[0].plot(step, _smooth(speed), color=BLUE)
    panels[0].set(ylabel="tokens / s")
    _robust_limits(panels[0], speed)
    panels[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    if np.isfinite(_column(train, "mfu")).any():
        panels[1].plot(step, 100 * _smooth(_column(train, "mfu")), color=GREEN)
        panels[1].set(ylabel="MFU (%)", ylim=(0, None))
    else:
        panels[1].plot(step, _smooth(_column(train, "tflops")), color=GREEN)
        panels[1].set(ylabel="TFLOP/s", ylim=(0, None))
    seconds, waited = _column(train, "step_time"), _column(train, "data_wait")
    panels[2].plot(step, 1e3 * seconds, color=ORANGE, linewidth=0.9, label="step")
    panels[2].plot(step, 1e3 * waited, color=RED, linewidth=0.9, label="of which waiting for data")
    panels[2].set(xlabel="step", ylabel="time (ms)")
    _robust_limits(panels[2], 1e3 * seconds)
    _legend(panels[2])
    return figure


def _expert_load(train: Records) -> Figure | None:
    records = [record for record in train if record.get("expert_load")]
    if not records:
        return None
    groups = [group for group in np.array_split(np.arange(len(records)), COLUMNS) if len(group)]
    step = np.array([_column(records, "step")[group].mean() for group in groups])
    load_SLE = np.array([np.mean([np.array(records[i]["expert_load"], float) for i in group], 0) for group in groups])
    relative_SLE = load_SLE * load_SLE.shape[-1]  # 1: every expert has its even share
    layers = _spread(range(load_SLE.shape[1]), LAYERS)
    figure = Figure(figsize=(6.5, 2.2 + 1.1 * len(layers)))
    panels = figure.subplots(len(layers) + 1, sharex=True)
    edges = np.concatenate([step[:1] - 0.5, (step[1:] + step[:-1]) / 2, step[-1:] + 0.5])
    experts = np.arange(load_SLE.shape[-1] + 1) - 0.5
    norm = LogNorm(0.25, 4)
    mesh = None
    for panel, layer in zip(panels, layers, strict=False):
        values = np.clip(relative_SLE[:, layer].T, 1e-3, None)
        mesh = panel.pcolormesh(edges, experts, values, cmap="RdBu_r", norm=norm, rasterized=True)
        panel.set_ylabel(f"MoE layer {layer}\nexpert")
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(False)
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=list(panels[:-1]), extend="both", ticks=[0.25, 0.5, 1, 2, 4], shrink=0.6)
    bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])
    bar.ax.minorticks_off()
    bar.set_label("share of tokens / even share")
    violation_SL = relative_SLE.max(-1) - 1
    panels[-1].plot(step, violation_SL.mean(1), color=BLUE, label="mean over layers")
    panels[-1].fill_between(
        step, violation_SL.min(1), violation_SL.max(1), color=BLUE, alpha=0.2, linewidth=0, label="range"
    )
    panels[-1].set(xlabel="step", ylabel="MaxVio\n(max / even − 1)")
    _log_scale(panels[-1])
    _legend(panels[-1])
    return figure


def _unigram_entropy(events: Records) -> float | None:
    """Of the held-out split, in nats, where the run reads one data set: what a model without context would reach."""
    inputs: list[dict[str, Any]] = next((event["inputs"] for event in reversed(events) if event.get("inputs")), [])
    data = [item["profile"] for item in inputs if item["kind"] == "training"]
    return data[0].get("splits", {}).get("held_out", {}).get("entropy") if len(data) == 1 else None


def _marks(lines: Sequence[Line], events: Records) -> list[tuple[float, str]]:
    """Where the run was taken up again, and where it was rolled back to."""
    train = [line for line in lines if not line.evaluation]
    marks = [(new.step - 0.5, "restart") for old, new in itertools.pairwise(train) if new.attempt > old.attempt]
    return marks + [(event["to_step"] + 0.5, "rollback") for event in events if event["event"] == "rollback"]


def _draw_marks(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
    seen: set[str] = set()
    for step, kind in marks:
        colour = GREEN if kind == "restart" else RED
        label = kind if kind not in seen and axes.get_legend() else None
        axes.axvline(step, color=colour, linestyle=":", linewidth=1.1, label=label)
        seen.add(kind)
    if seen and axes.get_legend():
        _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.child_axes:  # the second axis stands where the legend would
        axes.legend(loc="upper right")
    else:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=4)


def _log_scale(axes: Axes) -> None:
    if not any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _column(records: Records, key: str) -> np.ndarray:
    """Values of a key as floats; NaN where it is absent or null."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], dtype=float)


def _last(records: Records, key: str) -> float:
    return next((record[key] for record in reversed(records) if record.get(key)), 0.0)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a fortieth of the points around each; NaN is left out."""
    half = len(values) // 80
    finite = np.isfinite(values)
    window = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, values, 0.0), window)[half : half + len(values)]
    count = np.convolve(finite.astype(float), window)[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


def _robust_limits(axes: Axes, values: np.ndarray) -> None:
    """From zero to somewhat above what is usual: the first step's compilation would flatten everything else."""
    finite = values[np.isfinite(values)]
    if len(finite):
        axes.set_ylim(0, 1.25 * np.percentile(finite, 99) if len(finite) > 20 else None)


def _spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
