"""Changes to a checkpoint: its manifest, its shards, or both, with digests that match.

A hostile writer makes the digests match, so every change here does, except those of the manifest's list of files.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.store import Reader

MODEL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "num_experts": 2, "expert_size": 8,
         "top_k": 1, "vocab_size": 257, "router_bias_rate": 0.01, "aux_loss_over": "global_batch"}  # fmt: skip
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
SHARD = "rank-00000.safetensors"
Change = Callable[[Path], None]
"""Changes the folder of a checkpoint."""


def tree_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def text(content: bytes | str) -> Change:
    """Another text of the manifest."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / "manifest.json").write_bytes(data)


def replaced(old: str, new: str) -> Change:
    """Replace a piece of the manifest's text, for changes that no JSON tree can express."""

    def change(path: Path) -> None:
        before = (path / "manifest.json").read_text()
        assert before.count(old) >= 1
        (path / "manifest.json").write_text(before.replace(old, new, 1))

    return change


GONE = object()


def manifest(*keys: Any, to: Any) -> Change:
    """Set a value of the manifest to `to` or to `to(value)`, or remove it."""

    def change(path: Path) -> None:
        tree = place = tree_of(path)
        for key in keys[:-1]:
            place = place[key]
        if to is GONE:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to
        (path / "manifest.json").write_text(json.dumps(tree))

    return change


def seal(path: Path) -> None:
    """Write the present sizes and digests of the files into the manifest."""
    tree = tree_of(path)
    for name, entry in tree["files"].items():
        data = (path / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(tree))


def content(make: Callable[[bytes], bytes]) -> Change:
    """Another content of the shard."""

    def change(path: Path) -> None:
        (path / SHARD).write_bytes(make((path / SHARD).read_bytes()))
        seal(path)

    return change


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the shard's header, but not the numbers after it."""

    def make(data: bytes) -> bytes:
        head, numbers = parts(data)
        return safetensors(edit(head) or head, numbers)

    return content(make)


def entry(key: str, **values: Any) -> Change:
    """Values of one tensor in the shard's header."""
    return header(lambda head: head[key].update(values))


def renamed(old: str, new: str) -> Change:
    """Rename the key of a fragment."""
    return header(lambda head: {new if key == old else key: value for key, value in head.items()})


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the shard's tensors, and write them as safetensors does."""

    def change(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(path / SHARD)
        edit(held)
        save_file(held, path / SHARD)
        seal(path)

    return change


def numbers(key: str, value: float) -> Change:
    return tensors(lambda held: held[key].__setitem__(3, value))


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes] and None


def file(make: Callable[[Path], Any], name: str = SHARD) -> Change:
    """Put something else in a file's place."""

    def change(path: Path) -> None:
        (path / name).rename(path / "aside")
        make(path / name)

    return change


WEIGHT, MOMENT = f"weight/{EMBED}@0", f"exp_avg_sq/{EMBED}@0"
ELEMENTS = 257 * 32


def states(reader: Reader) -> dict[tuple[str, str], torch.Tensor]:
    return {(key, name): reader.read(key, name) for key in reader.states for name in reader.manifest.shapes[key]}


EXTRA_PARAMETER: Change = both(
    tensors(lambda held: held.update({f"{s}/more@0": torch.ones(2) for s in ("weight", "exp_avg", "exp_avg_sq")})),
    *(manifest("shapes", s, "more", to=[2]) for s in ("weight", "exp_avg", "exp_avg_sq")),
)
