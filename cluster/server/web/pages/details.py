"""The page of one run: what its record and folder say, as far as they can be read."""

import contextlib
import itertools
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.reading.parse import shortened
from trainer.record.columns.parse import MOST_NAMES
from trainer.record.goodput import BOOKS, Attempt, book, productive, read_steps, total, unpaused
from trainer.record.lines import METRICS, last_records, read_events
from trainer.record.notable import notable
from trainer.record.terminal import visible
from trainer.tracking import read_state

from ..index.config_values import Configs, flat_config
from ..index.rows import CONFIG, FILES, signature
from ..index.runs_index import Entry
from ..index.sampling import sample_records
from .folders import below, plain_files
from .logs import LOGS, log_files
from .samples import SAMPLES, samples
from .series import EXAMPLES, OF_LISTS, Columns, Flops

MOST_MARKS = 2000
MOST_TEXT = 500
MOST_EVENTS = 500
MOST_SCORES = 3
LARGE = 16 << 20
"""Bytes of metrics.jsonl from which it takes long to work out where a run's time went."""
SHORT = 0.1
"""Seconds that it may take to work out where a run's time went, whenever something is recorded."""
WEB = re.compile(r"https?://[^\s\\<>\"'@]{1,500}")
"""Addresses that become links."""
FOLDERS = ("", LOGS, SAMPLES, "plots", "profiles", "stacks", "model", "tokenizer")
"""Folders of a run whose files are listed."""
NAMES = {"step": "in steps", "data_wait": "waiting for data", "down": "down after a failure"}
"""Books of goodput as a person reads them, where their own names do not do."""


def details(entry: Entry, books: "Books", columns: Columns, at_once: bool = True) -> dict[str, Any]:
    """Everything that a run's page shows, except its curves.

    Args:
        at_once: include where its time went even if that takes long to compute; otherwise it comes `later`.
    """
    run, problems = entry.run, []

    def read(what: Callable[[], Any], without: Any) -> Any:
        try:
            return what()
        except (OSError, ValueError) as error:
            problems.append(shortened(str(error), 300))
            return without

    events = read(lambda: read_events(run.folder), [])
    train, evaluation = read(lambda: last_records(run.path / METRICS), ({}, {}))
    booked = read(lambda: books.of(run.folder) if at_once else books.soon(run.folder), [])
    metrics, left_out = read(lambda: metric_names(run.path, train, evaluation, columns), ([], 0))
    if left_out:
        problems.append(f"{left_out:,} more metrics than the {MOST_NAMES:,} that are read")
    config = flat_config(entry.config)
    if not config:
        read(lambda: Configs().read(run.path / CONFIG), ())
    return {
        "row": entry.row.plain(),
        "config": config,
        "header": _header(events, config),
        "attempts": _attempts(events),
        "marks": _marks(events),
        "goodput": _goodput(events, booked),
        "planned": _planned(events),
        "metrics": metrics,
        "samples": read(lambda: samples(run.path), []),
        "ranks": read(lambda: sorted({rank for _, rank, _ in log_files(run.path)}), []),
        "files": _files(run.path),
        "tracking": _tracking(run.path),
        "experts": _experts(train),
        "scores": _scores(evaluation, entry.row.unit),
        "references": {"unigram_entropy": _entropy(events)},
        "notable": [
            {"kind": kind, "times": each.times, "attempt": each.attempt, "time": each.time, "text": visible(each.text)}
            for kind, each in notable(events).items()
        ],
        "problems": problems,
    }


def where_time_went(entry: Entry, books: "Books") -> dict[str, Any]:
    """As `details` says it under `goodput`. Raises OSError: the record cannot be read."""
    return _goodput(read_events(entry.run.folder), books.of(entry.run.folder))


def _goodput(events: Sequence[Mapping[str, Any]], booked: Sequence[Attempt] | None) -> dict[str, Any]:
    whole = total(booked or [])
    return {
        "fraction": productive(whole) if booked else None,
        "parts": parts(whole),
        "by_attempt": [
            {"attempt": each.number, "parts": parts(each.seconds), "reason": _end_of(events, each.number)[1]}
            for each in booked or []
        ],
        "later": booked is None,
    }


