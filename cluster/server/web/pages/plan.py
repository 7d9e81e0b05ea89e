"""What a run would need and cost: `muster plan` of a config that somebody sent, of which nothing is read or run.

As a process of its own (`python -m cluster.server.web.pages.plan`) it compares topologies, for seconds of a core.
"""

import math
import re
import shlex
from functools import cache
from typing import Any

from cluster.commands.plan import (
    asked_device,
    cost,
    in_one_process,
    memory_parts,
    other_checkpointing,
    resolved_over,
    search_json,
)
from configs import Config, ConfigError, flatten, load, preset_names, resolve
from configs.load import load_apart
from models.planning.cost import has_formulas
from models.planning.devices import DEVICES, HEADROOM
from models.planning.plan import predict
from models.planning.search import search
from trainer.data.manifest import made_vocabulary
from trainer.processes.answering import answer_one
from trainer.record.terminal import visible

SHOWN = (
    "run.name", "model.num_layers", "model.hidden_size", "model.num_experts", "model.top_k", "model.vocab_size",
    "train.steps", "train.global_batch", "train.seq_len", "train.micro_batch", "train.precision",
    "train.activation_checkpointing", "optim.name", "parallel.dp", "parallel.tp", "parallel.pp", "parallel.pp_schedule",
    "parallel.ep", "parallel.sp", "parallel.zero_stage", "parallel.offload",
)  # fmt: skip
"""Keys whose values as they are used the form shows."""
SECONDS, MEMORY = 120, 2 << 30
"""Of a core, and bytes: no comparison of topologies takes as much."""
PASTED = "the config"
FILE = "config.yaml"
"""What a pasted config is called in a command."""
_KEY = re.compile(
    r"\b(?:run|model|train|optim|data|parallel|checkpoint|tracking|cluster)\.[a-z_]+|--[a-z-]+|\bplugins\b|\bbase\b"
)
"""A key or an option that a message names."""


def options() -> dict[str, Any]:
    """What the form offers."""
    devices = [
        {"name": name, "memory": each.memory, "attained": each.attained, "rates": each.sources.get("flops", "")}
        for name, each in DEVICES.items()
    ]  # fmt: skip
    return {
        "presets": _plannable(),
        "devices": [*devices, {"name": "cpu", "memory": None, "attained": 1.0, "rates": ""}],
    }


@cache
def _plannable() -> list[str]:
    """The presets that the planner has formulas for."""
    return [name for name in preset_names() if has_formulas(load(name).model)]


def planned(asked: dict[str, Any]) -> dict[str, Any]:
    """The plan of what the form says, as `plan_responses.Planned`."""
    try:
        device = asked_device(asked["gpu"], asked["gpus"], asked["usd_per_gpu_hour"])
        config = sent_config(asked)
        resolved, notes = resolved_over(config, asked["gpus"], known_vocabulary(config))
        found = predict(resolved, device)
        other, twin = other_checkpointing(resolved, device)
    except ConfigError as error:
        return refused(error)
    values = flatten(resolved)
    memory = found.memory
    peak_at = max(memory.moments, key=memory.moments.__getitem__)
    return {
        "plan": found.summary() | cost(found, resolved, asked["usd_per_gpu_hour"]) | {
            "parts": [[name, size] for name, size in memory_parts(memory, resolved).items()], "peak_at": peak_at,
            "hidden": [item.kind for item in found.traffic if item.hidden and not device.is_cpu],
            "limit": device.memory * (1 - HEADROOM) if math.isfinite(device.memory) else None,
            "host": memory.host, "stage": memory.stage,
        },
        "without": {
            "key": f"train.activation_checkpointing={other}", "peak": twin.memory.peak, "fits": twin.fits,
            "step_time": twin.step_time,
        },
        "used": {key: values[key] for key in SHOWN if key in values},
        "notes": [visible(note)[:500] for note in notes],
        "device": {"name": device.name, "rates": device.sources.get("flops", ""), "attained": device.attained,
                   "measured": device.sources.get("attained", "").startswith("measured") or device.is_cpu},
        "commands": _commands(asked, resolved), "overrides": _overrides(asked, resolved), "run": resolved.run.name,
    }  # fmt: skip


def topologies(asked: dict[str, Any]) -> dict[str, Any]:
    """Every topology that fits, as `muster plan --search --json`; or as `refused`."""
    try:
        device = asked_device(asked["gpu"], asked["gpus"], asked["usd_per_gpu_hour"])
        config = sent_config(asked)
        resolved, _ = resolve(in_one_process(config), vocab_size=known_vocabulary(config))
        devices = asked["gpus"] or config.parallel.world_size
        return search_json(search(resolved, device, devices), asked["usd_per_gpu_hour"])
    except ConfigError as error:
        return refused(error)


def refused(error: ConfigError) -> dict[str, Any]:
    """A message, and the key or option that it names first."""
    text = visible(str(error))[:2000]
    named = _KEY.search(text.partition(", such as ")[0])
    return {"error": text, "key": named[0] if named else None}


def sent_text(asked: dict[str, Any]) -> tuple[str, str]:
    """The YAML of a form, and what messages call it. Raises ConfigError."""
    preset, text = asked["preset"], asked["text"]
    if not text and preset not in preset_names():
        raise ConfigError(f"no preset {visible(preset)[:100]!r}: choose one of {', '.join(preset_names())}")
    return (text, PASTED) if text else (f"base: {preset}", preset)


def sent_config(asked: dict[str, Any]) -> Config:
    """The config of a form, for which nothing but presets is read.

    Raises:
        ConfigError: it is invalid, names code or a file, or its family is a plugin's, which is not loaded.
    """
    text, where = sent_text(asked)
    config = load_apart(text, asked["overrides"], where)
    if not has_formulas(config.model):
        raise ConfigError(
            f"model.family={visible(config.model.family)}: the planner's formulas cover decoders only; "
            "`muster plan` counts the parameters and FLOPs of other families"
        )
    return config


def known_vocabulary(config: Config) -> int | None:
    """What preparing the data would make: no data are read."""
    made = made_vocabulary(config.data)
    return None if made is None else made + getattr(config.model, "added_tokens", 0)


def _overrides(asked: dict[str, Any], resolved: Config) -> list[str]:
    """Those with which the run takes as many devices as were planned."""
    if not asked["gpus"]:
        return list(asked["overrides"])
    kept = [key for key in asked["overrides"] if not key.startswith("parallel.dp=")]
    return [*kept, f"parallel.dp={resolved.parallel.dp}"]


def _commands(asked: dict[str, Any], resolved: Config) -> dict[str, str]:
    """The same on a command line, and the run that is planned."""
    name = FILE if asked["text"] else asked["preset"]
    keys = [shlex.quote(key) for key in _overrides(asked, resolved)]
    plan = ["muster", "plan", name, *map(shlex.quote, asked["overrides"]), "--gpu", asked["gpu"]]
    if asked["gpus"]:
        plan += ["--gpus", str(asked["gpus"])]
    if asked["usd_per_gpu_hour"] is not None:
        plan += ["--usd-per-gpu-hour", f"{asked['usd_per_gpu_hour']:g}"]
    return {"plan": " ".join(plan), **{verb: " ".join(["muster", verb, name, *keys]) for verb in ("submit", "train")}}


if __name__ == "__main__":
    answer_one(topologies, SECONDS, MEMORY)
