"""The events in a run's or sweep's record: their names, the fields of each, and the fields' types.

`Record.event` writes through this table, and `read_events` reads through it. A field means the same in every event. A
line of an older or newer version may have other fields; readers leave out a line only if a field that they need is
missing or of another type.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**53


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -1e18 < value < 1e18 and math.isfinite(value)


def _measured(value: Any) -> bool:
    """A number, or null if it was not finite."""
    return value is None or _number(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _inputs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and _text(item.get("digest", "")) for item in value)


def _experts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(who, list) for who in value.values())


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("step", "attempt", "from_step", "to_step", "cursor", "rollbacks", "every", "rank", "pid", "world_size",
         "workers", "bytes", "in_a_row", "collapsed", "lr_drops"),
        _count,
    ),
    **dict.fromkeys(
        ("time", "interval_s", "cost_s", "write_s", "step_s", "mtbf_s", "stall_s", "seconds", "began", "submitted",
         "times_median", "cpus", "gpus"),
        _number,
    ),
    **dict.fromkeys(
        ("event", "status", "reason", "cause", "kind", "action", "host", "checkpoint", "trial", "traceback"), _text
    ),
    **dict.fromkeys(("broken", "slow", "problems"), _texts),
    "stacks": _list,
    "inputs": _inputs,
    "experts": _experts,
    "tracking": _mapping,
}  # fmt: skip
"""Types of the fields that readers act on. A line that has another type in one of them is left out."""
SHOWN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("active_parameters", "cache_hits", "cache_misses", "devices", "eval_weight", "failures", "graph_breaks",
         "graphs", "parameters", "recompilations", "row_group", "steps", "tokens_per_step"),
        _count,
    ),
    **dict.fromkeys(
        ("bound", "bubble", "compute_time", "deviations", "device_hours", "eval_loss", "flops_per_example",
         "flops_per_token", "last_good", "launch_time", "loss", "memory_of_device", "memory_time", "mfu", "peak_memory",
         "predicted_peak_memory", "predicted_step_time", "step_time", "tokens_per_day", "tokens_per_second"),
        _measured,
    ),
    **dict.fromkeys(("by", "command", "device", "file", "git_commit", "kept_as", "phase"), _text),
    **dict.fromkeys(("derived", "files"), _texts),
    **dict.fromkeys(("left_out", "pruned", "suspects"), _list),
    **dict.fromkeys(("changed", "differs", "memory", "totals", "traffic", "versions"), _mapping),
    "fits": _truth,
    "git_dirty": _truth,
    "machines": lambda value: _list(value) or _count(value),
}  # fmt: skip
"""Types of the fields that are only shown, or read on demand; they are checked on writing alone."""


class Fields(NamedTuple):
    """An event's fields besides time, attempt and event."""

    needed: tuple[str, ...] = ()
    """Readers leave out an event that lacks one of these."""
    more: tuple[str, ...] = ()


def _fields(needed: str = "", more: str = "") -> Fields:
    return Fields(tuple(needed.split()), tuple(more.split()))


EVENTS: dict[str, Fields] = {
    # A launch, and what was made of the config.
    "resolved": _fields(more="derived began submitted command pid host"),
    "init_from": _fields(more="differs"),
    "config_changed": _fields(more="changed"),
    "forked": _fields("checkpoint"),
    # The life of an attempt.
    "attempt_started": _fields(more="world_size device versions git_commit git_dirty inputs tracking pid host"),
    "preflight": _fields("broken slow", "seconds machines"),
    "plan": _fields(
        more="device devices parameters active_parameters flops_per_token flops_per_example tokens_per_step memory "
        "memory_of_device fits traffic step_time compute_time memory_time launch_time bubble mfu tokens_per_second "
        "tokens_per_day"
    ),
    "resumed": _fields(more="step cursor checkpoint"),
    "ema_changed": _fields(more="step reason"),
    "flops_unknown": _fields(more="reason"),
    "signal": _fields(more="step reason"),
    "compiled": _fields(more="graphs graph_breaks cache_hits cache_misses recompilations seconds"),
    "measured": _fields(more="peak_memory step_time predicted_peak_memory predicted_step_time"),
    "export_skipped": _fields(more="reason"),
    "failure": _fields(more="step reason traceback"),
    "attempt_ended": _fields("status", "reason cause step in_a_row totals"),
    # During training.
    "evaluation": _fields(more="step eval_loss eval_weight seconds files"),
    "plateau": _fields("step lr_drops", "in_a_row"),
    "skipped_step": _fields("step", "cursor loss in_a_row"),
    "spike": _fields(more="step cursor loss deviations"),
    "rollback": _fields("to_step", "from_step cursor left_out rollbacks"),
    "cadence": _fields("every cost_s write_s step_s", "interval_s by mtbf_s failures device_hours"),
    "checkpoint": _fields("step", "bytes stall_s write_s pruned"),
    "checkpoint_failed": _fields(more="step reason last_good"),
    "checkpoint_refused": _fields(more="step problems kept_as"),
    "experts_collapsed": _fields("experts collapsed step"),
    "experts_recovered": _fields("experts collapsed step"),
    "straggler": _fields("rank host step times_median", "steps"),
    "straggler_recovered": _fields("rank host step"),
    "recompiled": _fields(more="step reason"),
    "bad_page": _fields(more="file row_group rank"),
    "not_written": _fields(more="file reason"),
    "profile": _fields(more="step files"),
    "hang": _fields("reason", "step phase seconds bound suspects stacks"),
    "tracker_failed": _fields(more="reason"),
    "tracker_recovered": _fields(more="reason"),
    # The cluster's response.
    "worker_failed": _fields("rank step reason", "kind traceback"),
    "worker_lost": _fields("rank step reason", "kind traceback"),
    "policy": _fields("action reason", "failures"),
    "waiting": _fields(more="reason"),
    # Of a sweep.
    "cluster": _fields(more="machines cpus gpus"),
    "trial_started": _fields("trial workers", "cpus gpus"),
    "trial_ended": _fields("trial status", "kind reason"),
}
LAUNCH = ("resolved", "init_from", "config_changed", "forked")
"""Written by a launch, under the number of the previous attempt, which may have ended long ago."""
ALWAYS = ("time", "attempt", "event")
METRICS = ("loss", "eval_loss", "lr", "grad_norm", "tokens", "step_time", "data_wait", "tokens_per_second", "tflops",
           "mfu", "memory_gb")  # fmt: skip
