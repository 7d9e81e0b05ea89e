"""The checkpoint format: fragments of canonical fp32 state in safetensors shards, committed by a manifest.

A checkpoint holds the fp32 weights and optimizer moments under the plain model's own names, each cut into fragments by
whoever held them, so any topology writes it and any topology reads it. A fragment is a flat stretch of a slice ("box")
of the whole tensor; its key is `state/parameter@start`, where the box is not the whole tensor followed by the box,
as in `weight/model.layers.0.self_attn.q_proj.weight@0[64:128,0:256]`. A rank writes and fsyncs its shard and leaves a
receipt with the shard's digest; rank 0 collects the receipts and writes the manifest last. The manifest alone makes a
checkpoint: what has none, or whose files are not the manifest's, is none. No pickle anywhere.

Memory: a rank that writes holds a copy of its own share, a rank that reads holds one parameter's slice at a time. The
shards are mapped, so that the kernel keeps of them what it has room for.
"""

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import fragments
from .durable import digest, fsync, read_json, write_durably
from .fragments import Box, Run
from .state import TrainState

FORMAT = 2
READABLE = (1, 2)
"""Format 1 knew no boxes."""
MANIFEST = "manifest.json"
MASTER = "weight"
"""Name of the fp32 master weights among a parameter's states; the optimizer's own keep torch's names."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """One process's share of a checkpoint, copied away from the training state."""

    tensors: dict[str, Tensor]
    """Key of a fragment -> 1-D CPU tensor."""
    shapes: dict[str, dict[str, list[int]]]
    """state -> parameter -> shape of the whole tensor (all processes agree)."""
    scalars: dict[str, float]
    """The optimizer's scalar states, such as Adam's step, equal for every parameter."""


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def committed(run_dir: Path) -> list[int]:
    """Steps with a manifest, oldest first."""
    found = (run_dir / "checkpoints").glob(f"step-*/{MANIFEST}")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found if path.parent.name[5:].isdigit())


def write_shard(path: Path, rank: int, token: str, snapshot: Snapshot) -> None:
    """Write one process's shard durably and leave the receipt that says so.

    Args:
        token: names this very save, so that a receipt of an earlier one is never taken for it.

    Raises:
        OSError: the disk is full or gone; the shard is removed, and rank 0 is told why.
    """
    shard = path / f"rank-{rank:05d}.safetensors"
    receipt: dict[str, Any] = {"token": token, "shapes": snapshot.shapes, "scalars": snapshot.scalars}
    receipt["fragments"] = {key: tensor.numel() for key, tensor in snapshot.tensors.items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(snapshot.tensors, shard)
        with ThreadPoolExecutor(1) as pool:
            synced = pool.submit(fsync, shard)
            receipt["file"] = {"name": shard.name, "bytes": shard.stat().st_size, "sha256": digest(shard)}
            synced.result()
        write_durably(path / f"receipt-{rank:05d}.json", receipt)
    except Exception as error:
        with suppress(OSError):
            shard.unlink(missing_ok=True)
        _say_failed(path / _failure(rank, token), str(error))
        raise error if isinstance(error, OSError) else OSError(f"{shard}: {error}") from error


def _failure(rank: int, token: str) -> str:
    """Name of the file that a rank leaves in place of its receipt when it could not write its shard."""
    return f"failed-{rank:05d}-{token}"


def _say_failed(path: Path, reason: str) -> None:
    """Rank 0 must not wait for this rank; on a disk without a free block the name alone says it."""
    whole = path.with_name(f".{path.name}")
    with suppress(OSError):
        try:
            whole.write_text(reason)
            whole.replace(path)
        except OSError:
            whole.unlink(missing_ok=True)
            path.touch()


def commit(path: Path, world_size: int, token: str, state: TrainState, config: Mapping, timeout_s: float) -> dict:
    """Wait for every rank's receipt, then write the manifest: from here on the checkpoint exists. Rank 0 only.

    Raises:
        CheckpointError: a rank could not write its shard, or left no receipt within `timeout_s`, or the shards
            together lack a part of a tensor.
    """
    receipts, errors, deadline = [], [], time.monotonic() + timeout_s
    for rank in range(world_size):
        failed = path / _failure(rank, token)
        while not ((receipt := read_json(path / f"receipt-{rank:05d}.json")) and receipt["token"] == token):
            if failed.exists():
                errors.append(f"rank {rank} could not write its shard: {failed.read_text() or 'the disk is full'}")
                break
            if time.monotonic() > deadline:
                errors.append(f"rank {rank} wrote no shard within {timeout_s:.0f} s")
                break
            time.sleep(0.02)
        else:
            receipts.append(receipt)
    if errors:  # only now that every rank has ended: the folder can be deleted
        raise CheckpointError(f"{path}: {'; '.join(errors)}")
    shapes: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for receipt in receipts:
        for key, names in receipt["shapes"].items():
            shapes[key].update(names)
    scalars: dict[str, float] = {}
    for receipt in receipts:
        scalars.update(receipt["scalars"])
    _check_whole(path, shapes, receipts)
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "time": time.time(),
        "state": state.to_dict(),
        "shapes": shapes,
        "scalars": scalars,
        "files": {receipt["file"]["name"]: receipt["file"] for receipt in receipts},
        "config": dict(config),
    }
    fsync(path)
    write_durably(path / MANIFEST, manifest)
    for rank in range(world_size):
        (path / f"receipt-{rank:05d}.json").unlink(missing_ok=True)
    return manifest