class Books:
    """Where the time of runs went, kept as long as their records do not change."""

    def __init__(self, most: int = 2000) -> None:
        self._most = most
        self._known: OrderedDict[str, _Booked] = OrderedDict()
        self._lock = threading.Lock()

    def soon(self, folder: str) -> list[Attempt] | None:
        """As `of`; None where that takes long: the record is large, and nothing is known of it."""
        with self._lock:
            known = folder in self._known
        return self.of(folder) if known or signature(folder)[FILES.index(METRICS) * 2 + 1] < LARGE else None

    def of(self, folder: str) -> list[Attempt]:
        """Slightly out of date where it takes long to compute: that takes at most a twentieth of a core.

        Raises:
            OSError: the record cannot be read.
        """
        now, at = signature(folder)[:4], time.monotonic()
        with self._lock:
            known = self._known.get(folder)
        lately = known is not None and known.took > SHORT and at - known.at < 20 * known.took
        if known is None or (known.signature != now and not lately):
            attempts = book(read_events(folder), read_steps(Path(folder)))
            ended = time.monotonic()
            known = _Booked(now, attempts, ended, ended - at)
            with self._lock:
                self._known[folder] = known
                self._known.move_to_end(folder)
                if len(self._known) > self._most:
                    self._known.popitem(last=False)
        return known.attempts


class _Booked(NamedTuple):
    signature: tuple[int, ...]
    attempts: list[Attempt]
    at: float
    took: float
    """Seconds."""


