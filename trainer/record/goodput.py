"""Where a run's time went, from its record alone: attributes every second since its first launch to one category."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .columns import read_some_rows
from .events import LAUNCH
from .lines import read_events

BOOKS = ("step", "data_wait", "checkpoint", "evaluation", "startup", "lost", "queue", "paused", "down", "other")
"""step: forward, backward and optimizer of steps that were not lost. data_wait: waiting for data in such steps.
checkpoint: the training thread waited for a snapshot. evaluation. startup: from the launch, or from the failure before
it, to the first step. lost: steps that had to be repeated, and what a crashed attempt did after its last step. queue:
submitted, but without room on the cluster. paused: from a stop on purpose, or the end of training, to the next launch;
this is no loss, and left out of all shares. down: the same after a failure. other: between steps, and after the last
one."""


@dataclass
class Attempt:
    """One attempt's seconds by category."""

    number: int
    began: float
    """Unix seconds, of its launch or of the failure before it."""
    ended: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOOKS, 0.0))
    """Those of `paused` and `down` are before the attempt."""


def goodput(run_dir: Path) -> list[Attempt]:
    """Attribute every second of a run, up to its last sign of life; empty if no attempt has started."""
    return book(read_events(run_dir), read_steps(run_dir))


def total(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds of the whole run by category."""
    return {name: sum(attempt.seconds[name] for attempt in attempts) for name in BOOKS}


def productive(seconds: dict[str, float]) -> float:
    """Share of the time spent in steps that were not lost (goodput as in arXiv:2407.21783, section 3.3.4)."""
    return seconds["step"] / max(unpaused(seconds), 1e-9)


def unpaused(seconds: dict[str, float]) -> float:
    """Seconds in which the run was meant to train."""
    return sum(value for name, value in seconds.items() if name != "paused")


BLOCK = 1 << 16
"""Records that are booked at a time."""


class Steps(NamedTuple):
    """The training records of a run in file order, superseded ones included; each field is an array, [records]."""

    step: np.ndarray
    attempt: np.ndarray
    time: np.ndarray
    seconds: np.ndarray
    """Of the whole step, `waited` of them spent waiting for data."""
    waited: np.ndarray

    def chosen(self, which: np.ndarray | slice) -> "Steps":
        return Steps(*(column[which] for column in self))


NO_STEPS = Steps(np.zeros(0, np.int64), np.zeros(0, np.int64), *np.zeros((3, 0)))


def read_steps(run_dir: Path) -> Steps:
    """The steps of metrics.jsonl whose durations are known."""
    columns: list[list[np.ndarray]] = [[] for _ in Steps._fields]
    for rows in read_some_rows(run_dir, ("step_time", "data_wait")):
        seconds, waited = rows.values["step_time"], rows.values["data_wait"]
        some = Steps(rows.step, rows.attempt, rows.time, seconds, waited)
        some = some.chosen(~rows.evaluation & ~np.isnan(seconds) & ~np.isnan(waited))
        for column, values in zip(columns, some, strict=True):
            column.append(values)
    # Each is let go of as it is put together: a long run's are in memory once.
    return Steps(*(np.concatenate(columns.pop(0)) for _ in Steps._fields)) if columns[0] else NO_STEPS


def book(events: Sequence[dict[str, Any]], steps: Steps) -> list[Attempt]:
    """As `goodput`, from a record already read."""
    attempts: list[Attempt] = []
    ended = ""
    lost = _superseded(steps)
    if (np.diff(steps.attempt) < 0).any():
        order = np.argsort(steps.attempt, kind="stable")
        steps, lost = steps.chosen(order), lost[order]
    launches = {e.get("began", e["time"]): e.get("submitted") for e in events if e["event"] == "resolved"}
    for start in (event for event in events if event["event"] == "attempt_started"):
        number = start["attempt"]
        own = [event for event in events if event["attempt"] == number and event["time"] >= start["time"]]
        own = [event for event in own if event["event"] not in LAUNCH]
        which = slice(*np.searchsorted(steps.attempt, [number, number + 1]))
        mine = steps.chosen(which)
        before = attempts[-1].ended if attempts else None
        launched = max((time for time in launches if time <= start["time"]), default=start["time"])
        began = launched if before is None else max(before, launched)
        closed = [event["time"] for event in own if event["event"] in ("attempt_ended", "worker_lost", "worker_failed")]
        last = max([start["time"], *(event["time"] for event in own), float(mine.time.max(initial=0.0))])
        attempt = Attempt(number, began, closed[0] if closed else last)
        submitted = launches.get(launched) if launched == began else None
        queued = began if submitted is None else min(submitted, began)
        if before is not None:
            attempt.seconds["paused" if ended in ("STOPPED", "FINISHED") else "down"] = max(queued - before, 0.0)
        attempt.seconds["queue"] = began - max(queued, queued if before is None else before)
        died = not any(event["event"] == "attempt_ended" for event in own)
        _book_attempt(attempt, own, mine, lost[which], died)
        ended = next((event.get("status", "") for event in own if event["event"] == "attempt_ended"), "")
        waits = [e["time"] for e in events if e["event"] == "waiting" and began <= e["time"] <= start["time"]]
        waited = start["time"] - waits[0] if waits else 0.0
        attempt.seconds["queue"] += waited
        attempt.seconds["startup"] -= waited
        attempts.append(attempt)
    return attempts


def _book_attempt(
    attempt: Attempt, events: Sequence[dict[str, Any]], steps: Steps, lost: np.ndarray, died: bool
) -> None:
    """Book the time from each mark, a step's record or an evaluation's, to the next.

    Args:
        steps, lost: of this attempt.
    """
    seconds = attempt.seconds
    if (np.diff(steps.time) < 0).any():  # a clock that was set back
        order = np.argsort(steps.time, kind="stable")
        steps, lost = steps.chosen(order), lost[order]
    evaluations = sorted((e for e in events if e["event"] == "evaluation"), key=lambda e: e["time"])
    place = np.searchsorted(steps.time, [event["time"] for event in evaluations], "right")
    before = _Before(attempt.began, 0, False)
    count = len(steps.step)
    for begin in range(0, max(count, 1), BLOCK):
        own = slice(begin, begin + BLOCK)
        after_some = (place > begin) | (begin == 0)
        some = [evaluations[number] for number in np.flatnonzero(after_some & (place <= begin + BLOCK))]
        before = _book_marks(seconds, before, attempt.began, some, steps.chosen(own), lost[own])
    end = "startup" if not count else "lost" if died else "other"
    seconds[end] += max(attempt.ended - before.at, 0.0)
    stall = min(sum(e.get("stall_s", 0.0) for e in events if e["event"] == "checkpoint"), seconds["other"])
    seconds["checkpoint"] += stall
    seconds["other"] -= stall


class _Before(NamedTuple):
    """Where the marks before some end."""

    at: float
    step: int
    stepped: bool
    """Whether one of them is a step's."""


def _book_marks(
    seconds: dict[str, float],
    before: _Before,
    began: float,
    evaluations: Sequence[dict[str, Any]],
    steps: Steps,
    lost: np.ndarray,
) -> _Before:
    is_step = np.repeat([True, False], [len(steps.step), len(evaluations)])
    took = np.concatenate([steps.seconds, [event.get("seconds", 0.0) for event in evaluations]])
    time = np.concatenate([steps.time, [event["time"] for event in evaluations]])
    order = np.argsort(time, kind="stable")
    time, is_step = time[order], is_step[order]
    at = np.concatenate([[before.at], np.maximum(time, began)])
    span = np.maximum(time - at[:-1], 0.0)
    took = np.minimum(took[order], span)
    rest = span - took
    stepped = np.logical_or.accumulate(np.concatenate([[before.stepped], is_step]))
    evaluated = ~is_step
    seconds["evaluation"] += float(took[evaluated].sum())
    seconds["startup"] += float(rest[~stepped[:-1]].sum())
    seconds["other"] += float(rest[evaluated & stepped[:-1]].sum())

    own = order[is_step]
    lost, after = lost[own], stepped[:-1][is_step]
    number = np.concatenate([[before.step], steps.step[own]])
    took, rest, waited = took[is_step], rest[is_step], np.minimum(steps.waited[own], took[is_step])
    # Of steps that were not recorded (train.log_every) the time between records is all there is.
    unrecorded = after & (np.diff(number) > 1)
    seconds["lost"] += float(took[lost].sum() + rest[lost & unrecorded].sum())
    seconds["data_wait"] += float(waited[~lost].sum())
    seconds["step"] += float((took - waited)[~lost].sum() + rest[~lost & unrecorded].sum())
    seconds["other"] += float(rest[after & ~unrecorded].sum())
    return _Before(float(at[-1]), int(number[-1]), bool(stepped[-1]))


def _superseded(steps: Steps) -> np.ndarray:
    """Whether each record's step was repeated later, [records] of bool."""
    least = np.minimum.accumulate(steps.step[::-1])[::-1]
    return np.concatenate([steps.step[:-1] >= least[1:], [False]]) if len(least) else np.zeros(0, bool)
