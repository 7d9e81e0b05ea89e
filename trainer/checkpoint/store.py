"""The checkpoint format: fragments of canonical fp32 state in safetensors shards, committed by a manifest.

A checkpoint holds the fp32 weights, their moving average if the run keeps one, and optimizer moments under the plain
model's parameter names. Each process writes its own part as fragments, so any topology can write a checkpoint and any
other can read it. A fragment is a flat stretch of a slice ("box") of the whole tensor. Its key is
`state/parameter@start`, followed by the box unless that is the whole tensor, as in
`weight/model.layers.0.self_attn.q_proj.weight@0[64:128,0:256]`. A rank writes and fsyncs its shard and leaves a receipt
with the shard's digest; rank 0 collects the receipts and writes the manifest last. The manifest is the commit point: a
folder without one, or whose files differ from it, is not a checkpoint. No pickle anywhere.

Memory: a rank that writes holds a copy of its own share, a rank that reads holds one parameter's slice at a time.
Shards are memory-mapped, so the kernel decides how much of them to keep in memory.
"""

import hashlib
import itertools
import json
import os
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import counted
from configs.reading.parse import shortened
from trainer.files.durable import digest, fsync, write_durably
from trainer.files.own_files import open_file, write_text
from trainer.state import TrainState

from . import fragments
from .fragments import Box, Run
from .manifest import (
    EMA,
    FORMAT,
    MANIFEST,
    MASTER,
    MOST_BYTES,
    CheckpointError,
    File,
    Manifest,
    Receipt,
    committed,
    folder,
    parse_manifest,
    parse_receipt,
    read_manifest,
)


@dataclass(frozen=True)
class Snapshot:
    """One process's share of a checkpoint, copied from the training state."""

    tensors: dict[str, Tensor]
    """Fragment key -> 1-D CPU tensor."""
    shapes: dict[str, dict[str, list[int]]]
    """state -> parameter -> shape of the whole tensor (all processes agree)."""
    scalars: dict[str, float]
    """The optimizer's scalar states, such as Adam's step, equal for every parameter."""


def write_shard(path: Path, rank: int, token: str, snapshot: Snapshot) -> None:
    """Write one process's shard durably, and leave a receipt for it.

    Args:
        token: identifies this save, so that a receipt of an earlier one is never taken for this one's.

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
        with shard.open("rb") as file:
            _data_begins(shard, file)
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
    """Tell rank 0 not to wait for this rank; on a full disk by an empty file, whose name says enough."""
    whole = path.with_name(f".{path.name}")
    with suppress(OSError):
        try:
            write_text(whole, reason)
            whole.replace(path)
        except OSError:
            whole.unlink(missing_ok=True)
            path.touch()


def commit(path: Path, world_size: int, token: str, state: TrainState, config: Mapping, timeout_s: float) -> Manifest:
    """Wait for every rank's receipt, then write the manifest: from here on the checkpoint exists. Rank 0 only.

    Raises:
        CheckpointError: a rank could not write its shard, or left no receipt within `timeout_s`, or the shards
            together do not hold every tensor completely.
    """
    receipts: list[Receipt] = []
    errors, deadline = [], time.monotonic() + timeout_s
    for rank in range(world_size):
        failed = path / _failure(rank, token)
        while not (receipt := _receipt(path / f"receipt-{rank:05d}.json", token)):
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
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    scalars: dict[str, float] = {}
    for receipt in receipts:
        for key, names in receipt.shapes.items():
            shapes[key].update(names)
        scalars.update(receipt.scalars)
    tree = {
        "format": FORMAT,
        "step": state.step,
        "time": time.time(),
        "state": state.to_dict(),
        "shapes": shapes,
        "scalars": scalars,
        "files": {receipt.file.name: receipt.file.model_dump() for receipt in receipts},
        "config": dict(config),
    }
    # Never write a manifest that could not be read back.
    manifest = parse_manifest(json.dumps(tree).encode(), path / MANIFEST)
    written = [(key, numel, r.file.name) for r in receipts for key, numel in r.fragments.items()]
    try:
        fragments.index(written, shapes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    fsync(path)
    write_durably(path / MANIFEST, tree)
    for rank in range(world_size):
        (path / f"receipt-{rank:05d}.json").unlink(missing_ok=True)
    return manifest


def _receipt(path: Path, token: str) -> Receipt | None:
    """A rank's receipt for this save; None if it is missing or from an earlier save."""
    try:
        with open_file(path) as file:
            receipt = parse_receipt(file.read(MOST_BYTES + 1), path)
    except (OSError, CheckpointError):
        return None
    return receipt if receipt.token == token else None


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a partly deleted folder does not count as a checkpoint."""
    with suppress(IsADirectoryError, NotADirectoryError):
        (path / MANIFEST).unlink(missing_ok=True)
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def prune(run_dir: Path, keep: int, keep_every: int | None) -> list[int]:
    """Delete all but the newest `keep` and the multiples of `keep_every`; returns the deleted steps.

    What cannot be deleted stays, and is tried again after the next save: it does not make the new checkpoint fail.
    """
    deleted = []
    for step in committed(run_dir)[:-keep]:
        if keep_every and step % keep_every == 0:
            continue
        with suppress(OSError):
            remove(folder(run_dir, step))
            deleted.append(step)
    return deleted


def verify(path: Path, part: int = 0, parts: int = 1, *, digests: bool = True) -> list[str]:
    """The problems of a checkpoint; empty if there are none.

    The manifest, the size and header of every file and the position of every fragment are checked. The files' content
    must have the manifest's SHA-256, and be finite: runs skip steps that are not.

    Args:
        part, parts: read only every `parts`-th file, so that ranks can share the work.
        digests: False skips the check of the content.
    """
    return examine(path, part, parts, digests=digests)[1]


MOST_TOLD = 16
"""Most problems that are reported for one checkpoint: a manifest may name 100,000 missing files."""


def examine(path: Path, part: int = 0, parts: int = 1, *, digests: bool = True) -> "tuple[Reader | None, list[str]]":
    """A reader of a checkpoint if it has no problems, else None; and its problems, as from `verify`."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return None, [str(error)]
    sizes = {file.name: _wrong_size(path, file) for file in [*manifest.files.values()][part::parts]}
    problems = [problem for problem in sizes.values() if problem]
    reader = None
    if not problems:
        try:
            reader = Reader(path, manifest)
        except CheckpointError as error:
            return None, [str(error)]
    for name, problem in sizes.items():
        if digests and not problem:
            problems += _wrong_content(path / name, manifest.files[name].sha256, reader)
    return None if problems else reader, problems[:MOST_TOLD]


