"""Save and restore an engine: take a snapshot, write it in the background, load it at any ZeRO stage."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from trainer.engine.engine import Engine
from trainer.engine.optim import moments
from trainer.engine.slots import Slot
from trainer.processes.device import device
from trainer.record.lines import Record
from trainer.state import TrainState

from . import store
from .fragments import fragment_key
from .manifest import EMA, FOLLOWERS, MASTER, SLOW, STEP, CheckpointError, committed, folder
from .store import Reader, Snapshot


def take_snapshot(*engines: Engine) -> Snapshot:
    """Copy this process's share of the weights and optimizer states to CPU memory."""
    return copied(share(*engines), {})


def share(*engines: Engine) -> Snapshot:
    """This process's share of the weights and optimizer states, as views that change with the next optimizer step.

    Where every process holds everything (all tensors at ZeRO-0, frozen ones at ZeRO 1 and 2), each takes an equal
    stretch of every tensor. Where tensor-parallel processes hold the same slice, one of them takes it.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    scalars: dict[str, float] = {}
    for engine, slot in [(each, slot) for each in engines for slot in each.slots()]:
        optimizer, low, high = engine.optimizer, 0, slot.numel
        if engine.replicated or not (slot.parameter.requires_grad or engine.sharded):
            low, high = slot.numel * rank // world, slot.numel * (rank + 1) // world
        views = {MASTER: slot.view(slot.owner).float()}  # frozen parameters have no fp32 copy
        views |= {key: slot.view(each) for key, each in _followers(engine, slot)}
        for key, value in optimizer.state.get(slot.owner, {}).items():
            if not torch.is_tensor(value) or key == STEP or value.numel() == 1 != slot.owner.numel():
                scalars[engine.prefix + key] = float(value)
            elif value.numel() == slot.owner.numel():
                views[key] = slot.view(value)
            else:  # Adafactor's rows and columns: another shape, kept whole (ZeRO-0 only)
                shapes.setdefault(key, {})[slot.name] = list(value.shape)
                if rank == 0:
                    tensors[f"{key}/{slot.name}@0"] = value.detach().reshape(-1)
        for key, view in views.items():
            shapes.setdefault(key, {})[slot.name] = list(slot.shape)
            if low < high and slot.writes:
                tensors[fragment_key(key, slot.name, slot.start + low, slot.box, slot.shape)] = view[low:high]
    return Snapshot(tensors, shapes, scalars)


def copied(views: Snapshot, buffers: Mapping[str, Tensor]) -> Snapshot:
    """A copy in CPU memory.

    Args:
        buffers: tensors of an earlier copy that is no longer needed, to be overwritten: fresh memory is faulted in page
            by page, which takes longer than the copy.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # a new thread starts on the first GPU
    tensors = {}
    for key, view in views.tensors.items():
        buffer = buffers.get(key)
        if buffer is None or buffer.shape != view.shape or buffer.dtype != view.dtype:
            buffer = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
        tensors[key] = buffer.copy_(view, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return replace(views, tensors=tensors)


def misfit(engine: Engine, reader: Reader) -> str:
    """Why a checkpoint cannot be loaded into this process's engine: a parameter or one of its moments is missing or has
    another shape. Empty if it can."""
    shapes, scalars = reader.manifest.shapes, set(_scalars(engine, reader))
    needed = moments(engine.optimizer)
    for piece in engine.pieces():
        if problem := reader.misfit({piece.name: piece.shape}, others=True):
            return problem
        if piece.name in reader.manifest.state.frozen and piece.parameter.requires_grad:
            return (
                f"{reader.path}: {piece.name} was frozen and has no optimizer state: start from the weights only with "
                "train.init_from"
            )
        own = {key for key in shapes if piece.name in shapes[key]} - {MASTER, *FOLLOWERS}
        if own and not any(kind <= own | scalars for kind in needed):
            names = " or ".join(", ".join(sorted(kind)) for kind in needed)
            return (
                f"{reader.path} has {', '.join(sorted(own | scalars))} of {piece.name}, but the optimizer needs "
                f"{names}: set optim.name back, or start from the weights only with train.init_from"
            )
    return ""


def restore(engine: Engine, reader: Reader) -> None:
    """Load a checkpoint's weights and optimizer states into an engine of any topology, bit for bit.

    Each process reads its own part: its slices of the parameters, and its stretches of the states. What follows
    the weights (`engine.ema`) starts from them if the checkpoint lacks it.

    Raises:
        CheckpointError: the checkpoint does not fit, see `misfit`.
    """
    if problem := misfit(engine, reader):
        raise CheckpointError(problem)
    held = {id(slot.parameter): slot for slot in engine.slots()}
    optimizer = engine.optimizer
    # Optimizers that skip steps on the device keep the step count there too, the others on the CPU.
    skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
    for piece in engine.pieces():
        slot = held.get(id(piece.parameter))
        with torch.no_grad():
            if engine.sharded:
                if slot and slot.working is not None:
                    stretch = reader.read(MASTER, slot.name, slot.start, slot.numel, slot.box)
                    slot.working.copy_(stretch)
                    slot.view(slot.owner).copy_(stretch)
            else:
                weight = reader.read(MASTER, piece.name, box=piece.box)
                piece.parameter.copy_(weight.view_as(piece.parameter))
                if slot:
                    slot.view(slot.owner).copy_(weight[slot.start : slot.start + slot.numel])
            if slot:
                for key, follower in _followers(engine, slot):
                    held_as = key if slot.name in reader.manifest.shapes.get(key, {}) else MASTER
                    slot.view(follower).copy_(reader.read(held_as, slot.name, slot.start, slot.numel, slot.box))
        if slot and piece.parameter.requires_grad:
            where = slot.owner.device if skips_on_device else torch.device("cpu")
            _restore_states(optimizer.state[slot.owner], slot, reader, _scalars(engine, reader), where)
    engine.parameters_changed()


def _followers(engine: Engine, slot: Slot) -> Iterator[tuple[str, Tensor]]:
    """What follows the weights of a slot, with its key in a checkpoint."""
    for key, follower in ((EMA, engine.ema), (SLOW, engine.lookahead)):
        if follower and (found := follower.of(slot.owner)) is not None:
            yield key, found


def _scalars(engine: Engine, reader: Reader) -> dict[str, float]:
    """The scalar states of an engine's optimizer, by their names without the engine's prefix."""
    held = reader.manifest.scalars.items()
    own = [(key.removeprefix(engine.prefix), value) for key, value in held if key.startswith(engine.prefix)]
    return {key: value for key, value in own if "." not in key}


def _restore_states(
    state: dict[str, Any], slot: Slot, reader: Reader, scalars: Mapping[str, float], where: torch.device
) -> None:
    """Fill the optimizer's states for a slot's owner, as far as the slot reaches; scalars on the device `where`."""
    for key in reader.states:
        if key in (MASTER, *FOLLOWERS) or slot.name not in reader.manifest.shapes[key]:
            continue
        shape = reader.shape(key, slot.name)
        if shape == slot.shape:
            if key not in state:
                state[key] = torch.zeros_like(slot.owner)
            slot.view(state[key]).copy_(reader.read(key, slot.name, slot.start, slot.numel, slot.box))
        else:
            state[key] = reader.read(key, slot.name).view(shape).to(slot.owner.device)
    for key, value in scalars.items():
        state[key] = torch.tensor(value, device=where)


class Saver:
    """Writes the checkpoints of one run, one at a time, in a background thread by default.

    Only an optimizer step changes what a checkpoint holds. So the thread also takes the copy, during the next forward
    and backward pass, and training waits for it, if at all, just before the optimizer's step.
    """

    stalled = 0.0
    """Seconds that training has stalled for the last checkpoint."""
    took: tuple[float, float] | None = None
    """On rank 0, for the last checkpoint that was written: seconds that training stalled for it, and seconds from its
    start to its commit."""
    failed = ""
    """On rank 0, why the last checkpoint was not written; empty if it was."""

    def __init__(self, run_dir: Path, config: Mapping, record: Record | None, background: bool, timeout_s: float):
        self._run_dir, self._config, self._record = run_dir, config, record
        self._background, self._timeout_s = background, timeout_s
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._hooks: list[Any] = []
        self._saves = 0
        self._buffers: dict[str, Tensor] = {}

    def save(self, engines: Sequence[Engine], state: TrainState, attempt: int) -> None:
        """Start writing a checkpoint in the background, or write it now if not in the background."""
        start = time.perf_counter()
        self.wait()
        views = share(*engines)
        self._saves += 1
        copied_state = TrainState(**state.to_dict())
        arguments = (views, copied_state, f"{attempt}.{self._saves}", dist.get_rank(), dist.get_world_size())
        if self._background:
            if not self._hooks:  # on every engine: any of them may step first
                self._hooks = [each.optimizer.register_step_pre_hook(self._before_step) for each in engines]
            self._copied.clear()
            # Not a daemon: the interpreter waits for the write before it exits.
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(*arguments)
        self.stalled = time.perf_counter() - start

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last checkpoint is written or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _before_step(self, *_: Any) -> None:
        start = time.perf_counter()
        self._copied.wait()
        self.stalled += time.perf_counter() - start

    def _write(self, views: Snapshot, state: TrainState, token: str, rank: int, world: int) -> None:
        start = time.perf_counter()
        try:
            snapshot = copied(views, self._buffers)
        finally:
            self._copied.set()
        self._buffers = snapshot.tensors
        path = folder(self._run_dir, state.step)
        keep, keep_every = self._config["checkpoint"]["keep"], self._config["checkpoint"]["keep_every"]
        try:
            try:
                store.write_shard(path, rank, token, snapshot)
            except OSError:
                if rank or not path.is_dir():
                    raise  # else `commit` raises, once it has heard from the other ranks
            if rank == 0:
                self.failed = ""
                manifest = store.commit(path, world, token, state, self._config, self._timeout_s)
                pruned = store.prune(self._run_dir, keep, keep_every)
                seconds = time.perf_counter() - start
                stall = self.stalled if self._background else seconds
                self.took = stall, seconds
                if self._record:
                    size = manifest.bytes
                    self._record.event(
                        "checkpoint", step=state.step, bytes=size, stall_s=stall, write_s=seconds, pruned=pruned
                    )
        except (OSError, CheckpointError) as error:
            # Training continues, with an older checkpoint as its last good one; the record says so.
            if rank == 0:
                store.remove(path)
                self.failed, self.took = str(error), None
                if self._record:
                    good = max(committed(self._run_dir), default=None)
                    self._record.event("checkpoint_failed", step=state.step, reason=self.failed, last_good=good)
