"""The state of each trial of a sweep, from its own record and the sweep's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.record.events import NONFINITE, reached_its_end
from trainer.record.lines import EVENTS, METRICS, read_events, status_of, summary
from trainer.tracking.sweep import TRIALS

State = Literal["waiting", "running", "stopped", "finished", "diverged", "failed"]
"""stopped: it has begun, and the next `muster sweep run` continues it; diverged: too many losses were not finite;
failed: for good, for any other reason."""
OVER = ("finished", "diverged", "failed")


class Standing(NamedTuple):
    """The state of one trial."""

    name: str
    state: State
    step: int = 0
    loss: float | None = None
    """Of the last training step; nats per token."""
    eval_loss: float | None = None
    reason: str = ""
    updated: float = 0.0
    """Unix time of its last sign of life."""


class Ledger:
    """Reads the states of trials again and again, but reads only the records that have changed."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self._seen: dict[str, tuple[Any, Standing]] = {}
        self._booked: dict[str, tuple[Any, dict[str, float], float]] = {}

    def standings(self, steps: Mapping[str, int]) -> dict[str, Standing]:
        """The state of every trial, in the order given.

        Args:
            steps: train.steps of each trial, by its name.
        """
        events = read_events(self.sweep_dir)
        ends, training = last_ends(events), in_training(events)
        return {name: self._standing(name, many, ends.get(name), name in training) for name, many in steps.items()}

    def _standing(self, name: str, steps: int, end: Mapping[str, Any] | None, training: bool) -> Standing:
        run_dir = self.sweep_dir / TRIALS / name
        key = (_sizes(run_dir), steps, training, end and (end["time"], end["status"]))
        if name not in self._seen or self._seen[name][0] != key:
            self._seen[name] = key, standing(run_dir, steps, end, training)
        return self._seen[name][1]

    def books(self, name: str) -> tuple[dict[str, float], float]:
        """Seconds of a trial by category of `trainer.record.goodput`, and the Unix time of its last sign of life."""
        from trainer.record.goodput import goodput, total  # numpy, which most commands need not wait for

        run_dir = self.sweep_dir / TRIALS / name
        key = _sizes(run_dir)
        if name not in self._booked or self._booked[name][0] != key:
            attempts = goodput(run_dir)
            self._booked[name] = key, total(attempts), max((attempt.ended for attempt in attempts), default=0.0)
        return self._booked[name][1:]


def _sizes(run_dir: Path) -> list[int]:
    """Sizes of its record files, which change whenever something is recorded."""
    return [path.stat().st_size for part in (EVENTS, METRICS) if (path := run_dir / part).exists()]


def standing(run_dir: Path, steps: int, end: Mapping[str, Any] | None, training: bool) -> Standing:
    """The state of one trial.

    Args:
        steps: its train.steps.
        end: its last `trial_ended` in the sweep's record.
        training: whether the sweep is training it.
    """
    found, events = summary(run_dir), read_events(run_dir)
    state: State = "stopped" if found["attempts"] else "waiting"
    reason = found["reason"] or ""
    ended = next((event for event in reversed(events) if event["event"] == "attempt_ended"), {"step": 0, "status": ""})
    if found["status"] == "FINISHED" and reached_its_end(ended, steps, patience=0):  # one that ended early did so by it
        state = "finished"
    elif training:
        state = "running"
    elif end and end["status"] == "FAILED":
        state, reason = "diverged" if diverged(events) else "failed", end.get("reason", "")
    updated = found["updated"] or 0.0
    return Standing(
        run_dir.name,
        state,
        max(found["step"], ended.get("step", 0)),
        found["loss"],
        found["eval_loss"],
        reason,
        updated,
    )


def diverged(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run's last attempt was stopped because its loss or gradient was not finite."""
    ends = [event for event in events if event["event"] == "attempt_ended"]
    return bool(ends) and ends[-1].get("cause") == NONFINITE


def finished_losses(sweep_dir: Path) -> dict[str, float]:
    """Held-out loss of each finished trial, from the trials' own records, in nats per token."""
    runs = [summary(path.parent) for path in sorted((sweep_dir / TRIALS).glob("*/config.yaml"))]
    return {
        run["name"]: run["eval_loss"] for run in runs if run["status"] == "FINISHED" and run["eval_loss"] is not None
    }


def last_ends(events: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last `trial_ended` of each trial, by its name."""
    return {event["trial"]: event for event in events if event["event"] == "trial_ended"}


def in_training(events: Sequence[dict[str, Any]]) -> set[str]:
    """Names of the trials that a sweep is training, from its own record."""
    if status_of(events)[0] != "RUNNING":
        return set()
    found: set[str] = set()
    for event in events:
        if event["event"] == "attempt_started":
            found = set()
        elif event["event"] == "trial_started":
            found.add(event["trial"])
        elif event["event"] == "trial_ended":
            found.discard(event["trial"])
    return found