def _check_whole(path: Path, shapes: Mapping[str, Mapping[str, list[int]]], receipts: list[dict[str, Any]]) -> None:
    written = [(key, numel, "") for receipt in receipts for key, numel in receipt["fragments"].items()]
    held = fragments.index(written, shapes)
    for state, names in shapes.items():
        for name, shape in names.items():
            _, missing = fragments.share_out(fragments.whole(shape), [run.box for run in held[state, name]])
            if count := sum(map(fragments.size, missing)):
                raise CheckpointError(
                    f"{path}: no rank wrote {count} of the {math.prod(shape)} elements of {state} {name}"
                )


def remove(path: Path) -> None:
    """Delete a checkpoint; its manifest goes first, so that what is half deleted is no checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def prune(run_dir: Path, keep: int, keep_every: int | None) -> list[int]:
    """Delete all but the newest `keep` and the multiples of `keep_every`; returns the deleted steps."""
    steps = committed(run_dir)
    old = [step for step in steps[:-keep] if not (keep_every and step % keep_every == 0)]
    for step in old:
        remove(folder(run_dir, step))
    return old


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises CheckpointError if there is none that can be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path / MANIFEST}: not a manifest")
    if manifest.get("format") not in READABLE:
        raise CheckpointError(f"{path}: format {manifest.get('format')}, this version reads {READABLE}")
    for name in manifest["files"]:
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"{path}: the manifest names a file outside its folder: {name}")
    return manifest


def verify(path: Path, part: int = 0, parts: int = 1, *, digests: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files: size and sha256 of each against the manifest; empty if nothing.

    Args:
        part, parts: check only every `parts`-th file, so that ranks share the reading.
        digests: False to compare sizes alone, without reading the files.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, entry in list(manifest["files"].items())[part::parts]:
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{file} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif digests and digest(file) != entry["sha256"]:
            problems.append(f"{file} does not have the manifest's sha256: its content changed after it was written")
    return problems


class Reader:
    """Random access to a checkpoint's state by (state, parameter, box, range), whoever wrote it.

    Nothing is verified here: call `verify` first.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        try:
            self._files = {name: safe_open(path / name, framework="pt") for name in self.manifest["files"]}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} has a file that is not safetensors: {error}") from None
        written = (
            (key, handle.get_slice(key).get_shape()[0], file)
            for file, handle in self._files.items()
            for key in handle.keys()  # noqa: SIM118 - a safetensors handle is no mapping
        )
        self._held = fragments.index(written, self.manifest["shapes"])

    @property
    def states(self) -> list[str]:
        """Names of the states: `weight` and the optimizer's own."""
        return list(self.manifest["shapes"])

    def shape(self, key: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Raises CheckpointError if the checkpoint does not hold it."""
        try:
            return tuple(self.manifest["shapes"][key][name])
        except KeyError:
            raise CheckpointError(f"{self.path} holds no {key} of {name}") from None

    def read(self, key: str, name: str, start: int = 0, numel: int | None = None, box: Box | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened `box` of a tensor, as a 1-D CPU tensor.

        Args:
            numel: all from `start` on if not given.
            box: the whole tensor if not given.

        Raises:
            CheckpointError: the fragments do not hold all of it.
        """
        shape = self.shape(key, name)
        box = fragments.whole(shape) if box is None else box
        stop = fragments.size(box) if numel is None else start + numel
        held = self._held[key, name]
        missing = max(0, stop - fragments.size(box))
        out = torch.empty(stop - start, dtype=self._data(held[0]).dtype if held else None)
        for place, wanted in fragments.runs(box, start, stop - missing):
            target = out[place - start :][: fragments.size(wanted)].view(fragments.lengths(wanted))
            taken, left = fragments.share_out(wanted, [run.box for run in held])
            missing += sum(map(fragments.size, left))
            for index, part in taken:
                run = held[index]
                target[fragments.within(wanted, part)] = self._data(run)[fragments.within(run.box, part)]
        if missing:
            raise CheckpointError(f"{self.path}: {key} of {name} is not whole: {missing} of {stop - start} missing")
        return out

    def _data(self, run: Run) -> Tensor:
        """A view of the mapped file, in the box's shape: only pages that are copied from are read."""
        stretch = slice(run.offset, run.offset + fragments.size(run.box))
        return self._files[run.file].get_slice(run.key)[stretch].view(fragments.lengths(run.box))

    def weight(self, name: str) -> Tensor:
        """The whole fp32 weight in its shape."""
        return self.read(MASTER, name).view(self.shape(MASTER, name))
