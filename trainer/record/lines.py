"""The record of a run: metrics.jsonl and events.jsonl, appended by rank 0 and read by everyone else."""

import errno
import json
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from configs import counted, mask_all
from trainer.files.own_files import LONGEST_LINE, open_file, read_bytes, read_lines
from trainer.files.plain_json import dump

from .events import WrongEvent, as_now, not_in_table, unit_of, wrong_event, wrong_metrics

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
MOST_EVENTS = 64 << 20
"""Most bytes of events.jsonl that are read: some 200,000 events, where a run of a million steps has a few thousand."""
RECENT = 100
"""The latest records, which give a run's pace."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class Record:
    """Appends to a run's record. Every line is one `write`, so that lines never mix, even if a writer is killed.

    Lines for which a full disk has no room are kept in memory, with their own times, and written before later ones.
    """

    def __init__(self, run_dir: str | Path, attempt: int) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.attempt = attempt
        self._files = {name: _open_append(self.run_dir / name) for name in (METRICS, EVENTS)}
        self._waiting: dict[str, deque[bytes]] = {name: deque() for name in self._files}
        self._lock = threading.Lock()  # a checkpoint's thread records as well

    def metrics(self, values: dict[str, Any], at: float | None = None) -> None:
        """Append a step's record (or an evaluation's, which has `eval_loss`) with this attempt and the time.

        Args:
            values: `step` and plain, numpy or torch numbers, or (nested) lists of them. Non-finite ones become null.
            at: when it was, in Unix seconds; None: now.
        """
        # step, attempt and time stand first, where `MetricsIndex` finds them without parsing the line.
        head = {"step": int(values["step"]), "attempt": self.attempt, "time": time.time() if at is None else at}
        self._write(METRICS, head | {key: value for key, value in values.items() if key not in head})

    def event(self, name: str, **details: Any) -> None:
        """Append an event of `trainer.record.events.EVENTS`; any other is written with a warning (in tests, an error).

        `attempt_started` and `resolved` get `pid` and `host`, by which others see whether the process lives.
        """
        head: dict[str, Any] = {"time": time.time(), "attempt": self.attempt, "event": name}
        if name in ("attempt_started", "resolved"):
            head |= {"pid": os.getpid(), "host": socket.gethostname()}
        line = head | mask_all(details)
        self._write(EVENTS, line)
        if wrong := not_in_table(json.loads(dump(line))):
            warnings.warn(f"event outside the table of trainer.record.events: {wrong}", WrongEvent, stacklevel=2)

    def close(self) -> None:
        """Write the lines still kept in memory; if the disk is still full, print those that are lost on stderr."""
        for name, waiting in self._waiting.items():
            with self._lock, suppress(OSError):
                self._flush(name)
            if waiting:
                print(
                    f"{self.run_dir / name}: the disk is full; its last "
                    f"{counted(len(waiting), 'line', 'is/are')} lost:",
                    file=sys.stderr,
                )
                sys.stderr.write(b"".join(waiting).decode())
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _write(self, name: str, line: dict[str, Any]) -> None:
        data = dump(line).encode() + b"\n"
        with self._lock:
            first = not self._waiting[name]
            self._waiting[name].append(data)
            try:
                self._flush(name)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if first:
                    print(
                        f"{self.run_dir / name}: {error.strerror}; lines are kept in memory until there is room",
                        file=sys.stderr,
                        flush=True,
                    )

    def _flush(self, name: str) -> None:
        waiting = self._waiting[name]
        while waiting:
            if 0 < os.write(self._files[name], waiting[0]) < len(waiting[0]):
                waiting[0] = b"\n" + waiting[0].lstrip(b"\n")  # after the torn line, which readers leave out
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            waiting.popleft()


def _open_append(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")  # the last writer was killed within a line: start on a fresh one
    return file


class Line(NamedTuple):
    """One line of metrics.jsonl: what it belongs to, and its bytes [start, end)."""

    step: int
    attempt: int
    time: float
    evaluation: bool
    start: int
    end: int


HEAD = re.compile(rb'\{"step": (\d{1,15}), "attempt": (\d{1,15}), "time": (\d{1,15}(?:\.\d+)?(?:e\+\d{1,2})?)')


class MetricsIndex:
    """The lines of metrics.jsonl that are not superseded, without their values: a long MoE run's file has many GB.

    If a training step does not come after the previous one, the run went back (a restart or a rollback), and what was
    recorded from that step on is superseded. `lines` is in file order.
    """

    def __init__(self, run_dir: str | Path, offset: int = 0) -> None:
        self.path = Path(run_dir) / METRICS
        self.offset = offset
        """Bytes read, up to the end of the last complete line."""
        self.lines: list[Line] = []
        self._step = -1
        self._evaluated: set[int] = set()

    def update(self) -> None:
        """Read the complete lines appended since the last call; none if there is no file yet."""
        try:
            with open_file(self.path) as file:
                file.seek(self.offset)
                for data in read_lines(file):
                    if not data.endswith(b"\n") and len(data) < LONGEST_LINE:
                        break  # still being written, or torn
                    self._add(data)
                    self.offset += len(data)
        except FileNotFoundError:
            return

    def _add(self, data: bytes) -> None:
        head = HEAD.match(data)
        if head is None or not data.endswith((b"}\n", b"}\r\n")):
            return  # torn by a kill
        step, attempt, written = int(head[1]), int(head[2]), float(head[3])
        line = Line(step, attempt, written, b'"eval_loss"' in data, self.offset, self.offset + len(data))
        if line.evaluation:
            if step in self._evaluated:
                self.lines = [old for old in self.lines if not (old.evaluation and old.step == step)]
            self._evaluated.add(step)
        else:
            if step <= self._step:
                self.lines = [old for old in self.lines if old.step < step]
            self._step = step
        self.lines.append(line)

    def forget_rolled_back(self, events: Sequence[dict[str, Any]]) -> None:
        """Drop lines that a `rollback` event has undone but no later line has superseded yet."""
        for event in events:
            if event["event"] == "rollback":
                to_step, before = event["to_step"], (event["attempt"], event["time"])
                self.lines = [old for old in self.lines if old.step <= to_step or (old.attempt, old.time) > before]

    def read(self, chosen: Sequence[Line]) -> Iterator[dict[str, Any]]:
        """The records of these lines, in their order."""
        if not chosen:
            return
        with open_file(self.path) as file:
            for line in chosen:
                file.seek(line.start)
                record = parse_line(file.read(line.end - line.start))
                if record is not None and not wrong_metrics(record):
                    yield record


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records that are not superseded, in step order: each step, and each evaluation (has `eval_loss`), once."""
    index = MetricsIndex(run_dir)
    index.update()
    index.forget_rolled_back(read_events(run_dir))
    return list(index.read(sorted(index.lines, key=lambda line: (line.step, line.evaluation))))


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every event, oldest first. Torn lines are left out, and so, with a message, are those that `wrong_event` refuses.

    Raises:
        OSError: it is not a regular file, or larger than any run writes.
    """
    path = Path(run_dir) / EVENTS
    try:
        data = read_bytes(path, MOST_EVENTS)
    except FileNotFoundError:
        return []
    events, left_out = [], ""
    for number, line in enumerate(data.split(b"\n"), 1):
        event = parse_line(line)
        if event is None:
            continue
        if wrong := wrong_event(event):
            left_out = left_out or f"{path}: line {number} is skipped, and perhaps more: {wrong}"
        else:
            events.append(as_now(event))
    if left_out:
        _say_once(left_out)
    return events


@cache
def _say_once(words: str) -> None:
    """Print a message only once, as the record is read repeatedly."""
    print(words, file=sys.stderr, flush=True)


def summary(run_dir: str | Path) -> dict[str, Any]:
    """A run in one row, from its events and the tail of its metrics: cheap however long the run is.

    Returns:
        `name`; `status` (RUNNING, FINISHED, FAILED, STOPPED, or NEW: no attempt has begun) and its `reason`; `step`,
        `loss` of the last training record and `eval_loss` of the last evaluation (for a language model in nats per
        token; None if there is none); `weight`, how much was trained on, in its `unit`, and `tokens`, the same if that
        is the unit, else None; `attempts`; `wall_time` in seconds over all attempts; `updated` in Unix seconds, or
        None.
    """
    run_dir = Path(run_dir)
    return summary_of(run_dir.resolve().name, read_events(run_dir), *last_records(run_dir / METRICS))


def summary_of(
    name: str, events: Sequence[dict[str, Any]], train: dict[str, Any], evaluation: dict[str, Any]
) -> dict[str, Any]:
    """As `summary`, from a record already read: its events, and the last record of a step and of an evaluation."""
    updated = max((item["time"] for item in (*events[-1:], train, evaluation) if item), default=None)
    status, reason = status_of(events)
    unit = unit_of(train)
    weight = train.get(unit, 0)
    return {
        "name": name,
        "status": status,
        "reason": reason,
        "step": train.get("step", 0),
        "loss": train.get("loss"),
        "eval_loss": evaluation.get("eval_loss"),
        "tokens": weight if unit == "tokens" else None,
        "weight": weight,
        "unit": unit,
        "attempts": last_attempt(events),
        "wall_time": _wall_time(events, updated),
        "updated": updated,
    }


def last_attempt(events: Sequence[dict[str, Any]]) -> int:
    """Number of the last attempt in the record, counted from 1; 0: none has begun."""
    return max((event["attempt"] for event in events if event["event"] == "attempt_started"), default=0)


def pace(run_dir: str | Path) -> float | None:
    """Recent seconds per step, including all that happens between steps; None if too little is recorded."""
    try:
        with open(Path(run_dir) / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 20)))
            heads = [head for line in file.read().split(b"\n") if (head := HEAD.match(line))]
    except FileNotFoundError:
        return None
    own = [head for head in heads[-RECENT:] if head[2] == heads[-1][2]]
    steps = int(own[-1][1]) - int(own[0][1]) if own else 0
    return (float(own[-1][3]) - float(own[0][3])) / steps if steps > 0 else None


def status_of(events: Sequence[dict[str, Any]]) -> tuple[str, str | None]:
    """A run's status and its reason, from its last attempt; FAILED if its process is gone without a message.

    A launch that was stopped before the first attempt has an `attempt_ended` without an `attempt_started`.
    """
    started = [event for event in events if event["event"] == "attempt_started"]
    if not started:
        last = next((event for event in reversed(events) if event["event"] in ("resolved", "attempt_ended")), None)
        return (last["status"], last.get("reason")) if last and last["event"] == "attempt_ended" else ("NEW", None)
    last = started[-1]
    for event in reversed(events):
        if event["event"] == "attempt_ended" and event["attempt"] == last["attempt"]:
            return event["status"], event.get("reason")
        if event["event"] == "hang" and event["attempt"] == last["attempt"]:
            return "FAILED", event["reason"]
    if last.get("host") == socket.gethostname() and not _alive(last.get("pid", 0)):
        return "FAILED", "the process is gone without a message (killed, or out of memory)"
    return "RUNNING", None


def in_use(events: Sequence[dict[str, Any]]) -> str:
    """The process that trains a run, or is about to, as far as can be seen from here; empty if none."""
    started = [event for event in events if event["event"] == "attempt_started"]
    launched = [event for event in events if event["event"] == "resolved" and "pid" in event]
    if started and status_of(events)[0] == "RUNNING":
        return _process(started[-1])
    over = not events or events[-1]["event"] == "attempt_ended" or events[-1].get("action") == "stop"
    if over or not launched:
        return ""
    here = launched[-1].get("host") == socket.gethostname()
    return "" if here and not _alive(launched[-1]["pid"]) else _process(launched[-1])


def _process(event: dict[str, Any]) -> str:
    return f"process {event.get('pid')} on {event.get('host')}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _wall_time(events: Sequence[dict[str, Any]], updated: float | None) -> float:
    """Seconds in attempts; one that was killed counts up to its last sign of life."""
    total, begin, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "attempt_started":
            total += last - begin if begin is not None else 0.0
            begin = event["time"]
        last = event["time"]
        if event["event"] == "attempt_ended" and begin is not None:
            total, begin = total + last - begin, None
    return total + (max(updated or last, last) - begin if begin is not None else 0.0)


def last_records(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Last training and last evaluation record, read from the end; the search for an evaluation stops after 16 MB."""
    train: dict[str, Any] = {}
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            block = 1 << 16
            while True:
                start = max(0, size - block)
                file.seek(start)
                lines = file.read(size - start).split(b"\n")[1 if start else 0 :]
                evaluation: dict[str, Any] = {}
                for line in reversed(lines):
                    is_evaluation = b'"eval_loss"' in line
                    if (evaluation if is_evaluation else train) or (record := parse_line(line)) is None:
                        continue
                    if wrong_metrics(record):
                        continue
                    if is_evaluation:
                        evaluation = record
                    else:
                        train = record
                    if train and evaluation:
                        return train, evaluation
                if start == 0 or block >= 1 << 24:
                    return train, evaluation
                block *= 4
    except FileNotFoundError:
        return {}, {}


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the record; None if it is torn or not a mapping."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # torn, not UTF-8, or nested too deeply
        return None
    return record if isinstance(record, dict) else None
