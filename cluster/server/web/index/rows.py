"""One run's row: read whole once, then brought up to date by what has been appended to its record."""

import contextlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from configs.reading.parse import shortened
from trainer.files.own_files import open_file
from trainer.record.events import RATE, wrong_metrics
from trainer.record.lines import EVENTS, HEAD, METRICS, RECENT, last_records, parse_line, read_events, summary_of
from trainer.record.terminal import visible
from trainer.run.notes import NOTES, read_notes
from trainer.run.stop import STOP

from ..responses import RunRow
from .config_values import NOTHING, Config, Configs, Section, value_of
from .sampling import sample_records

CONFIG = "config.yaml"
FILES = (EVENTS, METRICS, CONFIG, NOTES, STOP)
LIVE = ("RUNNING", "NEW")
"""States that may change without any file of the run doing so: a process may be killed without a word."""
MOST_NEW = 1 << 20
"""Bytes of metrics.jsonl that are read line by line when they have been appended; of more only the end counts."""
SPARK = 60
"""Points of the small curve."""
_OF_EVENTS = ("time", "attempt", "event", "status", "reason", "pid", "host")
"""Fields of events that the status is decided by; the others are not kept."""

Signature = tuple[int, ...]
"""Time of change in nanoseconds and size of each of `FILES`."""


class Pace(NamedTuple):
    """A line of metrics.jsonl by its head."""

    step: int
    attempt: int
    time: float


@dataclass(slots=True)
class Live:
    """What is kept of a run that is being trained, beside its row."""

    events: list[dict[str, Any]] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    offset: int = 0
    """Bytes of metrics.jsonl seen."""
    recent: list[Pace] = field(default_factory=list)
    spark: list[tuple[int, float | None]] = field(default_factory=list)
    checkpoint: tuple[int, float] | None = None
    parameters: int | None = None
    started: float | None = None


@dataclass(slots=True)
class Run:
    """A run's folder and what is known of it."""

    id: str
    folder: str
    sweep: str | None = None
    signature: Signature = ()
    """Empty: it has not been read."""
    row: RunRow | None = None
    config: Config = ()
    metrics: Section = NOTHING
    """The numbers of its last record of a step and of an evaluation."""
    live: Live | None = None
    colour: int = 0

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def pace(self) -> float | None:
        """Seconds from one step to the next of late."""
        recent = self.live.recent if self.live else []
        own = [each for each in recent if each.attempt == recent[-1].attempt]
        steps = own[-1].step - own[0].step if own else 0
        return (own[-1].time - own[0].time) / steps if steps > 0 else None


def signature(folder: str) -> Signature:
    """Of a run's files; all that are not plain files count as absent, and so do those of a folder that is a link."""
    found: list[int] = []
    if not is_folder(folder):
        return (0, -1) * len(FILES)
    for name in FILES:
        try:
            status = os.lstat(f"{folder}/{name}")
        except (OSError, ValueError):
            found += [0, -1]
            continue
        found += [status.st_mtime_ns, status.st_size] if stat.S_ISREG(status.st_mode) else [0, -1]
    return tuple(found)


def is_folder(path: str) -> bool:
    """Whether it is one itself, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_gone(now: Signature) -> bool:
    return now[FILES.index(CONFIG) * 2 + 1] < 0 and now[1] < 0 and now[3] < 0


def refresh(run: Run, now: Signature, configs: Configs) -> None:
    """Bring a run's row up to date. What cannot be read is said in its row."""
    before = run.signature
    run.signature = now
    live = run.live or Live()
    problem = ""
    try:
        if not run.live or before[:2] != now[:2]:
            _read_events(run, live)
        if not run.live or before[2:4] != now[2:4]:
            _read_metrics(run, live, now[3])
    except (OSError, ValueError, RecursionError) as error:
        problem = shortened(str(error), 300) or "it cannot be read"
    if not before or before[4:6] != now[4:6]:
        run.config = ()
        with contextlib.suppress(OSError, ValueError):  # `details` says why
            run.config = configs.read(run.path / CONFIG)
    numbers = {key: value for key, value in (live.train | live.evaluation).items() if _is_metric(key, value)}
    run.metrics = configs.section(numbers, numbers.values())
    run.row = _row(run, live, problem, stopping=now[9] >= 0)
    run.live = live if run.row.status in LIVE else None
    if run.live and not live.spark:
        with contextlib.suppress(OSError):
            records = sample_records(run.path / METRICS, SPARK)
            live.spark = [(record["step"], record.get("loss")) for record in records]


