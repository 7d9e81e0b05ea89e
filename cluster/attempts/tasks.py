"""What `cluster.attempts.many_runs` takes, runs to train, and what it yields, how each ended. Knows nothing of Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.server import waiting


class Task(NamedTuple):
    """A run, and the gang that it needs."""

    gang: waiting.Gang
    make: Callable[[], Path | None]
    """Creates the run's folder (`trainer.run.folder.prepare_run`) once there is room; None: the run is not trained."""


class Ended(NamedTuple):
    """How a run ended: FINISHED, STOPPED (it can go on), or FAILED, as in `cluster.attempts.failures.Final`."""

    run_dir: Path
    status: str
    reason: str = ""
    kind: str = ""


class Source(Protocol):
    """Runs to train, in order; called from the thread that iterates over `Trials`."""

    def next(self) -> Task | None:
        """The next run, which starts once there is room; None: none until another run has progressed or ended."""

    def more(self) -> bool:
        """Whether `next` may give another run."""
