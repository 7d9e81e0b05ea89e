"""run.json: what a run's next attempt depends on beside its checkpoints, on the disk before anything relies on it."""

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
    """After a loss spike the run went back to a checkpoint; its next step reads further on than the checkpoint says."""

    to_step: Count
    """Step of the checkpoint."""
    cursor: Count
    """Training sequences consumed by the whole run, as `TrainState.cursor`."""
    rollbacks: Count
    """Of the run so far, this one included; a checkpoint whose state has as many was written after it."""


Rollbacks = Annotated[list[Rollback], FailFast(), at_most(10_000)]
Digests = Annotated[list[Annotated[str, StringConstraints(max_length=128)]], FailFast(), at_most(100_000)]


class DurableState(Typed):
    """All of run.json. Whoever holds the run's lock writes it; every key has a default, as older files lack newer ones.

    A request to stop is a file of its own (`trainer.run.stop.request_stop`): it comes from other processes, which
    would have to wait for the lock.
    """

    attempt: Count = 0
    """The last attempt that has begun, counted from 1; 0: none has."""
    forked_from: Annotated[str, StringConstraints(max_length=LONGEST_PATH)] | None = None
    """The checkpoint that the run begins with while it has none of its own."""
    rollbacks: Rollbacks = []
    """Oldest first."""
    inputs: Digests = []
    """SHA-256 of each input that the last attempt read, in the order of `attempt_started`."""

    def rollback_from(self, step: int, rollbacks: int) -> Rollback | None:
        """The rollback that a checkpoint has not seen, if any.

        Args:
            step, rollbacks: of the checkpoint's state.
        """
        later = [each for each in self.rollbacks if each.to_step == step and each.rollbacks > rollbacks]
        return later[-1] if later else None


def read_durable_state(run_dir: Path) -> DurableState:
    """What run.json says; of a run from before there was one, what its events do.

    Raises:
        ConfigError: the file is not what `change_durable_state` writes.
        OSError: it is a link or no plain file.
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
            f"{path} is damaged ({shortened(why, 200)}): restore it, or delete it to go on from what {EVENTS} says"
        ) from None


def change_durable_state(run_dir: Path, **changes: Any) -> None:
    """Set some of it, on the disk when this returns. The caller holds the run's lock.

    Raises:
        ConfigError: as `read_durable_state`.
        OSError: it could not be written; the file is as before.
    """
    known = read_durable_state(run_dir).model_dump()
    write_durably(run_dir / RUN, DurableState.model_validate(known | changes).model_dump())


def from_events(events: Sequence[dict[str, Any]]) -> DurableState:
    """The state of a run that has no run.json, as older versions kept it."""
    started = [event for event in events if event["event"] == "attempt_started"]
    # A longer path is no checkpoint's, and neither is what is left of it: the start is refused as for any other.
    forks = [event["checkpoint"][:LONGEST_PATH] for event in events if event["event"] == "forked"]
    backs = [event for event in events if event["event"] == "rollback" and {"cursor", "rollbacks"} <= event.keys()]
    return DurableState(
        attempt=last_attempt(events),
        forked_from=forks[-1] if forks else None,
        rollbacks=[Rollback(**{key: back[key] for key in Rollback.model_fields}) for back in backs],
        inputs=[entry.get("digest", "") for entry in started[-1].get("inputs", [])] if started else [],
    )
