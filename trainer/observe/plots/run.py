"""Plots of a run's record: loss, optimizer, throughput, experts and their routers."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainer.record.events import RATE, unit_of
from trainer.record.lines import Line, MetricsIndex, read_events

from .draw import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Records,
    column,
    legend,
    log_scale,
    own_style,
    robust_limits,
    smooth,
    spread,
)
from .experts import expert_load, expert_map, routers

POINTS = 3000
"""Steps drawn of a longer run, evenly spaced: more than a plot has pixels across."""


def plot_run(run_dir: str | Path) -> list[Path]:
    """Plot a run's record into RUN_DIR/plots.

    Returns:
        The files: loss.png, optimizer.png, throughput.png and, for a MoE run, expert_load.png, expert_map.png and
        routers.png. An empty list if nothing is recorded yet.
    """
    run_dir = Path(run_dir)
    events = read_events(run_dir)
    index = MetricsIndex(run_dir)
    index.update()
    index.forget_rolled_back(events)
    lines = sorted(index.lines)
    chosen = spread([line for line in lines if not line.evaluation], POINTS)
    train = [_compact(record) for record in index.read(chosen)]
    if not train:
        return []
    evaluations = list(index.read([line for line in lines if line.evaluation]))
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    marks = _marks(index.lines, events)
    written = []
    with own_style():
        for name, figure in (
            ("loss", _loss(train, evaluations, events)),
            ("optimizer", _optimizer(train)),
            ("throughput", _throughput(train)),
            ("expert_load", expert_load(train)),
            ("expert_map", expert_map(train)),
            ("routers", routers(train, events)),
        ):
            if figure is None:
                continue
            for axes in figure.axes:
                if not str(axes.get_label()).startswith("<"):  # a colour bar, or a map without an axis of steps
                    _draw_marks(axes, marks)
            figure.suptitle(run_dir.resolve().name, fontsize=10)
            FigureCanvasAgg(figure)
            path = folder / f"{name}.png"
            figure.savefig(path)
            written.append(path)
    return written


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """With the expert loads as an array, a tenth of the size of lists: 24 kB for 48 layers of 128 experts."""
    if record.get("expert_load"):
        record["expert_load"] = np.array(record["expert_load"], np.float32)
    return record


def _loss(train: Records, evaluations: Records, events: Records) -> Figure:
    figure = Figure(figsize=(6.5, 4.0))
    axes = figure.add_subplot()
    step, loss = column(train, "step"), column(train, "loss")
    smoothed = smooth(loss)
    axes.plot(step, loss, color=BLUE, alpha=0.3, linewidth=0.7)
    axes.plot(step, smoothed, color=BLUE, label="training (line: smoothed)")
    shown = [loss]
    if evaluations:
        held_out = column(evaluations, "eval_loss")
        axes.plot(
            column(evaluations, "step"), held_out, color=RED, marker="o", markersize=3.5, label="held-out", zorder=4
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
        low, high = np.nanmin(values), np.nanmax(np.concatenate([smoothed, *shown[1:]]))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low) + 1e-6)
    skipped = [record["step"] for record in train if record.get("skipped")]
    if skipped:
        axes.plot(
            skipped, [0.02] * len(skipped), "x", color="black", markersize=4, label="skipped step",
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    unit = unit_of(train[-1])
    axes.set(xlabel="step", ylabel="loss (nats per token)" if unit == "tokens" else "loss")
    if per_step := _last(train, unit) / max(train[-1]["step"], 1):
        top = axes.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
        top.set_xlabel(unit)
    legend(axes)
    return figure


def _optimizer(train: Records) -> Figure:
    figure = Figure(figsize=(6.5, 4.2))
    upper, lower = figure.subplots(2, sharex=True)
    step, norm = column(train, "step"), column(train, "grad_norm")
    upper.plot(step, column(train, "lr"), color=BLUE)
    upper.set(ylabel="learning rate", ylim=(0, None))
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    lower.plot(step, norm, color=ORANGE, alpha=0.35, linewidth=0.7)
    lower.plot(step, smooth(norm), color=ORANGE)
    lower.set(xlabel="step", ylabel="gradient norm")
    log_scale(lower)
    return figure


def _throughput(train: Records) -> Figure:
    figure = Figure(figsize=(6.5, 5.4))
    panels = figure.subplots(3, sharex=True)
    unit = unit_of(train[-1])
    step, speed = column(train, "step"), column(train, unit + RATE)
    panels[0].plot(step, speed, color=BLUE, alpha=0.35, linewidth=0.7)
    panels[0].plot(step, smooth(speed), color=BLUE)
    panels[0].set(ylabel=f"{unit} / s")
    robust_limits(panels[0], speed)
    panels[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    if np.isfinite(column(train, "mfu")).any():
        panels[1].plot(step, 100 * smooth(column(train, "mfu")), color=GREEN)
        panels[1].set(ylabel="MFU (%)", ylim=(0, None))
    else:
        panels[1].plot(step, smooth(column(train, "tflops")), color=GREEN)
        panels[1].set(ylabel="TFLOP/s", ylim=(0, None))
    seconds, waited = column(train, "step_time"), column(train, "data_wait")
    panels[2].plot(step, 1e3 * seconds, color=ORANGE, linewidth=0.9, label="step")
    panels[2].plot(step, 1e3 * waited, color=RED, linewidth=0.9, label="of which waiting for data")
    panels[2].set(xlabel="step", ylabel="time (ms)")
    robust_limits(panels[2], 1e3 * seconds)
    legend(panels[2])
    return figure


def _unigram_entropy(events: Records) -> float | None:
    """The held-out split's unigram entropy in nats, the best loss without context; None if the run mixes data sets."""
    inputs: list[dict[str, Any]] = next((event["inputs"] for event in reversed(events) if event.get("inputs")), [])
    data = [item["profile"] for item in inputs if item["kind"] == "training"]
    return data[0].get("splits", {}).get("held_out", {}).get("entropy") if len(data) == 1 else None


def _marks(lines: Sequence[Line], events: Records) -> list[tuple[float, str]]:
    """Where the run was restarted, and the steps that it was rolled back to."""
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
        legend(axes)


def _last(records: Records, key: str) -> float:
    return next((record[key] for record in reversed(records) if record.get(key)), 0.0)
