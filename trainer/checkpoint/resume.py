"""Find the newest usable checkpoint and load it; roll back when the loss spikes."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from torch import distributed as dist

from configs import Config, ConfigError, counted
from configs.reading.parse import shortened
from models.tasks.learner import Learner
from trainer.engine.engine import Engine
from trainer.processes.collectives import from_all, from_chief
from trainer.record.lines import Record
from trainer.run.durable_state import DurableState, Rollback, change_durable_state, read_durable_state
from trainer.state import TrainState

from . import manifest, store
from .manifest import CheckpointError
from .memory import wrong_memory
from .save import misfit, restore
from .store import Reader

Engines = Sequence[Engine]
"""One engine for each network that a process trains."""


def resume(run_dir: Path, engines: Engines, state: TrainState, learner: Learner, record: Record | None) -> None:
    """Restore the engines and `state` from the newest checkpoint that verifies.

    The processes divide the files to verify among them. A newer checkpoint that does not verify is renamed and
    recorded; partly written ones are deleted. A run without checkpoints starts from its initial weights, or from the
    checkpoint it was forked from.

    Raises:
        ConfigError: there are checkpoints, but none can be used. Intact checkpoints of another model are left in place.
    """
    refused: list[tuple[Path, list[str]]] = []
    fits = True
    reader = None
    for step in reversed(from_chief(lambda: manifest.committed(run_dir))):
        candidate = manifest.folder(run_dir, step)
        reader, problems = _check_together(candidate)
        if reader and (problems := _misfits(reader, engines, learner)):
            reader, fits = None, False
        if reader:
            break
        refused.append((candidate, problems))
    if refused and not reader and not fits:
        raise ConfigError(f"checkpoint does not fit the model: {refused[0][1][0]}")
    for path, problems in refused:
        _set_aside(path, problems, record)
    if record:
        _sweep(run_dir)
    if refused and not reader:
        raise ConfigError(
            f"no checkpoint of {run_dir} can be used: {refused[0][1][0]}.\n"
            f"They are kept as {run_dir}/checkpoints/*.refused; the next start begins at step 0"
        )
    durable = DurableState(**from_chief(lambda: read_durable_state(run_dir).model_dump()))
    if not reader and durable.forked_from is not None:
        reader, problems = _check_together(Path(durable.forked_from))
        problems = problems if not reader else _misfits(reader, engines, learner)
        if problems:
            raise ConfigError(f"the checkpoint that this run was forked from cannot be used: {problems[0]}")
    if not reader:
        return
    load(reader, engines, state)
    if back := durable.rollback_from(state.step, state.rollbacks):
        state.cursor, state.rollbacks = back.cursor, back.rollbacks
    if record:
        record.event("resumed", step=state.step, cursor=state.cursor, checkpoint=str(reader.path))
        for reason in _other_averages(reader, engines):
            record.event("ema_changed", step=state.step, reason=reason)


def _other_averages(reader: Reader, engines: Engines) -> list[str]:
    """Messages about averages that the checkpoint lacks, or that it has but the run no longer keeps."""
    found = []
    for engine in engines:
        of, held = engine.prefix.rstrip(".") or "the weights", any(n.startswith(engine.prefix) for n in reader.averaged)
        if engine.ema and not held:
            found.append(f"the checkpoint has no average of {of}: the average starts from its weights")
        elif held and not engine.ema:
            found.append(
                f"the checkpoint's average of {of} is not used: neither optim.ema_decay nor optim.swa_from is set"
            )
    return found


def load(reader: Reader, engines: Engines, state: TrainState) -> None:
    """Load a verified checkpoint. Raises ConfigError if its parameters do not fit the model."""
    try:
        for engine in engines:
            restore(engine, reader)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint does not fit the model: {error}") from None
    vars(state).update(vars(reader.manifest.state))
    for engine in engines:
        engine.restore_loss_scale(state.loss_scale)


def roll_back(run_dir: Path, engines: Engines, state: TrainState, config: Config, record: Record | None) -> None:
    """After a loss spike: restore weights, moments and step from the last checkpoint, but keep the cursor, which is
    past the batch that spiked.

    Raises:
        ConfigError: there is no checkpoint to go back to, or train.spike.max_rollbacks is exceeded.
    """
    spiked, cursor, rollbacks = state.step, state.cursor, state.rollbacks + 1
    steps = from_chief(lambda: manifest.committed(run_dir))
    if not steps or rollbacks > config.train.spike.max_rollbacks:
        why = "there is no checkpoint before it" if not steps else f"this is spike {rollbacks} of this run"
        raise ConfigError(
            f"the loss spiked at step {spiked} and {why}: lower optim.lr, or raise train.spike.deviations "
            f"or train.spike.max_rollbacks"
        )
    try:
        load(Reader(manifest.folder(run_dir, steps[-1])), engines, state)
    except CheckpointError as error:
        raise ConfigError(f"the loss spiked at step {spiked} and rolling back failed: {error}") from None
    left_out = (state.cursor, cursor)
    state.cursor, state.rollbacks = cursor, rollbacks
    if record:
        # Before the next step: no checkpoint has the new cursor yet, and the log may lose its tail if the machine
        # fails.
        before = read_durable_state(run_dir).rollbacks
        back = Rollback(to_step=state.step, cursor=cursor, rollbacks=rollbacks)
        change_durable_state(run_dir, rollbacks=[*before, back])
        record.event(
            "rollback", from_step=spiked, to_step=state.step, cursor=cursor, left_out=left_out, rollbacks=rollbacks
        )


def _check_together(path: Path) -> tuple[Reader | None, list[str]]:
    """A reader in every process or in none, and the problems that any of them has found, without duplicates."""
    reader, mine = store.examine(path, dist.get_rank(), dist.get_world_size())
    problems = _union(mine)
    return (None if problems else reader), problems


def _misfits(reader: Reader, engines: Engines, learner: Learner) -> list[str]:
    """Why a checkpoint cannot be loaded into the model that the processes hold; empty if it can."""
    misfits = [misfit(engine, reader) for engine in engines]
    mine = next(filter(None, misfits), "") or wrong_memory(reader.manifest.state, learner)
    if problems := _union([mine] if mine else []):
        return problems
    own, held = {piece.name for engine in engines for piece in engine.pieces()}, reader.manifest.shapes[manifest.MASTER]
    parts = from_all([] if own == held.keys() else sorted(own))
    if not all(parts):
        return []
    # No process has all of the checkpoint's parameters: these are pipeline stages, or the checkpoint has more.
    known = set(itertools.chain(*parts))
    unknown = [name for name in held if name not in known]
    more = f"{reader.path} has {counted(len(unknown), 'parameter')} that the model lacks, such as"
    return [f"{more} {shortened(unknown[0])}"] if unknown else []


def _union(mine: list[str]) -> list[str]:
    return list(dict.fromkeys(problem for problems in from_all(mine) for problem in problems))


def _set_aside(path: Path, problems: list[str], record: Record | None) -> None:
    if record:
        target = path.with_name(f"{path.name}.refused")
        store.remove(target)
        path.rename(target)
        record.event("checkpoint_refused", step=manifest.step_of(path), problems=problems, kept_as=target.name)
    dist.barrier()


def _sweep(run_dir: Path) -> None:
    """Delete checkpoint folders that a killed attempt left without a manifest."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        if manifest.step_of(path) is not None and not (path / manifest.MANIFEST).exists():
            store.remove(path)
