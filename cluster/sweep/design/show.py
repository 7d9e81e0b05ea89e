"""Prints a plan as a table or as JSON: trials, FLOPs, device-hours, cost."""

import heapq
import math
from collections import defaultdict
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from configs import counted
from configs.units import byte_size, scientific, short
from models.planning.cost import has_formulas
from models.planning.devices import HEADROOM, Device
from models.planning.plan import predict
from trainer.record.terminal import Console

from .measures import unit_of
from .sizes import conventions
from .trial import Plan, Trial


class Costs(NamedTuple):
    """What a plan costs on one kind of device, with each trial predicted as by `muster plan`."""

    device: Device
    devices: int
    """Number of devices in use at a time."""
    hours: dict[str, float]
    """Hours of each trial, by name."""
    device_hours: dict[str, float]
    too_large: tuple[str, ...]
    """Trials that do not fit in the device's memory."""
    wall: float
    """Hours until all are done if the longest start first, each branch after the run that it starts from."""
    price: float | None

    @property
    def total(self) -> float:
        """Device-hours."""
        return sum(self.device_hours.values())


def costs(plan: Plan, device: Device, devices: int | None, price: float | None) -> Costs:
    """Predict every trial; NaN where the planner has no formulas for its family."""
    hours, device_hours, large = {}, {}, []
    for trial in plan.trials:
        if not has_formulas(trial.resolved.model):
            hours[trial.name] = device_hours[trial.name] = math.nan
            continue
        predicted = predict(trial.resolved, device)
        steps = trial.config.train.steps - (trial.from_step or 0)
        hours[trial.name] = steps * predicted.step_time / 3600
        device_hours[trial.name] = hours[trial.name] * predicted.devices
        if not predicted.fits:
            large.append(f"{trial.name}: {byte_size(predicted.memory.peak)} of {byte_size(device.memory)}")
    devices = max(devices or plan.widest, plan.widest)
    return Costs(device, devices, hours, device_hours, tuple(large), _wall(plan, hours, devices), price)


def _wall(plan: Plan, hours: dict[str, float], devices: int) -> float:
    """A chain of branches holds its devices until its last run ends; longest chains first, on whichever are free."""
    chains: dict[str, float] = defaultdict(float)
    width: dict[str, int] = {}
    first: dict[str, str] = {}
    for trial in plan.trials:
        head = first[trial.name] = first[trial.after] if trial.after else trial.name
        chains[head] += hours[trial.name]
        width[head] = trial.resolved.parallel.world_size
    free = [0.0] * devices
    for head in sorted(chains, key=lambda name: -chains[name]):
        taken = [heapq.heappop(free) for _ in range(width[head])]
        for _ in taken:
            heapq.heappush(free, max(taken) + chains[head])
    return max(free, default=0.0)


def to_json(plan: Plan, found: Costs) -> dict[str, Any]:
    """Plain numbers: FLOPs, tokens (or what else the task counts), hours."""
    totals = {
        "trials": len(plan.trials), "open": plan.open, "flops": sum(trial.spent for trial in plan.trials),
        _unit(plan): sum(trial.tokens for trial in plan.trials), "device_hours": found.total, "hours": found.wall,
    }  # fmt: skip
    if found.price is not None:
        totals["usd"] = found.total * found.price
    return {
        "name": plan.sweep.name, "device": found.device.name, "devices": found.devices,
        "trials": [_row(plan, trial, found) for trial in plan.trials],
        "totals": totals, "warnings": [*plan.warnings, *_too_large(found)],
    }  # fmt: skip


def _row(plan: Plan, trial: Trial, found: Costs) -> dict[str, Any]:
    train, model, n = trial.config.train, trial.resolved.model, conventions(trial.counts)
    return {
        "name": trial.name, "variant": trial.variant, "seed": trial.config.run.seed, "parameters": n,
        _unit(plan): trial.tokens, f"{_unit(plan)}_per_parameter": trial.tokens / n[plan.sweep.count],
        "steps": train.steps,
        "global_batch": train.global_batch, "seq_len": train.seq_len, "lr": trial.config.optim.lr,
        "warmup": trial.config.optim.warmup, "budget": trial.budget, "flops": trial.flops, "off": off(trial),
        "spent": trial.spent, "hours": found.hours[trial.name], "device_hours": found.device_hours[trial.name],
        "after": trial.after, "from_step": trial.from_step, "values": dict(trial.values),
        "model": {key: getattr(model, key, None) for key in (
            "num_layers", "hidden_size", "num_heads", "intermediate_size", "num_experts", "top_k", "expert_size")},
    }  # fmt: skip