RATE = "_per_second"
"""Suffix of the key of a step's rate, which begins with the unit that its task counts in: `tokens_per_second`."""

NONFINITE, DATA, CHECKPOINT = "nonfinite", "data", "checkpoint"
"""Causes in `attempt_ended` for which a restart is of no use: steps without a finite loss or gradient, a damaged page
of the data, a last checkpoint that could not be written."""
EARLY = "early_stop"
"""Cause in `attempt_ended` of a run that FINISHED before train.steps; `in_a_row`: evaluations since the best one."""


def reached_its_end(ended: Mapping[str, Any], steps: int, patience: int | None) -> bool:
    """Whether an `attempt_ended` leaves nothing to train.

    Args:
        steps, patience: the run's train.steps and train.early_stop.patience.
    """
    early = ended.get("cause") == EARLY and patience is not None and ended.get("in_a_row", 0) >= patience
    return ended["status"] == "FINISHED" and (early or ended.get("step", 0) >= steps)


class WrongEvent(UserWarning):
    """An event is written that does not match `EVENTS`: an error in the tests, a warning in a run."""


def wrong_event(record: dict[str, Any]) -> str:
    """What is wrong with a line of events.jsonl for its readers; empty if nothing."""
    return _wrong(record, ALWAYS) or _wrong(record, EVENTS.get(record["event"], Fields()).needed)


def not_in_table(record: dict[str, Any]) -> str:
    """How an event that is about to be written differs from `EVENTS`; empty if it does not."""
    name = record["event"]
    if name not in EVENTS:
        return f"there is no event {name}"
    if strange := record.keys() - {*ALWAYS, *EVENTS[name].needed, *EVENTS[name].more}:
        return f"{name} has no field {min(strange)}"
    wrong = wrong_event(record) or next(
        (_said(key, value) for key, value in record.items() if key in SHOWN and not SHOWN[key](value)), ""
    )
    return f"{name}: {wrong}" if wrong else ""


def as_now(event: dict[str, Any]) -> dict[str, Any]:
    """An event of an older version as this one would have written it."""
    if event.get("status") == "KILLED":
        event["status"] = "STOPPED"
    if event["event"] == "attempt_ended" and event["status"] == "FAILED" and "cause" not in event:
        reason = event.get("reason", "")
        if reason.startswith("TrainingStopped: ") and " in a row" in reason:
            event["cause"] = NONFINITE
    return event


def wrong_metrics(record: dict[str, Any]) -> str:
    """As `wrong_event`, for a line of metrics.jsonl."""
    if wrong := _wrong(record, ("step", "attempt", "time")):
        return wrong
    unit = unit_of(record)
    keys = METRICS if unit == "tokens" else (*METRICS, unit, unit + RATE)
    return next((_said(key, record[key]) for key in keys if not _measured(record.get(key))), "")


def unit_of(record: Mapping[str, Any]) -> str:
    """The unit in which a line of metrics.jsonl counts (tokens, images, ...), which is also the key of the count."""
    if "tokens" in record:
        return "tokens"
    return next((key.removesuffix(RATE) for key in record if key.endswith(RATE)), "tokens")


def _wrong(record: dict[str, Any], needed: tuple[str, ...]) -> str:
    if missing := [key for key in needed if key not in record]:
        return f"it has no {missing[0]}"
    for key, value in record.items():  # a hot loop: every event of every run that is listed
        if (fits := FIELDS.get(key)) and not fits(value):
            return _said(key, value)
    return ""


def _said(key: str, value: Any) -> str:
    text = ascii(value)
    return f"its {key} is {text if len(text) <= 60 else f'{text[:60]}...'}"
