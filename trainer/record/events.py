"""What a line of a run's record must be for its readers: a field that is not is a line that they leave out."""

import math
from collections.abc import Callable
from typing import Any


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**53


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -1e18 < value < 1e18 and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _inputs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and _text(item.get("digest", "")) for item in value)


def _experts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(who, list) for who in value.values())


def _measured(value: Any) -> bool:
    """What is null where it was not finite."""
    return value is None or _number(value)


FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("step", "attempt", "from_step", "to_step", "cursor", "rollbacks", "every", "rank", "pid", "world_size",
         "workers", "bytes", "in_a_row", "collapsed"),
        _count,
    ),
    **dict.fromkeys(
        ("time", "interval_s", "cost_s", "write_s", "step_s", "mtbf_s", "stall_s", "seconds", "began", "submitted",
         "times_median", "cpus", "gpus"),
        _number,
    ),
    **dict.fromkeys(("event", "status", "reason", "kind", "action", "host", "checkpoint", "trial", "traceback"), _text),
    **dict.fromkeys(("broken", "slow", "problems"), _texts),
    "stacks": lambda value: isinstance(value, list),
    "inputs": _inputs,
    "experts": _experts,
    "tracking": _mapping,
}  # fmt: skip
"""Fields that mean the same in every event that has them; what others hold is shown and nothing more."""
NEEDED: dict[str, tuple[str, ...]] = {
    "attempt_ended": ("status",),
    "cadence": ("every", "cost_s", "write_s", "step_s"),
    "checkpoint": ("step",),
    "experts_collapsed": ("experts", "collapsed", "step"),
    "experts_recovered": ("experts", "collapsed", "step"),
    "forked": ("checkpoint",),
    "hang": ("reason",),
    "policy": ("action", "reason"),
    "preflight": ("broken", "slow"),
    "rollback": ("to_step",),
    "skipped_step": ("step",),
    "straggler": ("rank", "host", "step", "times_median"),
    "straggler_recovered": ("rank", "host", "step"),
    "trial_ended": ("trial", "status"),
    "trial_started": ("trial", "workers"),
    "worker_failed": ("rank", "step", "reason"),
    "worker_lost": ("rank", "step", "reason"),
}
"""Fields that an event's readers do without in no case; every one has time, attempt and event."""
METRICS = ("loss", "eval_loss", "lr", "grad_norm", "tokens", "step_time", "data_wait", "tokens_per_second", "tflops",
           "mfu", "memory_gb")  # fmt: skip


def wrong_event(record: dict[str, Any]) -> str:
    """What is wrong with a line of events.jsonl; empty if nothing."""
    return _wrong(record, ("time", "attempt", "event")) or _wrong(record, NEEDED.get(record["event"], ()))


def wrong_metrics(record: dict[str, Any]) -> str:
    """The same of metrics.jsonl."""
    if wrong := _wrong(record, ("step", "attempt", "time")):
        return wrong
    return next((_said(key, record[key]) for key in METRICS if not _measured(record.get(key))), "")


def _wrong(record: dict[str, Any], needed: tuple[str, ...]) -> str:
    if missing := [key for key in needed if key not in record]:
        return f"it has no {missing[0]}"
    return next((_said(key, value) for key, value in record.items() if key in FIELDS and not FIELDS[key](value)), "")


def _said(key: str, value: Any) -> str:
    text = ascii(value)
    return f"its {key} is {text if len(text) <= 60 else f'{text[:60]}...'}"