def parts(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Seconds by category, without intended pauses."""
    return [
        (NAMES.get(name, name.replace("_", " ")), seconds[name]) for name in BOOKS if name != "paused" and seconds[name]
    ]


def meant(seconds: Mapping[str, float]) -> float:
    """Seconds in which a run was meant to train."""
    return unpaused(dict(seconds))


def training_flops(events: Sequence[Mapping[str, Any]]) -> Flops | None:
    """FLOPs of training, as they were counted before the run: per token, or else per example."""
    for key, units in (("flops_per_token", ("tokens",)), ("flops_per_example", EXAMPLES)):
        told = [event.get(key) for event in events if event["event"] == "plan"]
        numbers = [float(each) for each in told if isinstance(each, int | float)]
        if numbers and 0 < numbers[-1] < 1e30:
            return Flops(units, numbers[-1])
    return None


def _scores(evaluation: Mapping[str, Any], unit: str) -> list[tuple[str, float]]:
    """Scores of an evaluation, without those of averaged weights."""
    found = [
        (visible(name.removeprefix("eval_"))[:60], float(value))
        for name, value in evaluation.items()
        if name.startswith("eval_") and not name.endswith("_ema") and name not in ("eval_loss", f"eval_{unit}")
        and type(value) in (int, float)
    ]  # fmt: skip
    return found[:MOST_SCORES]


def _header(events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    last: dict[str, Mapping[str, Any]] = {event["event"]: event for event in events}
    started, plan, resolved = (last.get(name, {}) for name in ("attempt_started", "plan", "resolved"))
    return {
        "family": config.get("model.family"),
        "parameters": _whole(plan.get("parameters")),
        "active": _whole(plan.get("active_parameters")),
        "device": _text(started.get("device")),
        "world_size": _whole(started.get("world_size")),
        "host": _text(started.get("host")),
        "versions": {
            visible(str(key))[:60]: visible(str(value))[:60]
            for key, value in list((started.get("versions") or {}).items())[:20]
        }
        if isinstance(started.get("versions"), dict)
        else {},
        "commit": _text(started.get("git_commit")),
        "dirty": bool(started.get("git_dirty")),
        "command": _text(resolved.get("command"), 2000),
        "derived": [visible(str(line))[:MOST_TEXT] for line in (resolved.get("derived") or [])[:200]]
        if isinstance(resolved.get("derived"), list)
        else [],
    }


def _attempts(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        name, number = event["event"], event["attempt"]
        if name == "attempt_started":
            found[number] = {
                "n": number, "began": event["time"], "ended": None, "status": "RUNNING", "reason": None,
                "from_step": 0, "to_step": None, "last": event["time"], "world_size": _whole(event.get("world_size")),
            }  # fmt: skip
        elif number in found:
            own = found[number]
            own["last"] = max(own["last"], event["time"])
            if name == "resumed" and "step" in event:
                own["from_step"] = event["step"]
            elif name in ("attempt_ended", "hang"):
                own["ended"], own["reason"] = event["time"], _text(event.get("reason"))
                own["status"] = visible(event.get("status", "FAILED"))
                own["to_step"] = event.get("step")
            elif name in ("worker_lost", "worker_failed", "failure") and own["ended"] is None:
                own["ended"], own["status"] = event["time"], "FAILED"
                own["reason"], own["to_step"] = _text(event.get("reason")), event.get("step")
    told = list(found.values())[-1000:]
    for own, after in itertools.pairwise(told):
        if own["ended"] is None:
            own["ended"], own["status"] = own["last"], "FAILED"
            own["reason"] = "the process is gone without a message"
        if own["to_step"] is None:
            own["to_step"] = after["from_step"]
    for own in told:
        del own["last"]
    return told


def _end_of(events: Sequence[Mapping[str, Any]], attempt: int) -> tuple[str | None, str | None]:
    ends = [event for event in events if event["event"] == "attempt_ended" and event["attempt"] == attempt]
    return (ends[-1]["status"], _text(ends[-1].get("reason"))) if ends else (None, None)


KINDS = {
    "checkpoint": "checkpoint", "spike": "spike", "skipped_step": "spike", "rollback": "rollback",
    "config_changed": "config", "evaluation": "evaluation", "straggler": "straggler",
    "straggler_recovered": "straggler", "experts_collapsed": "experts", "experts_recovered": "experts",
    "failure": "failure", "worker_lost": "failure", "worker_failed": "failure", "hang": "failure",
    "checkpoint_failed": "failure", "checkpoint_refused": "failure",
}  # fmt: skip
"""What an event is on the axis of a chart."""


def _marks(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found, step = [], 0
    for event in events:
        step = event.get("step", event.get("to_step", step))
        kind = KINDS.get(event["event"])
        if event["event"] == "attempt_ended" and event["status"] == "FAILED":
            kind = "failure"
        if kind:
            text = event.get("reason") or _said(event)
            found.append({"kind": kind, "step": step, "time": event["time"], "text": _text(text)})
    if len(found) > MOST_MARKS:  # of what comes regularly, less
        rare = [mark for mark in found if mark["kind"] not in ("checkpoint", "evaluation")]
        regular = [mark for mark in found if mark["kind"] in ("checkpoint", "evaluation")]
        every = max(1, 2 * len(regular) // MOST_MARKS)
        found = sorted([*rare[-MOST_MARKS:], *regular[::-every]], key=lambda mark: mark["time"])
    return found


def _said(event: Mapping[str, Any]) -> str:
    name = event["event"]
    if name == "config_changed" and isinstance(event.get("changed"), dict):
        return ", ".join(f"{key} {_short(pair)}" for key, pair in list(event["changed"].items())[:20])
    if name == "straggler":
        return f"rank {event['rank']} on {event['host']}: {event['times_median']:.2f}x its peers' median"
    told = {key: value for key, value in event.items() if key not in ("time", "attempt", "event", "step", "traceback")}
    return name.replace("_", " ") + "".join(f", {key} {_short(value)}" for key, value in list(told.items())[:8])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) == 2:
        return f"{shortened(value[0], 60)} -> {shortened(value[1], 60)}"
    return shortened(value, 100)


def _planned(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    last: dict[str, Mapping[str, Any]] = {event["event"]: event for event in events}
    plan, measured = last.get("plan", {}), last.get("measured", {})
    memory = plan.get("memory")
    peak = _number(measured.get("predicted_peak_memory"))
    if peak is None and isinstance(memory, dict):
        peak = _number(memory.get("peak"))
    step = _number(measured.get("predicted_step_time"))
    step = _number(plan.get("step_time")) if step is None else step
    rows = [
        ("peak memory", "bytes", peak, _number(measured.get("peak_memory"))),
        ("step time", "seconds", step, _number(measured.get("step_time"))),
    ]
    tokens, took = _number(plan.get("tokens_per_second")), _number(measured.get("step_time"))
    each = _number(plan.get("tokens_per_step"))
    rows.append(("throughput", "tokens/s", tokens, each / took if each and took else None))
    return [
        {"what": what, "unit": unit, "planned": planned, "measured": came}
        for what, unit, planned, came in rows
        if planned is not None or came is not None
    ]


def metric_names(
    run_dir: Path, train: Mapping[str, Any], evaluation: Mapping[str, Any], columns: Columns
) -> tuple[list[str], int]:
    """Metrics of a run that have a curve (numbers, and what lists of numbers become), and how many more it has.

    Raises OSError.
    """
    names: dict[str, None] = {}
    for record in (train, evaluation, *sample_records(run_dir / METRICS, 20)):
        for key, value in record.items():
            if key in ("step", "attempt", "time"):
                continue
            if value is None or type(value) in (int, float, bool):
                names[key] = None
            elif isinstance(value, list) and any(type(each) in (int, float) for each in value):
                names |= dict.fromkeys(f"{key}.{how}" for how in OF_LISTS)
    known, left_out = columns.read(str(run_dir), lambda kept: (kept.columns.names(), kept.columns.left_out))
    names |= dict.fromkeys(known)
    return list(names)[:MOST_NAMES], left_out + max(len(names) - MOST_NAMES, 0)


def events_after(run_dir: Path, after: int) -> dict[str, Any]:
    """The events of a run's record after so many; the newest where there are too many to send. Raises OSError."""
    events = read_events(run_dir)
    begin = max(after, len(events) - MOST_EVENTS, 0)
    return {"events": [_told(event) for event in events[begin:]], "next": len(events)}


def _told(value: Any, depth: int = 0) -> Any:
    """Plain JSON within bounds, its texts without control characters."""
    if isinstance(value, str):
        return visible(value[:20_000])
    if isinstance(value, dict):
        return (
            {visible(str(k))[:200]: _told(v, depth + 1) for k, v in list(value.items())[:500]} if depth < 8 else "..."
        )
    if isinstance(value, list):
        return [_told(each, depth + 1) for each in value[:500]] if depth < 8 else "..."
    return value


def experts(run_dir: Path, layer: int, points: int) -> dict[str, Any]:
    """How a layer's experts were loaded over the steps; 1.0 is an even share. Raises OSError."""
    steps: list[int] = []
    columns: list[list[float | None]] = []
    for record in sample_records(run_dir / METRICS, min(max(points, 2), 400)):
        load = record.get("expert_load")
        if not (isinstance(load, list) and 0 <= layer < len(load) and isinstance(load[layer], list) and load[layer]):
            continue
        shares = [float(each) if type(each) in (int, float) else None for each in load[layer][:4096]]
        steps.append(record["step"])
        columns.append([None if share is None else share * len(shares) for share in shares])
    most = max(map(len, columns), default=0)
    rows = [[column[expert] if expert < len(column) else None for column in columns] for expert in range(most)]
    return {"steps": steps, "load": rows}


def _experts(train: Mapping[str, Any]) -> dict[str, int] | None:
    load = train.get("expert_load")
    if not (isinstance(load, list) and load and isinstance(load[0], list)):
        return None
    return {"layers": len(load), "experts": max(len(each) for each in load if isinstance(each, list))}


def _files(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in FOLDERS:
        with contextlib.suppress(OSError), below(run_dir, *filter(None, [name])) as folder:
            prefix = f"{name}/" if name else ""
            found += [
                {"name": prefix + visible(file), "bytes": size}
                for file, size in plain_files(folder)[:500]
                if not file.startswith(".")
            ]
    return found


def _tracking(run_dir: Path) -> dict[str, Any]:
    state = read_state(run_dir)
    uri, error = re.sub("//[^/@]*@", "//", str(state.get("uri") or "")), state.get("error")
    run_id, experiment = str(state.get("run_id") or ""), str(state.get("experiment_id") or "")
    ray = os.environ.get("RAY_ADDRESS", "")
    page = ""
    if re.fullmatch("[0-9a-f]{32}", run_id) and re.fullmatch("[0-9]{1,20}", experiment):
        page = f"/#/experiments/{experiment}/runs/{run_id}"  # older runs do not know their experiment's number
    return {
        "mlflow": visible(uri.rstrip("/") + page if page else uri) if WEB.fullmatch(uri) else None,
        "ray": visible(ray) if WEB.fullmatch(ray) else None,
        "run_id": _text(run_id),
        "behind": _text(error) if error else None,
    }


def _entropy(events: Sequence[Mapping[str, Any]]) -> float | None:
    for event in reversed(events):
        if event["event"] != "attempt_started":
            continue
        for item in event.get("inputs", []):
            splits = item.get("profile", {}).get("splits", {}) if isinstance(item.get("profile"), dict) else {}
            held_out = splits.get("held_out") if isinstance(splits, dict) else None
            if isinstance(held_out, dict) and (entropy := _number(held_out.get("entropy"))) is not None:
                return entropy
        return None
    return None


def _text(value: Any, most: int = MOST_TEXT) -> str | None:
    return visible(str(value)[:most]) if value not in (None, "") else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= 2**53 else None
