"""`muster plan`: what a run will need and cost, before anything starts, and which topology suits it (no torch)."""

import json
import math
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from configs import Config, ConfigError, counted, preset_names, resolve
from configs.sections.parallel import MOST_PROCESSES
from configs.units import byte_size, duration, short
from models.planning.cost import has_formulas
from models.planning.devices import DEVICES, HEADROOM, Device, cpu
from models.planning.memory import Memory
from models.planning.plan import Plan, predict
from models.planning.search import Choice, Found, search
from models.planning.shards import micro_batches
from trainer.checkpoint.cadence import expected
from trainer.record.terminal import Console

from .runs import Json

KINDS = (*DEVICES, "cpu")
DEAREST = 1_000_000
"""Highest price accepted, in USD per device-hour."""
SHOWN = 10
"""Topologies that a search lists."""


def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help=f"A preset ({', '.join(preset_names())}) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to set, such as train.steps=100.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Number of devices; parallel.dp follows from it.")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="KIND", help=f"Kind of device: {', '.join(KINDS)}.")] = "h100",
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option(metavar="X", help="Price of one device-hour, in USD.")
    ] = None,
    do_search: Annotated[bool, typer.Option("--search", help="Compare every topology of that many devices.")] = False,
    as_json: Json = False,
) -> None:
    """Predict memory, speed and cost of a run. Example: muster plan moe-8x7b --gpus 64 --search"""
    from trainer.data.manifest import planned_vocabulary  # numpy
    from trainer.run.plugins import load_own

    device = asked_device(gpu, gpus, usd_per_gpu_hour)
    asked = load_own(config, overrides or ())
    if not has_formulas(asked.model):
        _show_counted(asked, planned_vocabulary(asked), device, as_json)
        return
    devices = gpus or asked.parallel.world_size
    if do_search:
        resolved, _ = resolve(in_one_process(asked), vocab_size=planned_vocabulary(asked))
        found = search(resolved, device, devices)
        if as_json:
            print(json.dumps(search_json(found, usd_per_gpu_hour), indent=1))
        else:
            _show_search(found, resolved, device, devices, usd_per_gpu_hour)
        return
    resolved, notes = resolved_over(asked, gpus, planned_vocabulary(asked))
    predicted = predict(resolved, device)
    if as_json:
        print(json.dumps(predicted.summary() | cost(predicted, resolved, usd_per_gpu_hour), indent=1))
    else:
        _show(predicted, resolved, notes, usd_per_gpu_hour)


def _show_counted(asked: Config, vocab_size: int | None, device: Device, as_json: bool) -> None:
    """Show what can be counted of a model without formulas. Its plugin has imported torch already."""
    resolved, notes = resolve(asked, vocab_size=vocab_size)
    from trainer.run.counted import counts  # torch

    found = counts(resolved)
    unknown = "memory, speed and cost: unknown, the planner has formulas for decoders only; a run measures them"
    weights = 4 * found["parameters"] / resolved.parallel.world_size  # fp32, at the best with an equal share on each
    fits = weights <= device.memory * (1 - HEADROOM)
    if as_json:
        print(json.dumps(found | {"unknown": unknown} | ({} if fits else {"fits": False}), indent=1))
        return
    console, flops = Console(soft_wrap=True), found["flops_per_example"]
    console.print(f"{resolved.run.name}: {resolved.model.family}, task {resolved.task}", style="bold")
    for note in notes:
        console.print(f"  {note}", style="dim")
    each = f"{flops:,.4g} training FLOPs per example" if flops else found["flops_unknown"]
    console.print(f"{found['parameters']:,} parameters, {each}")
    console.print(f"{counted(resolved.train.steps, 'step')} of {counted(resolved.train.global_batch, 'example')}")
    if not fits:
        console.print(Text.assemble(("does not fit", "red"), f": its weights alone are {byte_size(weights)} per device "
                                    f"({device.name}: {byte_size(device.memory)})"))  # fmt: skip
    console.print(unknown)


def asked_device(gpu: str, gpus: int | None, usd_per_gpu_hour: float | None) -> Device:
    """The device of --gpu. Raises ConfigError if it, --gpus or --usd-per-gpu-hour is invalid."""
    if gpu not in KINDS:
        raise ConfigError(f"--gpu {gpu}: should be one of {', '.join(KINDS)}")
    if gpus is not None and not 1 <= gpus <= MOST_PROCESSES:
        raise ConfigError(f"--gpus {gpus}: should be 1 to {MOST_PROCESSES:,}")
    if usd_per_gpu_hour is not None and not 0 <= usd_per_gpu_hour <= DEAREST:
        raise ConfigError(f"--usd-per-gpu-hour {usd_per_gpu_hour}: should be a price, 0 to {DEAREST:,}")
    return cpu() if gpu == "cpu" else DEVICES[gpu]


def in_one_process(config: Config) -> Config:
    """For a search, which sets these degrees itself: resolve() must not refuse the config's own."""
    alone = {"dp": 1, "tp": 1, "pp": 1, "ep": 1, "sp": 1}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=alone)})


