"""Find where a run stands and put its engine there; go back when the loss spikes."""

from pathlib import Path
from typing import Any

from torch import distributed as dist

from configs import Config, ConfigError

from . import checkpoint
from .checkpoint import CheckpointError, Reader
from .collectives import from_all, from_chief
from .engine import restore_loss_scale
from .record import Record, read_events
from .save import restore
from .state import TrainState


def resume(run_dir: Path, engine: Any, state: TrainState, record: Record | None) -> None:
    """Bring the engine and `state` to the newest checkpoint whose every byte is as it was written.

    The processes share the reading for the check. A newer checkpoint that fails it is set aside under another name
    and recorded; what was half written is deleted. A run without checkpoints starts from its initial weights, or from
    the checkpoint it was forked from.

    Raises:
        ConfigError: there are checkpoints and none can be used, or they are another model's.
    """
    refused = []
    path: Path | None = None
    for step in reversed(from_chief(lambda: checkpoint.committed(run_dir))):
        candidate = checkpoint.folder(run_dir, step)
        if problems := _check_together(candidate):
            refused.append(problems[0])
            _set_aside(candidate, step, problems, record)
        else:
            path = candidate
            break
    if record:
        _sweep(run_dir)
    if path is None and refused:
        raise ConfigError(
            f"no checkpoint of {run_dir} can be used: {refused[0]}.\n"
            f"They are kept as {run_dir}/checkpoints/*.refused; the next start begins at step 0"
        )
    events = from_chief(lambda: read_events(run_dir))
    if path is None:
        forks = [event for event in events if event["event"] == "forked"]
        path = Path(forks[-1]["checkpoint"]) if forks else None
        if path and (problems := _check_together(path)):
            raise ConfigError(f"the checkpoint this run was forked from cannot be used: {problems[0]}")
    if path is None:
        return
    load(path, engine, state)
    # A rollback moved the cursor on without a checkpoint of its own yet.
    backs = [event for event in events if event["event"] == "rollback" and event["to_step"] == state.step]
    if backs and events.index(backs[-1]) > _last_save(events, state.step):
        state.cursor, state.rollbacks = backs[-1]["cursor"], backs[-1]["rollbacks"]
    if record:
        record.event("resumed", step=state.step, cursor=state.cursor, checkpoint=str(path))


def load(path: Path, engine: Any, state: TrainState) -> None:
    """Load a verified checkpoint. Raises ConfigError if its parameters are not the model's."""
    try:
        reader = Reader(path)
        restore(engine, reader)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint does not fit the model: {error}") from None
    try:
        vars(state).update(vars(TrainState(**reader.manifest["state"])))
    except TypeError as error:
        raise ConfigError(f"{path} was written by another version of muster: {error}") from None
    restore_loss_scale(engine, state.loss_scale)


def roll_back(run_dir: Path, engine: Any, state: TrainState, config: Config, record: Record | None) -> None:
    """After a spike: weights, moments and step of the last checkpoint, the cursor after the batch that spiked.

    Raises:
        ConfigError: there is no checkpoint to go back to, or it happened train.spike.max_rollbacks times.
    """
    spiked, cursor, rollbacks = state.step, state.cursor, state.rollbacks + 1
    steps = from_chief(lambda: checkpoint.committed(run_dir))
    if not steps or rollbacks > config.train.spike.max_rollbacks:
        why = "there is no checkpoint before it" if not steps else f"it is spike {rollbacks} of this run"
        raise ConfigError(
            f"the loss spiked at step {spiked} and {why}: lower optim.lr, or raise train.spike.deviations "
            f"or train.spike.max_rollbacks"
        )
    load(checkpoint.folder(run_dir, steps[-1]), engine, state)
    left_out = (state.cursor, cursor)
    state.cursor, state.rollbacks = cursor, rollbacks
    if record:
        record.event(
            "rollback", from_step=spiked, to_step=state.step, cursor=cursor, left_out=left_out, rollbacks=rollbacks
        )


def _check_together(path: Path) -> list[str]:
    mine = checkpoint.verify(path, dist.get_rank(), dist.get_world_size())
    return [problem for problems in from_all(mine) for problem in problems]


def _set_aside(path: Path, step: int, problems: list[str], record: Record | None) -> None:
    if record:
        target = path.with_name(f"{path.name}.refused")
        checkpoint.remove(target)
        path.rename(target)
        record.event("checkpoint_refused", step=step, problems=problems, kept_as=target.name)
    dist.barrier()


def _sweep(run_dir: Path) -> None:
    """Delete checkpoint folders that a killed attempt left without a manifest."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        if path.name[5:].isdigit() and not (path / checkpoint.MANIFEST).exists():
            checkpoint.remove(path)


def _last_save(events: list[dict[str, Any]], step: int) -> int:
    saves = [i for i, event in enumerate(events) if event["event"] == "checkpoint" and event["step"] == step]
    return saves[-1] if saves else -1
