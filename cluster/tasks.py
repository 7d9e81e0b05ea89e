"""What `cluster.trials` is given to train, and how it says that each ended. Knows nothing of Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from . import queue


class Task(NamedTuple):
    """A run, and the gang that it needs."""

    gang: queue.Gang
    make: Callable[[], Path | None]
    """Makes the run's folder (`trainer.run.prepare_run`) when there is room for it; None: it is not to be trained."""


class Ended(NamedTuple):
    """How a run ended: FINISHED, STOPPED (it can go on), or FAILED, in the words of `cluster.failures.Final`."""

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
