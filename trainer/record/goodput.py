"""Where a run's time went, from its record alone: every second from its first launch on, in one of a few books."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainer.files.own_files import open_file, read_lines

from .lines import METRICS, read_events

BOOKS = ("step", "data_wait", "checkpoint", "evaluation", "startup", "lost", "queue", "paused", "down", "other")
"""step: forward, backward, optimizer of steps that count. data_wait: without data in such steps. checkpoint: the
training thread waited for a snapshot. evaluation. startup: from the launch, or from the failure that it follows, to the
first step. lost: steps that were done again, and what an attempt that died did after its last one. queue: it was
submitted and had no room on the cluster. paused: it had been stopped on purpose, or had finished, until it was
launched again; that is no loss, and in no share. down: the same after a failure. other: between steps, and after the
last one."""


@dataclass
class Attempt:
    """One attempt's seconds by book, and what it took."""

    number: int
    began: float
    """Unix seconds, of its launch or of the failure before it."""
    ended: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOOKS, 0.0))
    """`paused` or `down` is the time before it."""


def goodput(run_dir: Path) -> list[Attempt]:
    """Book every second of a run's life, up to its last sign of life; empty if nothing has started."""
    return book(read_events(run_dir), list(read_steps(run_dir / METRICS)))


def total(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds of the whole run by book."""
    return {name: sum(attempt.seconds[name] for attempt in attempts) for name in BOOKS}


def productive(seconds: dict[str, float]) -> float:
    """Share of the time that went into steps that count (goodput as in arXiv:2407.21783, section 3.3.4)."""
    return seconds["step"] / max(unpaused(seconds), 1e-9)


def unpaused(seconds: dict[str, float]) -> float:
    """Seconds in which the run was meant to train."""
    return sum(value for name, value in seconds.items() if name != "paused")


class Step(NamedTuple):
    """One training record, superseded ones included."""

    step: int
    attempt: int
    time: float
    seconds: float
    waited: float


_NUMBER = rb"(\d{1,15}(?:\.\d+)?(?:e[+-]\d{1,2})?)"
_LINE = re.compile(
    rb'\{"step": (\d{1,15}), "attempt": (\d{1,15}), "time": '
    + _NUMBER
    + rb'.*"data_wait": '
    + _NUMBER
    + rb', "step_time": '
    + _NUMBER
)


def read_steps(path: Path) -> Iterator[Step]:
    """The training records of metrics.jsonl in the order of the file, without parsing the rest of a line."""
    if not path.exists():
        return
    with open_file(path) as file:
        for line in read_lines(file):
            if found := _LINE.match(line):
                step, attempt, time, waited, seconds = found.groups()
                yield Step(int(step), int(attempt), float(time), float(seconds), float(waited))


def book(events: Sequence[dict[str, Any]], steps: Sequence[Step]) -> list[Attempt]:
    """As `goodput`, of a record that was read."""
    attempts: list[Attempt] = []
    lost, ended = _superseded(steps), ""
    launches = {e.get("began", e["time"]): e.get("submitted") for e in events if e["event"] == "resolved"}
    for start in (event for event in events if event["event"] == "attempt_started"):
        number = start["attempt"]
        own = [event for event in events if event["attempt"] == number and event["time"] >= start["time"]]
        mine = [step for step in steps if step.attempt == number]
        before = attempts[-1].ended if attempts else None
        launched = max((time for time in launches if time <= start["time"]), default=start["time"])
        began = launched if before is None else max(before, launched)
        closed = [event["time"] for event in own if event["event"] in ("attempt_ended", "worker_lost", "worker_failed")]
        last = max([start["time"], *(event["time"] for event in own), *(step.time for step in mine)])
        attempt = Attempt(number, began, closed[0] if closed else last)
        submitted = launches.get(launched) if launched == began else None
        queued = began if submitted is None else min(submitted, began)
        if before is not None:
            attempt.seconds["paused" if ended in ("STOPPED", "FINISHED") else "down"] = max(queued - before, 0.0)
        attempt.seconds["queue"] = began - max(queued, queued if before is None else before)
        died = not any(event["event"] == "attempt_ended" for event in own)
        _book_attempt(attempt, own, mine, lost, died)
        ended = next((event.get("status", "") for event in own if event["event"] == "attempt_ended"), "")
        waits = [e["time"] for e in events if e["event"] == "waiting" and began <= e["time"] <= start["time"]]
        waited = start["time"] - waits[0] if waits else 0.0
        attempt.seconds["queue"] += waited
        attempt.seconds["startup"] -= waited
        attempts.append(attempt)
    return attempts


def _book_attempt(
    attempt: Attempt, events: Sequence[dict[str, Any]], steps: Sequence[Step], lost: set[Step], died: bool
) -> None:
    seconds, at, step_before = attempt.seconds, attempt.began, None
    evaluations = [event for event in events if event["event"] == "evaluation"]
    marks: list[tuple[float, Any]] = [*((step.time, step) for step in steps), *((e["time"], e) for e in evaluations)]
    for time, mark in sorted(marks, key=lambda pair: pair[0]):
        span, at = max(time - at, 0.0), max(time, at)
        if not isinstance(mark, Step):
            took = min(mark.get("seconds", 0.0), span)
            seconds["evaluation"] += took
            seconds["other" if step_before is not None else "startup"] += span - took
            continue
        took = min(mark.seconds, span)
        # Of steps that were not recorded (train.log_every) the time between records is all there is.
        unrecorded = step_before is not None and mark.step > step_before + 1
        between = "startup" if step_before is None else "step" if unrecorded else "other"
        waited = min(mark.waited, took)
        if mark in lost:
            seconds["lost"] += took + (span - took if unrecorded else 0.0)
            seconds[between] += 0.0 if unrecorded else span - took
        else:
            seconds["data_wait"] += waited
            seconds["step"] += took - waited
            seconds[between] += span - took
        step_before = mark.step
    rest = "startup" if step_before is None else "lost" if died else "other"
    seconds[rest] += max(attempt.ended - at, 0.0)
    stall = min(sum(e.get("stall_s", 0.0) for e in events if e["event"] == "checkpoint"), seconds["other"])
    seconds["checkpoint"] += stall
    seconds["other"] -= stall


def _superseded(steps: Sequence[Step]) -> set[Step]:
    """Records of steps that were done again later."""
    found, first_after = set(), float("inf")
    for step in reversed(steps):
        if step.step >= first_after:
            found.add(step)
        first_after = min(first_after, step.step)
    return found
