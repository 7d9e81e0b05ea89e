"""A sweep's progress, and where its devices' time went, from the records alone: `muster sweep status`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, FailFast, Field, ValidationError

from cluster.sweep.design.sizes import conventions
from cluster.sweep.design.trial import Plan
from configs import ConfigError
from configs.base import LARGEST, Typed, at_most
from configs.explain import first_reason
from configs.reading.parse import MAX_BYTES, parse_json, parse_yaml, shortened
from configs.sections.run import folder_name
from trainer.files.durable import replace_text
from trainer.files.own_files import read_bytes
from trainer.record.lines import read_events, status_of

from .trial_state import Ledger, Standing

PLAN = "plan.json"
MAX_PLAN_BYTES = 16 * 1024**2
"""Ample for the largest sweep allowed."""


class Item(Typed):
    """A trial in plan.json."""

    name: Annotated[str, AfterValidator(folder_name)]
    variant: str
    budget: float | None
    flops: float
    """Training FLOPs from step 0."""
    spent: float
    """Those that the trial itself takes."""
    tokens: int
    steps: int
    from_step: int
    after: str | None
    parameters: Annotated[dict[str, int], at_most(64)]
    """Under every convention of counting."""


class _Plan(Typed):
    vocab_size: Annotated[int, Field(ge=0, le=LARGEST)]
    """0: of models without a vocabulary."""
    open: int
    warnings: Annotated[list[str], FailFast()]
    trials: Annotated[list[Item], FailFast()]


def write_plan(sweep_dir: Path, plan: Plan) -> None:
    """Write the plan to the sweep's folder, as plan.json."""
    items = [
        Item(
            name=trial.name, variant=trial.variant, budget=trial.budget, flops=trial.flops, spent=trial.spent,
            tokens=trial.tokens, steps=trial.config.train.steps, from_step=trial.from_step or 0, after=trial.after,
            parameters=conventions(trial.counts),
        ).model_dump()
        for trial in plan.trials
    ]  # fmt: skip
    tree = {"vocab_size": plan.vocab_size, "open": plan.open, "warnings": list(plan.warnings), "trials": items}
    replace_text(sweep_dir / PLAN, json.dumps(tree, indent=1))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of a sweep's folder, read through no link. Raises ConfigError."""
    try:
        tree = parse_yaml(read_bytes(path, MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path.name} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name} is not a mapping of keys to values")
    return tree


def read_plan(sweep_dir: Path) -> tuple[list[Item], dict[str, Any]]:
    """The trials of plan.json, and all of it. Raises ConfigError if the sweep never ran, or if it is damaged."""
    path = sweep_dir / PLAN
    try:
        plan = _Plan.model_validate(parse_json(read_bytes(path, MAX_PLAN_BYTES)))
    except FileNotFoundError:
        raise ConfigError(f"{sweep_dir} has no {PLAN}: nothing has run yet, `muster sweep run` starts it") from None
    except (OSError, ValueError) as error:
        why = first_reason(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            f"{path} is not what `muster sweep run` writes: run it again ({shortened(why, 200)})"
        ) from None
    return plan.trials, plan.model_dump()


class Books(NamedTuple):
    """Device-seconds of a sweep."""

    device: str
    """"CPU core" or "GPU"."""
    total: float
    """Device-seconds of the whole cluster while `muster sweep run` ran, its startup included."""
    seconds: dict[str, float]
    """By the categories of `trainer.record.goodput`, and `idle`: no trial held the device."""

    @property
    def in_steps(self) -> float:
        """The share that went into steps that count."""
        return self.seconds["step"] / self.total if self.total else 0.0


