"""run.json: what a run's next attempt depends on besides checkpoints, made durable before anything relies on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import FailFast, StringConstraints, ValidationError

from configs import ConfigError
from configs.base import LONGEST_PATH, Typed, at_most
from configs.explain import first_reason
from configs.reading.parse import parse_json, shortened
from trainer.files.durable import write_durably
from trainer.files.own_files import read_bytes
from trainer.record.lines import EVENTS, last_attempt, read_events
from trainer.state import Count

RUN = "run.json"
MOST_BYTES = 1 << 20


class Rollback(Typed):
    """After a loss spike the run went back to a checkpoint, and went on with data beyond that checkpoint's cursor."""

    to_step: Count
    """Step of the checkpoint."""
    cursor: Count
    """Training examples consumed by the whole run, as `TrainState.cursor`: the next step reads from here."""
    rollbacks: Count
    """Number in the run so far, including this one; a checkpoint whose state has as many was written after it."""


Rollbacks = Annotated[list[Rollback], FailFast(), at_most(10_000)]
Digests = Annotated[list[Annotated[str, StringConstraints(max_length=128)]], FailFast(), at_most(100_000)]


class DurableState(Typed):
    """The content of run.json, written by the holder of the run's lock. Every key has a default: older files lack some.

    A request to stop is a file of its own (`trainer.run.stop.request_stop`): it comes from other processes, which
    would have to wait for the lock.
    """

    attempt: Count = 0
    """Number of the last attempt that began, counted from 1; 0: none has."""
    forked_from: Annotated[str, StringConstraints(max_length=LONGEST_PATH)] | None = None
    """The checkpoint that the run starts from as long as it has none of its own."""
    rollbacks: Rollbacks = []
    """Oldest first."""
    inputs: Digests = []
    """SHA-256 of each input that the last attempt read, in the order of `attempt_started`."""

    def rollback_from(self, step: int, rollbacks: int) -> Rollback | None:
        """The latest rollback to a checkpoint that happened after it was written, if any.

        Args:
            step, rollbacks: of the checkpoint's state.
        """
        later = [each for each in self.rollbacks if each.to_step == step and each.rollbacks > rollbacks]
        return later[-1] if later else None


def read_durable_state(run_dir: Path) -> DurableState:
    """The content of run.json; for a run of a version without that file, the same from its events.

    Raises:
        ConfigError: the file is not what `change_durable_state` writes.
        OSError: it is a link or not a regular file.
    """
    path = run_dir / RUN
    try:
        content = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        return from_events(read_events(run_dir))
    try:
        return DurableState.model_validate(parse_json(content))
    except ValueError as error:
        why = first_reason(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            f"{path} is damaged ({shortened(why, 200)}): restore it, or delete it to continue from {EVENTS} instead"
        ) from None


def change_durable_state(run_dir: Path, **changes: Any) -> None:
    """Change some fields, durably: they are on disk when this returns. The caller holds the run's lock.

    Raises:
        ConfigError: as `read_durable_state`.
        OSError: the file could not be written, and is unchanged.
    """
    known = read_durable_state(run_dir).model_dump()
    write_durably(run_dir / RUN, DurableState.model_validate(known | changes).model_dump())


def from_events(events: Sequence[dict[str, Any]]) -> DurableState:
    """The state of a run without run.json: older versions kept it in events."""
    started = [event for event in events if event["event"] == "attempt_started"]
    # A longer path names no checkpoint, cut or not: the start is refused as for any checkpoint that is missing.
    forks = [event["checkpoint"][:LONGEST_PATH] for event in events if event["event"] == "forked"]
    backs = [event for event in events if event["event"] == "rollback" and {"cursor", "rollbacks"} <= event.keys()]
    return DurableState(
        attempt=last_attempt(events),
        forked_from=forks[-1] if forks else None,
        rollbacks=[Rollback(**{key: back[key] for key in Rollback.model_fields}) for back in backs],
        inputs=[entry.get("digest", "") for entry in started[-1].get("inputs", [])] if started else [],
    )
