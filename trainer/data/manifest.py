"""The manifest of a prepared folder: what its shards hold, what they were made from and what was refused."""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from configs import ConfigError
from configs.data import DataConfig, PrepareConfig, Source

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REFUSED = "refused.jsonl"
FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One Parquet file: a column `tokens`, one row per token. Every row group of a split but its very last holds
    `Manifest.prepare.row_group_tokens` rows."""

    file: str
    split: Split
    row_groups: int
    rows: int
    tokens: int
    bytes: int
    """Size of the file."""
    sha256: str

    @field_validator("file")
    @classmethod
    def _beside(cls, file: str) -> str:
        if Path(file).name != file or file == "..":
            raise ValueError(f"it names a file outside its folder: {file}")
        return file


class SplitStats(_Record):
    """What one split holds, before tokenization (documents, UTF-8 bytes, characters) and after."""

    documents: int
    bytes: int
    characters: int
    tokens: int
    """One end-of-text token per document included."""
    entropy: float
    """Unigram entropy of the tokens in nats per token: the loss of the best model without context."""


class TokenizerInfo(_Record):
    kind: str
    sha256: str
    """Of tokenizer.json."""
    vocab_size: int
    """Largest token id + 1."""
    eos_id: int
    eos_token: str


class Manifest(_Record):
    format: int = FORMAT
    fingerprint: str
    """Of the input files (path, size, modification time) and the settings; equal: nothing to prepare again."""
    inputs: list[str]
    input_files: int
    input_bytes: int
    text_key: str
    prepare: PrepareConfig
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, SplitStats]
    shards: list[Shard]
    refused: dict[str, int]
    """Documents or files left out, counted by reason; refused.jsonl names each."""

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    @property
    def sha256(self) -> str:
        """Identity of the prepared data: it covers every shard's digest and the tokenizer's."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by `counts`; 0 when there are none."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum()) if len(share) else 0.0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json through a temporary name and fsync, so that it is there whole or not at all."""
    part = folder / f".{MANIFEST}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / MANIFEST)
    fsync_folder(folder)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a prepared folder.

    Raises:
        ConfigError: no folder, no manifest (not prepared, or the preparation was cut short), or not one of ours.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = "is not there" if not Path(folder).exists() else f"has no {MANIFEST}, so it is not prepared data"
        raise ConfigError(
            f"data.path={folder}: {what}.\nMake it with `muster data prepare INPUT... --out FOLDER` and set "
            "data.path=FOLDER (or data.path=stdlib)"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.get("format") != FORMAT:
            raise ConfigError(f"{path} has format {tree.get('format')}, this version reads {FORMAT}: prepare it again")
        return Manifest.model_validate(tree)
    except (ValidationError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is damaged ({reason}): remove the folder and prepare it again") from None


def sources_of(data: DataConfig) -> tuple[Source, ...]:
    """`data.path` as the list of sources it stands for."""
    return (Source(path=data.path),) if isinstance(data.path, str) else data.path


def read_manifests(data: DataConfig) -> list[Manifest]:
    """The manifest of every source of a mixture.

    Raises:
        ConfigError: a source is not prepared, or two sources have different tokenizers.
    """
    sources = sources_of(data)
    if not sources:
        raise ConfigError("data.path is an empty list: name at least one prepared folder")
    manifests = [read_manifest(source.path) for source in sources]
    for source, manifest in zip(sources, manifests, strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise ConfigError(
                f"data.path: {sources[0].path} and {source.path} have different tokenizers.\nPrepare both with one: "
                f"`muster data prepare INPUT... --tokenizer {Path(sources[0].path) / TOKENIZER}`"
            )
    return manifests


def vocabulary(data: DataConfig) -> int:
    """Size of the vocabulary that the data have, or will have once they are prepared."""
    try:
        return read_manifests(data)[0].tokenizer.vocab_size
    except ConfigError:
        return 257 if data.prepare.tokenizer == "bytes" else data.prepare.vocab_size


def fsync_folder(folder: Path) -> None:
    """Make renames and new files in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
