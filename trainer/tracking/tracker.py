"""What a tracker must be able to do: five methods, so that another one than MLflow fits behind them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class RunInfo(NamedTuple):
    """A run as the tracker is told of it."""

    name: str
    key: str
    """Identifies the run for ever: a tracker finds its own run by it when `run_id` is not known any more."""
    run_id: str | None
    started: float
    """Unix seconds."""
    parent: str | None = None
    """Key of the run that this one is shown under."""


class Sent(NamedTuple):
    """What a tracker already holds of a run: the last training step and the last evaluated step, -1 for none."""

    run_id: str
    step: int
    evaluation: int


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
    """Every method may raise anything; the caller then opens again and repeats, so each must bear repetition."""

    def open(self, run: RunInfo) -> Sent:
        """Make the run, or take up the existing one as running. The same run id for the life of the run."""

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str], inputs: Sequence[Input]) -> None:
        """Parameters (the first value of each stays), tags (the last value stays) and inputs."""

    def log(self, points: Sequence[Point]) -> None:
        """Add points; a step's point is taken whole or not at all."""

    def artifact(self, path: Path, folder: str) -> None:
        """Keep a file under a folder of the run (empty: its top); a file of the same name is replaced."""

    def finish(self, status: str, time: float, reason: str | None) -> None:
        """End the run as FINISHED, FAILED or STOPPED."""
