"""What a warm process is told, and what it answers: one JSON object per line, checked on reading. Without torch."""

from typing import Literal

from pydantic import TypeAdapter

from configs.base import Typed

Fault = Literal["memory", "connection", "error"]
"""Out of memory, on the device or the machine; a broken connection, as when another process fails; anything else."""


class Order(Typed):
    """One process of an attempt."""

    run_dir: str
    folder: str
    """The user's working directory."""
    environment: dict[str, str]
    """torchrun's variables."""
    patience: float
    """See `trainer.loop.train`."""
    secret: str | None = None
    """This and `store`: how the processes of the attempt find each other, see `trainer.processes.rendezvous`."""
    store: str | None = None


class Began(Typed):
    """The first answer to an order."""

    pid: int


class Done(Typed):
    """The second answer, if training ended normally."""

    status: Literal["FINISHED", "STOPPED"]


class Failed(Typed):
    """The second answer, if it did not."""

    kind: Literal["mistake", "stopped", "broken", "lost"] | Fault
    """mistake, stopped: `reason` is the trainer's message to the user; broken: the machine cannot train; lost: the
    process is gone without an answer."""
    reason: str
    traceback: str = ""
    ranks: list[int] = []
    """Those on machines that cannot train, if known."""
    ended: bool = False
    """The process was ended from outside, like the rest of the attempt."""


Outcome = Done | Failed
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)


def read_outcome(line: str | bytes) -> Outcome:
    """Parse the second answer. Raises ValueError if the line is none."""
    return _OUTCOME.validate_json(line)
