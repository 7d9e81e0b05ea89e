"""What a warm process is told, and what it answers: a JSON object a line each, checked where it is read. No torch."""

from typing import Literal

from pydantic import TypeAdapter

from configs.base import Typed

Fault = Literal["memory", "connection", "error"]
"""A device or machine without memory; a connection that broke, as it does when another process fails; any other."""


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
    """By which the processes of the attempt find each other, and `store`: see `trainer.processes.rendezvous`."""
    store: str | None = None


class Began(Typed):
    """The first answer to an order."""

    pid: int


class Done(Typed):
    """The second answer, where the process came to an end of its own."""

    status: Literal["FINISHED", "STOPPED"]


class Failed(Typed):
    """The second answer, where it did not."""

    kind: Literal["mistake", "stopped", "broken", "lost"] | Fault
    """mistake, stopped: the trainer's own words to the user; broken: the machine cannot train; lost: it is gone without
    a word."""
    reason: str
    traceback: str = ""
    ranks: list[int] = []
    """Those of machines that cannot train, where it can be told."""
    ended: bool = False
    """It was ended from outside, as the rest of the attempt was."""


Outcome = Done | Failed
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)


def read_outcome(line: str | bytes) -> Outcome:
    """Raises ValueError: the line is none."""
    return _OUTCOME.validate_json(line)
