"""How the workers of a run failed. Knows nothing of Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.processes.protocol import Fault


class Final(Exception):
    """An end that a restart would only repeat.

    Args:
        kind: `mistake` of the user's, `stopped` by the trainer, or a `failure` that came twice.
        reason: for the user, one to three lines.
    """

    def __init__(self, kind: Literal["mistake", "stopped", "failure"], reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Failure:
    """How one worker ended."""

    rank: int
    reason: str
    """One line."""
    traceback: str = ""
    lost: bool = False
    """The process died without a message: it was killed, ran out of memory, or its machine is gone."""
    fault: Fault = "error"
    """What kind of exception ended it."""
    broken: tuple[int, ...] | None = None
    """Ranks whose machines failed the preflight checks (trainer.health.preflight); empty: a check failed, but it is not
    known whose machine is at fault; None: no such failure."""

    @property
    def collateral(self) -> bool:
        """Whether it follows from another worker's failure: a connection broke."""
        return self.fault == "connection"


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure that the others most likely follow from."""
    return min(failures, key=lambda failure: (not failure.lost, failure.collateral, failure.rank))


def hung(event: dict[str, Any], failure: Failure) -> Failure:
    """The failure of an attempt that was ended because it hung.

    Args:
        event: `hang`, of `trainer.health.watchdog`.
        failure: what its end looks like from outside.
    """
    rank = event["suspects"][0] if event["suspects"] else failure.rank
    return Failure(rank, event["reason"], failure.traceback, lost=True)
