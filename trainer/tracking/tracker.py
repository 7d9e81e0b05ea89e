"""The interface of a tracker: five methods, so that one other than MLflow can stand behind them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class RunInfo(NamedTuple):
    """What the tracker is told of a run."""

    name: str
    key: str
    """Identifies the run for ever: by it a tracker finds its own run if `run_id` is no longer known."""
    run_id: str | None
    started: float
    """Unix seconds."""
    parent: str | None = None
    """Key of the run that this one is shown under."""


class Sent(NamedTuple):
    """What a tracker already holds of a run: the last training step and the last evaluated step, -1 for none; and the
    experiment under which it shows it."""

    run_id: str
    step: int
    evaluation: int
    experiment_id: str


class Point(NamedTuple):
    """The metrics of one step, with the time they were recorded."""

    step: int
    time: float
    values: Mapping[str, float]


class Input(NamedTuple):
    """Something a run reads: a data set or a tokenizer."""

    name: str
    kind: str
    source: str
    digest: str
    """sha256, hexadecimal."""
    profile: Mapping[str, Any]
    """Sizes and the like."""


class Tracker(Protocol):
    """Every method may raise anything; the caller then opens again and retries, so each must be idempotent."""

    def open(self, run: RunInfo) -> Sent:
        """Create the run, or set the existing one to running. A run has one run id for life."""

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str], inputs: Sequence[Input]) -> None:
        """Set parameters (the first value of each stays), tags (the last value stays, an empty one removes the tag) and
        inputs."""

    def log(self, points: Sequence[Point]) -> None:
        """Add points; the metrics of a step are stored together or not at all."""

    def artifact(self, path: Path, folder: str) -> None:
        """Keep a file under a folder of the run (empty: its top); a file of the same name is replaced."""

    def finish(self, status: str, time: float, reason: str | None) -> None:
        """End the run as FINISHED, FAILED or STOPPED."""