def _wrong_size(path: Path, file: File) -> str:
    there = path / file.name
    try:
        found = there.lstat()
    except OSError:
        return f"{there} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{there} is not a plain file, or is a link"
    if found.st_size != file.bytes:
        return f"{there} has {found.st_size} bytes, but the manifest says {file.bytes}"
    return ""


def _wrong_content(path: Path, sha256: str, reader: "Reader | None") -> list[str]:
    """The problems of a file's content; without a reader, which knows its keys, only the digest is checked."""
    try:
        found, finite = _digest(path)
    except (OSError, CheckpointError) as error:
        return [str(error)]
    if found != sha256:
        return [f"{path} does not match the manifest's sha256: its content changed after it was written"]
    if reader and not finite:
        return [f"{path} contains numbers that are not finite{reader.not_finite(path.name)}"]
    return [f"{path} contains numbers below 0 in {key}" for key in reader.below_zero(path.name)] if reader else []


_CHUNK = 1 << 18
"""Bytes that stay in the processor's cache between the two looks at them."""
_ZEROS = np.zeros(_CHUNK // 4, np.float32)


def _digest(path: Path) -> tuple[str, bool]:
    """sha256 of a shard, and whether its numbers, if they are fp32, are all finite: read once for both."""
    found, finite = hashlib.sha256(), True
    buffer = bytearray(_CHUNK)
    with open_file(path) as file, np.errstate(invalid="ignore"):
        begins = _data_begins(path, file)
        file.seek(0)
        found.update(file.read(begins))
        while size := file.readinto(buffer):  # type: ignore[attr-defined]
            found.update(memoryview(buffer)[:size])
            numbers = np.frombuffer(buffer, np.float32, size // 4)
            # The dot product with zeros is NaN if any number is infinite or NaN.
            finite = finite and bool(np.dot(numbers, _ZEROS[: numbers.size]) == 0)
    return found.hexdigest(), finite


def _data_begins(path: Path, file: BinaryIO) -> int:
    """Offset of a shard's data, after its header.

    Raises:
        CheckpointError: the header is longer than the file, or than MOST_BYTES.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MOST_BYTES):
        raise CheckpointError(f"{path} is not safetensors: its header of {length:,} bytes is too long")
    return 8 + length


SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var")
"""Optimizer states that are sums or means of squares, and so never negative."""


class Reader:
    """Random access to a checkpoint's state by (state, parameter, box, range), whatever topology wrote it.

    Args:
        manifest: the folder's manifest, if already read.

    Raises:
        CheckpointError: the manifest, or a file's size, type or header is wrong, or the fragments do not hold every
            element of every tensor exactly once. The content is not read: see `verify`.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None):
        self.path = path
        self.manifest = manifest or read_manifest(path)
        self._files = {}
        for name, file in self.manifest.files.items():
            if problem := _wrong_size(path, file):
                raise CheckpointError(problem)
            self._files[name] = _open(path / name)
        try:
            self._held = fragments.index(self._written(), self.manifest.shapes)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def _written(self) -> Iterator[tuple[str, int, str]]:
        for name, file in self._files.items():
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                found = file.get_slice(key)
                shape = found.get_shape()
                if found.get_dtype() != "F32" or len(shape) != 1:
                    raise ValueError(
                        f"{name}: {shortened(key)} is {found.get_dtype()} {shape}, not one-dimensional F32"
                    )
                yield key, shape[0], name

    def not_finite(self, name: str) -> str:
        """The first tensor of a file with a number that is not finite, as part of a message."""
        for key in self._files[name].keys():  # noqa: SIM118
            if not self._files[name].get_slice(key)[:].isfinite().all():
                return f", such as those of {shortened(key)}"
        return ""

    def below_zero(self, name: str) -> list[str]:
        """The first tensor of squares with a number below 0 in a file: an optimizer would take its root."""
        squares = (key for key in self._files[name].keys() if key.partition("/")[0] in SQUARES)  # noqa: SIM118
        wrong = (key for key in squares if self._files[name].get_slice(key)[:].min() < 0)
        return [shortened(key) for key in itertools.islice(wrong, 1)]

    @property
    def states(self) -> list[str]:
        """Names of the states: `weight`, its average, and the optimizer's own."""
        return list(self.manifest.shapes)

    @property
    def averaged(self) -> Collection[str]:
        """Names of the parameters that have an exponential moving average."""
        return self.manifest.shapes.get(EMA, {}).keys()

    def shape(self, key: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Raises CheckpointError if the checkpoint does not hold it."""
        try:
            return self.manifest.shapes[key][name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no {key} of {name}") from None

    def misfit(self, wanted: Mapping[str, Sequence[int]], *, others: bool = False) -> str:
        """Why the weights do not fit a model with parameters of these shapes; empty if they do.

        Args:
            others: the model, and so the checkpoint, may have other parameters as well.
        """
        held = self.manifest.shapes[MASTER]
        for name, shape in wanted.items():
            if name not in held:
                return f"{self.path} has no {MASTER} of {name}"
            if held[name] != tuple(shape):
                return f"{self.path}: {name} has shape {list(held[name])}, the model's is {list(shape)}"
        if not others and (unknown := [name for name in held if name not in wanted]):
            more = counted(len(unknown), "parameter")
            return f"{self.path} has {more} that the model lacks, such as {shortened(unknown[0])}"
        return ""

    def read(self, key: str, name: str, start: int = 0, numel: int | None = None, box: Box | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened `box` of a tensor, as a 1-D CPU tensor.

        Args:
            numel: default: all from `start` on.
            box: default: the whole tensor.

        Raises:
            CheckpointError: the fragments do not hold all of these elements.
        """
        shape = self.shape(key, name)
        box = fragments.whole(shape) if box is None else box
        stop = fragments.size(box) if numel is None else start + numel
        held = [run for fragment in self._held[key, name] for run in fragment.runs()]
        missing = max(0, stop - fragments.size(box))
        out = torch.empty(stop - start, dtype=torch.float32)
        for place, wanted in fragments.runs(box, start, stop - missing):
            target = out[place - start :][: fragments.size(wanted)].view(fragments.lengths(wanted))
            taken, left = fragments.share_out(wanted, [run.box for run in held])
            missing += sum(map(fragments.size, left))
            for index, part in taken:
                run = held[index]
                target[fragments.within(wanted, part)] = self._data(run)[fragments.within(run.box, part)]
        if missing:
            raise CheckpointError(
                f"{self.path}: {key} of {name} is incomplete: {missing} of {stop - start} elements missing"
            )
        return out

    def _data(self, run: Run) -> Tensor:
        """A view of the memory-mapped file, in the box's shape: only pages that are copied from are read."""
        stretch = slice(run.offset, run.offset + fragments.size(run.box))
        return self._files[run.file].get_slice(run.key)[stretch].view(fragments.lengths(run.box))

    def weight(self, name: str, *, averaged: bool = False) -> Tensor:
        """A whole fp32 weight in its shape; its average if `averaged` and there is one."""
        key = EMA if averaged and name in self.averaged else MASTER
        return self.read(key, name).view(self.shape(MASTER, name))


def _open(path: Path) -> Any:
    """A safetensors handle. Raises CheckpointError."""
    try:
        with open_file(path) as file:
            _data_begins(path, file)
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, MemoryError) as error:  # mapping needs as much address space as the file's size
        raise CheckpointError(f"{path} is not safetensors: {shortened(str(error))}") from None