def _unit(plan: Plan) -> str:
    """What D counts: all trials of a sweep learn the same task."""
    return unit_of(plan.trials[0].resolved) if plan.trials else "tokens"


def off(trial: Trial) -> float | None:
    """Relative difference of its FLOPs from its budget; None if it has no budget."""
    return trial.flops / trial.budget - 1 if trial.budget else None


def show(plan: Plan, found: Costs, console: Console | None = None) -> None:
    """Print the table of trials, the totals and the warnings."""
    console = console or Console(soft_wrap=True)
    sweep, trials = plan.sweep, plan.trials
    told = f": {counted(len(trials), 'trial')} on {found.devices} x {found.device.name}, N counted as {sweep.count}"
    console.print(Text.assemble((sweep.name, "bold"), told))
    table = Table("trial", box=None, pad_edge=False)
    for column in ("N", "total", "shape", "D", "D/N", "steps", "batch", "lr", "FLOPs", "off by", "hours"):
        table.add_column(column, justify="right")
    branched = any(trial.after for trial in trials)
    if branched:
        table.add_column("starts from")
    others = [key for key in sweep.axes if key not in ("optim.lr", "train.global_batch")]
    if others:
        table.add_column("values")
    for trial in trials:
        train, n, by = trial.config.train, conventions(trial.counts)[sweep.count], off(trial)
        after = [f"step {trial.from_step:,} of {trial.after}" if trial.after else ""] if branched else []
        values = [" ".join(f"{key}={trial.values[key]}" for key in others)] if others else []
        table.add_row(
            trial.name, short(n), short(trial.counts.total), _shape(trial), short(trial.tokens),
            f"{trial.tokens / n:.3g}", f"{train.steps:,}", str(train.global_batch), f"{trial.config.optim.lr:.3g}",
            scientific(trial.flops), "" if by is None else f"{by:+.2%}", _known(found.hours[trial.name]), *after,
            *values,
        )  # fmt: skip
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    # Nothing is cut off: a narrower terminal wraps the lines.
    Console(width=max(width, console.width), file=console.file).print(table)
    flops = sum(trial.spent for trial in trials)
    priced = "" if found.price is None else f", {found.total * found.price:,.2f} USD"
    console.print(f"\n{counted(len(trials), 'trial')}, {scientific(flops)} FLOPs, {_known(found.total)} "
                  f"device-hours{priced}; "
                  f"{_known(found.wall)} hours on {counted(found.devices, 'device')}")  # fmt: skip
    if plan.open:
        mean = found.total / max(1, len(trials))
        console.print(f"{counted(plan.open, 'more trial')} will be chosen by the losses of these, for about "
                      f"{plan.open * mean:,.3g} "
                      "more device-hours")  # fmt: skip
    for line in (*plan.warnings, *_too_large(found)):
        console.print(Text.assemble(("warning:", "yellow"), f" {line}"))


def _known(hours: float) -> str:
    return "?" if math.isnan(hours) else f"{hours:,.3g}"


def _too_large(found: Costs) -> list[str]:
    few = "; ".join(found.too_large[:3])
    return [f"{counted(len(found.too_large), 'trial', 'does/do')} not fit in {1 - HEADROOM:.0%} of a device's "
            f"memory ({few}): lower "
            "train.micro_batch or split them by parallel.*"] if found.too_large else []  # fmt: skip


def _shape(trial: Trial) -> str:
    model = trial.resolved.model
    if not has_formulas(model):
        return model.family
    experts = f" {model.num_experts}e{model.top_k}" if model.is_moe else ""
    return f"{model.num_layers}x{model.hidden_size}{experts}"
