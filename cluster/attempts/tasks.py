"""What `cluster.attempts.many_runs` is given to train, and how it says that each ended. Knows nothing of Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.server import waiting


class Task(NamedTuple):
    """A run, and the gang that it needs."""

    gang: waiting.Gang
    make: Callable[[], Path | None]
    """Makes the run's folder (`trainer.run.folder.prepare_run`) when there is room for it; None: not to be trained."""


class Ended(NamedTuple):
    """How a run ended: FINISHED, STOPPED (it can go on), or FAILED, as in `cluster.attempts.failures.Final`."""

    run_dir: Path
    status: str
    reason: str = ""
    kind: str = ""


class Source(Protocol):
    """What is to be trained, in its order; asked by the thread that iterates over `Trials`."""

    def next(self) -> Task | None:
        """The run that begins when there is room for it; None: none, until another has got further."""

    def more(self) -> bool:
        """Whether `next` may give another run."""