def resolved_over(asked: Config, gpus: int | None, vocab_size: int | None) -> tuple[Config, list[str]]:
    """As `resolve`, over that many devices; None: over those of the config's own topology. Raises ConfigError."""
    given = asked.parallel
    if gpus:
        asked = _spread(asked, gpus)
    resolved, notes = resolve(asked, vocab_size=vocab_size)
    if "dp" in given.model_fields_set and given.dp != asked.parallel.dp:
        notes.insert(0, f"parallel.dp={asked.parallel.dp}: follows from --gpus {gpus}, not the config's {given.dp}")
    return resolved, notes


def _spread(config: Config, devices: int) -> Config:
    """The config with parallel.dp set so that it takes this many devices; other degrees stay. Raises ConfigError."""
    parallel = config.parallel
    inner = parallel.tp * parallel.pp * parallel.sp
    if devices % inner:
        raise ConfigError(
            f"--gpus {devices} is not a multiple of parallel.tp * pp * sp ({parallel.tp} * {parallel.pp} * "
            f"{parallel.sp} = {inner}): change one of them, or let --search find a topology"
        )
    train = config.train
    if train.micro_batch and train.micro_batch * (devices // inner) > train.global_batch:
        raise ConfigError(
            f"--gpus {devices} gives parallel.dp={devices // inner}, and that times train.micro_batch "
            f"({train.micro_batch}) is over train.global_batch ({train.global_batch}): lower --gpus or "
            f"train.micro_batch, or raise train.global_batch"
        )
    return config.model_copy(update={"parallel": parallel.model_copy(update={"dp": devices // inner})})


def cost(predicted: Plan, config: Config, price: float | None) -> dict[str, float]:
    """Hours of the run, device-hours and, with a price of those, USD."""
    hours = config.train.steps * predicted.step_time / 3600
    found = {"hours": hours, "device_hours": hours * predicted.devices}
    return found if price is None else found | {"usd": hours * predicted.devices * price}


def memory_parts(memory: Memory, config: Config) -> dict[str, float]:
    """Bytes of a device's memory by what they are for, as a person reads it; parts of none are left out."""
    named = {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "weights gathered for use": memory.gathered,
        f"activations (checkpointing: {config.train.activation_checkpointing})": memory.activations,
        "recomputed layer": memory.recomputed, "loss and head": memory.loss,
        "expert dispatch": memory.dispatch, "gradient reduction": memory.buckets, "libraries": memory.runtime,
        "reading data, evaluation": memory.trainer, "checkpoint snapshot": memory.snapshot,
        "heap fragmentation": memory.gaps,
    }  # fmt: skip
    return {name: size for name, size in named.items() if size}


def other_checkpointing(config: Config, device: Device) -> tuple[str, Plan]:
    """train.activation_checkpointing as it is not, and what that would come to."""
    other = "none" if config.train.activation_checkpointing != "none" else "full"
    train = config.train.model_copy(update={"activation_checkpointing": other})
    return other, predict(config.model_copy(update={"train": train}), device)


def _show(predicted: Plan, config: Config, notes: list[str], price: float | None) -> None:
    console, device, counts = Console(soft_wrap=True), predicted.device, predicted.parameters
    memory, train, parallel = predicted.memory, config.train, config.parallel
    degrees = ", ".join(f"{key} {getattr(parallel, key)}" for key in ("dp", "tp", "pp", "ep", "sp", "hpz")
                        if getattr(parallel, key) > 1)  # fmt: skip
    if parallel.pp_schedule != "1f1b":
        degrees += f" {parallel.pp_schedule}"
    offload = "" if parallel.offload == "none" else f", offload {parallel.offload}"
    what = f"{config.run.name} on {predicted.devices} x {device.name}"
    how = f"{degrees or 'one process'}, ZeRO-{parallel.zero_stage}{offload}, {train.precision}"
    console.print(Text.assemble((what, "bold"), f": {how}"))
    for note in notes:
        console.print(f"  {note}", style="dim")
    console.print(f"{short(counts.total)} parameters, {short(counts.active)} active per token, "
                  f"{predicted.flops_per_token / 1e9:,.3g} training GFLOPs per token")  # fmt: skip
    console.print(f"{predicted.tokens_per_step:,} tokens per step: {counted(micro_batches(config), 'micro-batch')} of "
                  f"{train.micro_batch} x {train.seq_len} on each of "
                  f"{counted(parallel.dp, 'data-parallel rank')}\n")  # fmt: skip

    table = Table("memory per device", box=None, pad_edge=False)
    table.add_column("", justify="right")
    for name, size in memory_parts(memory, config).items():
        table.add_row(name, byte_size(size))
    moment = max(memory.moments, key=memory.moments.__getitem__)
    table.add_row(f"peak, at the {moment}", byte_size(memory.peak), style="bold")
    if math.isfinite(device.memory):
        verdict = Text("fits", "green") if predicted.fits else Text("does not fit", "red")
        more = "" if predicted.fits else f" in {1 - HEADROOM:.0%} of it: try --search"
        table.add_row(Text.assemble("device memory, ", verdict, more), byte_size(device.memory))
    if memory.host:
        table.add_row("host memory, per process", byte_size(memory.host))
    console.print(table)
    if parallel.pp > 1:
        console.print(f"pipeline rank {memory.stage + 1} of {parallel.pp}, which needs the most memory", style="dim")
    other, twin = other_checkpointing(config, device)
    console.print(f"with train.activation_checkpointing={other}: peak {byte_size(twin.memory.peak)}, "
                  f"step {duration(twin.step_time)}\n", style="dim")  # fmt: skip

    table = Table("step", box=None, pad_edge=False)
    table.add_column("time", justify="right")
    table.add_column("sent per device", justify="right")
    table.add_row("matrix products", duration(predicted.compute_time))
    table.add_row("memory traffic (activations, states)", duration(predicted.memory_time))
    if predicted.launch_time:
        table.add_row("launch overhead", duration(predicted.launch_time))
    for item in predicted.traffic:
        behind = " (behind the backward pass)" if item.hidden and not device.is_cpu else ""
        table.add_row(item.kind + behind, duration(item.seconds), byte_size(item.sent))
    if predicted.bubble:
        table.add_row("pipeline bubble", f"{predicted.bubble:.0%}")
    table.add_row("total", duration(predicted.step_time), style="bold")
    console.print(table)
    spent = cost(predicted, config, price)
    console.print(f"\nMFU {predicted.mfu:.0%}, {short(predicted.tokens_per_second)} tokens/s, "
                  f"{short(predicted.tokens_per_day)} tokens/day")  # fmt: skip
    priced = f", {spent['usd']:,.0f} USD" if "usd" in spent else ""
    console.print(f"{counted(train.steps, 'step')}, {short(train.steps * predicted.tokens_per_step)} tokens: "
                  f"{duration(3600 * spent['hours'])}, {spent['device_hours']:,.1f} device-hours{priced}")  # fmt: skip
    if config.checkpoint.every == "auto":
        console.print(expected(predicted.devices, predicted.step_time))
    source = device.sources.get("flops", "")
    console.print(f"Rates: {source}; matrix products reach {device.attained:.0%} of that. "
                  "A prediction: of GPUs, only one H200 has been measured." if not device.is_cpu else
                  f"Rates: {source}", style="dim")  # fmt: skip


def _show_search(found: Found, config: Config, device: Device, devices: int, price: float | None) -> None:
    console = Console(soft_wrap=True)
    fitting = len(found.choices)
    told = f": {fitting} topologies fit{', the fastest first' if fitting else ''}"
    console.print(Text.assemble((f"{config.run.name} on {devices} x {device.name}", "bold"), told))
    if found.choices:
        columns = ("dp", "tp", "pp", "ep", "sp", "zero", "micro", "ckpt", "memory", "step", "MFU", "tokens/day")
        table = Table(*columns, box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        if price is not None:
            table.add_column("USD", justify="right")
        for choice in found.choices[:SHOWN]:
            table.add_row(*_row(choice), *([] if price is None else [_usd(choice, price)]))
        console.print(table)
        console.print(f"\nThe fastest: {' '.join(found.choices[0].overrides())}", soft_wrap=True)
        console.print(
            "pp 2v: parallel.pp_schedule=dualpipev. micro: train.micro_batch. ckpt: train.activation_checkpointing.",
            style="dim",
        )
    if found.too_large:
        console.print(f"\n{found.too_large} topologies do not fit in {1 - HEADROOM:.0%} of {byte_size(device.memory)} "
                      f"with any micro-batch; the smallest of them needs {byte_size(found.least or 0)}")  # fmt: skip
    if found.refused:
        console.print("\nCannot run (a topology may break several rules):")
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for reason, count in found.refused.most_common():
            table.add_row(str(count), reason)
        console.print(table)


def _row(choice: Choice) -> list[str]:
    parallel, train, predicted = choice.config.parallel, choice.config.train, choice.plan
    v = "v" if parallel.pp_schedule == "dualpipev" else ""
    degrees = f"{parallel.dp} {parallel.tp} {parallel.pp}{v} {parallel.ep} {parallel.sp} {parallel.zero_stage}".split()
    return [*degrees, str(train.micro_batch), train.activation_checkpointing, byte_size(predicted.memory.peak),
            duration(predicted.step_time), f"{predicted.mfu:.0%}", short(predicted.tokens_per_day)]  # fmt: skip


def _usd(choice: Choice, price: float) -> str:
    return f"{cost(choice.plan, choice.config, price)['usd']:,.0f}"


def search_json(found: Found, price: float | None) -> dict:
    """For `--json`."""
    return {
        "choices": [
            {"overrides": choice.overrides()} | choice.plan.summary() | cost(choice.plan, choice.config, price)
            for choice in found.choices
        ],
        "too_large": found.too_large,
        "least_memory_of_too_large": found.least,
        "refused": dict(found.refused),
    }  # fmt: skip
