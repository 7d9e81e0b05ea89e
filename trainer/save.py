"""Between an engine and a checkpoint: take a snapshot, write it in the background, load it at any ZeRO stage."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from . import checkpoint
from .checkpoint import MASTER, CheckpointError, Reader, Snapshot
from .engine import base_optimizer, is_replicated, is_sharded, slots
from .record import Record
from .state import TrainState


def take_snapshot(engine: Any) -> Snapshot:
    """Copy this process's share of the weights and optimizer states to CPU memory.

    Where every process holds everything (ZeRO-0), each takes an equal stretch of every tensor.
    """
    optimizer = base_optimizer(engine)
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = is_replicated(engine)
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, dict[str, list[int]]] = {}
    scalars: dict[str, float] = {}
    for slot in slots(engine):
        low, high = (slot.numel * rank // world, slot.numel * (rank + 1) // world) if whole else (0, slot.numel)
        views = {MASTER: slot.view(slot.owner)}
        for key, value in optimizer.state.get(slot.owner, {}).items():
            if not torch.is_tensor(value) or value.numel() == 1 != slot.owner.numel():
                scalars[key] = float(value)
            elif value.numel() == slot.owner.numel():
                views[key] = slot.view(value)
            else:  # Adafactor's rows and columns: another shape, kept whole (ZeRO-0 only)
                shapes.setdefault(key, {})[slot.name] = list(value.shape)
                if rank == 0:
                    tensors[f"{key}/{slot.name}@0"] = _copy(value.detach().reshape(-1))
        for key, view in views.items():
            shapes.setdefault(key, {})[slot.name] = list(slot.shape)
            if low < high:
                tensors[f"{key}/{slot.name}@{slot.start + low}"] = _copy(view[low:high])
    return Snapshot(tensors, shapes, scalars)


def _copy(view: torch.Tensor) -> torch.Tensor:
    return torch.empty(view.shape, dtype=view.dtype, device="cpu").copy_(view)


def restore(engine: Any, reader: Reader) -> None:
    """Put a checkpoint's weights and optimizer states into an engine of any topology, bit for bit.

    Raises:
        CheckpointError: a parameter of the model is missing or has another shape.
    """
    optimizer = base_optimizer(engine)
    states = [key for key in reader.states if key != MASTER]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for slot in slots(engine):
        if reader.shape(MASTER, slot.name) != slot.shape:
            raise CheckpointError(
                f"{reader.path}: {slot.name} is {reader.shape(MASTER, slot.name)}, the model's is {slot.shape}"
            )
        with torch.no_grad():
            if is_sharded(engine):
                piece = reader.read(MASTER, slot.name, slot.start, slot.numel)
                slot.parameter.ds_tensor[: slot.numel].copy_(piece)  # type: ignore[attr-defined]
            else:
                whole = reader.weight(slot.name)
                slot.parameter.copy_(whole)
                piece = whole.view(-1)[slot.start : slot.start + slot.numel]
            slot.view(slot.owner).copy_(piece)
        state = optimizer.state[slot.owner]
        fused = groups.get(id(slot.owner), {}).get("fused")
        for key in states:
            if slot.name not in reader.manifest["shapes"][key]:
                continue
            shape = reader.shape(key, slot.name)
            if shape == slot.shape:
                if key not in state:
                    state[key] = torch.zeros_like(slot.owner)
                slot.view(state[key]).copy_(reader.read(key, slot.name, slot.start, slot.numel))
            else:
                state[key] = reader.read(key, slot.name).view(shape).to(slot.owner.device)
        for key, value in reader.manifest["scalars"].items():
            # torch's fused kernels want the step count beside the parameter, the others on the CPU.
            state[key] = torch.tensor(value, device=slot.owner.device if fused else "cpu")
    if not is_sharded(engine):
        _restore_unowned(engine, reader)


def _restore_unowned(engine: Any, reader: Reader) -> None:
    """Working weights of which this process owns no part of the master copy (ZeRO 1 and 2)."""
    held = {slot.name for slot in slots(engine)}
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if name not in held:
                parameter.copy_(reader.weight(name))


class Saver:
    """Writes checkpoints of one run, on another thread unless told otherwise, one at a time."""

    def __init__(self, run_dir: Path, config: Mapping, record: Record | None, background: bool, timeout_s: float):
        self._run_dir, self._config, self._record = run_dir, config, record
        self._background, self._timeout_s = background, timeout_s
        self._thread: threading.Thread | None = None
        self._saves = 0

    def save(self, engine: Any, state: TrainState, attempt: int) -> float:
        """Take a snapshot and start writing it. Returns the seconds that training stood still."""
        start = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(engine)
        stall = time.perf_counter() - start
        self._saves += 1
        token = f"{attempt}.{self._saves}"
        copied = TrainState(**state.to_dict())
        arguments = (snapshot, copied, token, dist.get_rank(), dist.get_world_size(), stall)
        if self._background:
            # Not a daemon: an interpreter that exits waits for the write to end.
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self._thread.start()
        else:
            self._write(*arguments)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Return when the last checkpoint is written or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, state: TrainState, token: str, rank: int, world: int, stall: float) -> None:
        start = time.perf_counter()
        path = checkpoint.folder(self._run_dir, state.step)
        keep, keep_every = self._config["checkpoint"]["keep"], self._config["checkpoint"]["keep_every"]
        try:
            checkpoint.write_shard(path, rank, token, snapshot)
            if rank == 0:
                manifest = checkpoint.commit(path, world, token, state, self._config, self._timeout_s)
                pruned = checkpoint.prune(self._run_dir, keep, keep_every)
                if self._record:
                    size = sum(entry["bytes"] for entry in manifest["files"].values())
                    seconds = time.perf_counter() - start
                    self._record.event(
                        "checkpoint", step=state.step, bytes=size, stall_s=stall, write_s=seconds, pruned=pruned
                    )
        except (OSError, CheckpointError) as error:
            # The run goes on with its last good checkpoint; the record says so.
            if rank == 0:
                checkpoint.remove(path)
                if self._record:
                    self._record.event("checkpoint_failed", step=state.step, reason=str(error))