def _read_events(run: Run, live: Live) -> None:
    events = read_events(run.folder)
    live.events = [{key: event[key] for key in _OF_EVENTS if key in event} for event in events]
    live.started = min((_began(event) for event in events), default=None)
    for event in events:
        if event["event"] == "plan" and type(event.get("parameters")) is int:
            live.parameters = min(max(event["parameters"], 0), 2**53)
        elif event["event"] == "checkpoint":
            live.checkpoint = event["step"], event["time"]


def _began(event: dict[str, Any]) -> float:
    return min(event["time"], event.get("began", event["time"]))


def _read_metrics(run: Run, live: Live, size: int) -> None:
    path = run.path / METRICS
    if not live.offset or not 0 <= size - live.offset <= MOST_NEW:
        live.train, live.evaluation = last_records(path)
        live.recent = _heads(path, size)
        live.spark = []
        live.offset = max(size, 0)
        return
    with open_file(path) as file:
        file.seek(live.offset)
        new = file.read(size - live.offset)
    whole = new.rfind(b"\n") + 1
    live.offset += whole
    lines = new[:whole].splitlines()
    for line in lines:
        if head := HEAD.match(line):
            live.recent.append(Pace(int(head[1]), int(head[2]), float(head[3])))
    del live.recent[:-RECENT]
    train = evaluation = False
    for line in reversed(lines):  # the last of each counts
        is_evaluation = b'"eval_loss"' in line
        if (evaluation if is_evaluation else train) or (record := parse_line(line)) is None or wrong_metrics(record):
            continue
        if is_evaluation:
            live.evaluation, evaluation = record, True
        else:
            live.train, train = record, True
        if train and evaluation:
            break
    if train:
        step = live.train["step"]
        live.spark = [point for point in live.spark if point[0] < step] + [(step, live.train.get("loss"))]
        if len(live.spark) >= 2 * SPARK:
            live.spark = [*live.spark[-2::-2][::-1], live.spark[-1]]


def _heads(path: Path, size: int) -> list[Pace]:
    if size <= 0:
        return []
    with open_file(path) as file:
        file.seek(max(0, size - (1 << 18)))
        heads = [head for line in file.read(1 << 18).split(b"\n") if (head := HEAD.match(line))]
    return [Pace(int(head[1]), int(head[2]), float(head[3])) for head in heads[-RECENT:]]


def _row(run: Run, live: Live, problem: str, stopping: bool) -> RunRow:
    folder = os.path.basename(run.folder)
    found = summary_of(folder, live.events, live.train, live.evaluation)
    if problem:
        found |= {"status": "UNREADABLE", "reason": problem}
    elif found["status"] == "RUNNING" and stopping:
        found["reason"] = "was asked to stop, after a checkpoint"
    notes = read_notes(run.path)
    steps, family, task = (value_of(run.config, key) for key in ("train.steps", "model.family", "task"))
    return RunRow(
        id=run.id,
        name=visible(folder),
        status=visible(found["status"])[:40],
        reason=None if found["reason"] is None else visible(str(found["reason"])[:2000]),
        step=found["step"],
        steps=steps if type(steps) is int and 0 <= steps <= 2**53 else None,
        loss=_number(found["loss"]),
        eval_loss=_number(found["eval_loss"]),
        tokens=_number(found["tokens"]),
        tokens_per_second=_number(live.train.get("tokens_per_second")),
        weight=_number(found["weight"]),
        rate=_number(live.train.get(found["unit"] + RATE)),
        unit=visible(found["unit"])[:40],
        mfu=_number(live.train.get("mfu")),
        attempts=found["attempts"],
        wall_time=float(found["wall_time"]),
        updated=_number(found["updated"]),
        started=live.started,
        sweep=run.sweep,
        family=family[:100] if isinstance(family, str) else None,
        task=task[:100] if isinstance(task, str) else None,
        parameters=live.parameters,
        data=_data(run.config),
        note=visible(notes.note[:5000]),
        tags=[visible(key if value == "true" else f"{key}={value}") for key, value in notes.tags.items()],
        colour=run.colour,
    )


def _is_metric(key: str, value: Any) -> bool:
    return key not in ("step", "attempt", "time") and (value is None or type(value) in (int, float))


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _data(config: Config) -> str | None:
    """Names of the folders; of several sources one after the other."""
    path = value_of(config, "data.path")
    sources = path if isinstance(path, list) else [path]
    paths = [source.get("path") if isinstance(source, dict) else source for source in sources[:20]]
    names = [os.path.basename(each.rstrip("/")) for each in paths if isinstance(each, str)]
    return " + ".join(names)[:300] or None
