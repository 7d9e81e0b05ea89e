"""Describes a prepared folder, verifies it, and shows examples."""

import hashlib
from pathlib import Path
from typing import Any

from configs.sections.data import DataConfig

from .manifest import SPLITS, TOKENIZER, read_manifest
from .read.reader import Dataset
from .tokenizer.tokenizer import TokenizerProcess


def inspect(folder: str | Path, *, verify: bool = False, examples: int = 0, seq_len: int = 256) -> dict[str, Any]:
    """Describe prepared data.

    Args:
        folder: the prepared folder.
        verify: recompute the sha256 of every shard and of the tokenizer.
        examples: decoded training sequences to show, the first of seed 0.
        seq_len: tokens of an example.

    Returns:
        Plain values: `folder`, `sha256`, `inputs`, `input_files`, `input_bytes`, `tokenizer`, `splits` (documents,
        bytes, characters, tokens, entropy in nats per token, bytes_per_token, shards, row_groups, file_bytes),
        `refused`, `doubts`; with `verify` also `problems` (one line per file that has changed since it was prepared);
        with `examples` also `examples` (text, file, row group, window).

    Raises:
        ConfigError: not prepared data; with `examples` also if shards do not match the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, given="")
    splits = {}
    for split in SPLITS:
        stats, shards = manifest.splits[split], manifest.of(split)
        splits[split] = stats.model_dump() | {
            "bytes_per_token": stats.bytes / stats.tokens if stats.tokens else None,
            "shards": len(shards),
            "row_groups": sum(shard.row_groups for shard in shards),
            "file_bytes": sum(shard.bytes for shard in shards),
        }
    found: dict[str, Any] = {
        "folder": str(folder),
        "sha256": manifest.sha256,
        "inputs": manifest.inputs,
        "input_files": manifest.input_files,
        "input_bytes": manifest.input_bytes,
        "tokenizer": manifest.tokenizer.model_dump(),
        "prepare": manifest.prepare.model_dump(mode="json"),
        "splits": splits,
        "refused": manifest.refused,
        "doubts": manifest.doubts,
    }
    if verify:
        expected = {TOKENIZER: manifest.tokenizer.sha256} | {shard.file: shard.sha256 for shard in manifest.shards}
        found["problems"] = [
            problem for file, sha256 in expected.items() if (problem := _problem(folder / file, sha256))
        ]
    if examples:
        dataset = Dataset(DataConfig(path=str(folder)), seq_len, seed=0)
        found["examples"] = []
        with TokenizerProcess(folder) as tokenizer:
            for index in range(min(examples, len(dataset))):
                place, inputs = dataset.locate(index), dataset.sequence(index)["input_ids"]
                assert inputs is not None
                found["examples"].append(
                    {
                        "text": tokenizer.decode(inputs.tolist(), skip_special_tokens=False),
                        "file": place.file.name,
                        "row_group": place.row_group,
                        "window": place.window,
                    }
                )
    return found


def _problem(path: Path, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path} is missing, or is not a file"  # reading a pipe or a device would not end
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None if actual == sha256 else f"{path}: sha256 is {actual[:12]}…, but the manifest has {sha256[:12]}…"