def books(ledger: Ledger) -> Books:
    """Attribute the device-seconds of all sessions so far to categories."""
    from trainer.record.goodput import BOOKS  # numpy, which most commands need not wait for

    events = read_events(ledger.sweep_dir)
    gpus = any(event.get("gpus") for event in events if event["event"] == "cluster")
    kind = "gpus" if gpus else "cpus"
    each = {event["trial"]: event["workers"] * event[kind] for event in events if event["event"] == "trial_started"}
    seconds = dict.fromkeys(BOOKS, 0.0)
    last = max((event["time"] for event in events), default=0.0)
    for name, devices in each.items():
        own, ended = ledger.books(name)
        for book, value in own.items():
            seconds[book] += value * devices
        last = max(last, ended)
    del seconds["down"], seconds["paused"]  # between two sessions
    capacity = sum(span * devices for span, devices in _sessions(events, kind, last))
    seconds["idle"] = max(capacity - sum(seconds.values()), 0.0)
    return Books("GPU" if gpus else "CPU core", capacity, seconds)


def _sessions(events: Sequence[dict[str, Any]], kind: str, last: float) -> list[tuple[float, float]]:
    """(seconds, devices) of each `muster sweep run`; one without an end lasted until the last sign of life."""
    found: list[tuple[float, float]] = []
    begun, devices = None, 0.0
    before, live = last, status_of(events)[0] == "RUNNING"
    for event in [*events, {"event": "", "time": time.time() if live else last}]:
        if begun is not None and event["event"] in ("attempt_started", "attempt_ended", ""):
            until = event["time"] if event["event"] != "attempt_started" else before
            found.append((max(until - begun, 0.0), devices))
            begun = None
        if event["event"] == "attempt_started":
            begun, devices = event["time"], 0.0
        elif event["event"] == "cluster":
            devices = max(devices, event[kind])
        before = event["time"]
    return found


class Progress(NamedTuple):
    """A whole sweep."""

    name: str
    status: str
    """RUNNING, FINISHED, FAILED (its process is gone) or STOPPED."""
    items: list[Item]
    standings: dict[str, Standing]
    open: int
    eta: float | None
    """Seconds until all of its FLOPs are spent, at the rate so far."""
    books: Books

    def count(self, *states: str) -> int:
        return sum(each.state in states for each in self.standings.values())


def progress(sweep_dir: Path, ledger: Ledger | None = None, kept: Books | None = None) -> Progress:
    """Read a sweep's records.

    Args:
        kept: where its devices' time went, if that is known: it takes every line of every trial's record to tell.

    Raises:
        ConfigError: it never ran.
    """
    items, tree = read_plan(sweep_dir)
    ledger = ledger or Ledger(sweep_dir)
    standings = ledger.standings({item.name: item.steps for item in items})
    events = read_events(sweep_dir)
    done = sum(item.spent * _share_done(item, standings[item.name]) for item in items)
    left = sum(
        item.spent * (1 - _share_done(item, standings[item.name]))
        for item in items
        if standings[item.name].state in ("waiting", "running", "stopped")
    )
    kept = kept or books(ledger)
    wall = sum(seconds for seconds, _ in _sessions(events, "cpus", events[-1]["time"] if events else 0.0))
    eta = left / (done / wall) if done and wall and left else None
    return Progress(sweep_dir.name, status_of(events)[0], items, standings, tree["open"], eta, kept)


def _share_done(item: Item, standing: Standing) -> float:
    if standing.state in ("finished", "diverged", "failed"):
        return 1.0
    return max(0.0, standing.step - item.from_step) / max(1, item.steps - item.from_step)


def to_json(found: Progress) -> dict[str, Any]:
    """Plain values: FLOPs, seconds, nats per token."""
    rows = [item.model_dump() | found.standings[item.name]._asdict() for item in found.items]
    states = ("waiting", "running", "stopped", "finished", "diverged", "failed")
    return {
        "name": found.name, "status": found.status, "counts": {state: found.count(state) for state in states},
        "open": found.open, "eta": found.eta, "device": found.books.device, "device_seconds": found.books.total,
        "in_steps": found.books.in_steps, "seconds": found.books.seconds, "trials": rows,
    }  # fmt: skip
