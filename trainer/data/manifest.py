"""The manifest of a prepared folder: the contents of its shards, their inputs, and what was rejected."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import FailFast, Field, ValidationError, field_validator, model_validator

from configs import Config, ConfigError
from configs.base import Typed, at_most
from configs.explain import first_reason
from configs.reading.parse import check_values, clip, shortened
from configs.sections.data import DataConfig, PrepareConfig, Source
from trainer.files.durable import replace_text

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REFUSED = "refused.jsonl"
FORMAT: Final = 1
MANIFEST_BYTES = 64 << 20
"""The manifest of 10 trillion tokens has 40 MB."""
MANIFEST_VALUES = 1 << 21
"""As many as fit in these bytes if all of them describe shards."""
MOST_REASONS = 1000
MAX_VOCABULARY = 1 << 24
"""Token counts and the embedding have a row for each id; the largest vocabularies in use have a million."""

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Typed):
    """One Parquet file: a column `tokens`, one row per token. Every row group of a split except the very last has
    `Manifest.prepare.row_group_tokens` rows."""

    file: str
    split: Split
    row_groups: Count
    rows: Count
    tokens: Count
    bytes: Count
    """Size of the file."""
    sha256: Digest

    @field_validator("file")
    @classmethod
    def _beside(cls, file: str) -> str:
        if not file or Path(file).name != file or file == ".." or "\0" in file:
            raise ValueError(f"it names a file outside its folder: {file}")
        return file


class SplitStats(Typed):
    """Size of one split, before tokenization (documents, UTF-8 bytes, characters) and after."""

    documents: Count
    bytes: Count
    characters: Count
    tokens: Count
    """Including one end-of-text token per document."""
    entropy: float = Field(ge=0)
    """Unigram entropy of the tokens in nats per token: the loss of the best model without context."""


class TokenizerInfo(Typed):
    kind: str
    sha256: Digest
    """Of tokenizer.json."""
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    """Largest token id + 1."""
    eos_id: Count
    eos_token: str

    @model_validator(mode="after")
    def _has_its_end(self) -> Self:
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is not in the vocabulary of {self.vocab_size}")
        return self

    def is_as(self, other: "TokenizerInfo") -> bool:
        """Whether data prepared with one can be mixed with data prepared with the other."""
        return (self.sha256, self.eos_id) == (other.sha256, other.eos_id)


class Manifest(Typed):
    format: Literal[1] = FORMAT
    fingerprint: str
    """Of the input files (path, size, modification time) and the settings; if equal, nothing need be prepared again."""
    inputs: Annotated[list[str], FailFast()]
    input_files: Count
    input_bytes: Count
    text_key: str
    prepare: PrepareConfig
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "uint32"]
    splits: Annotated[dict[Split, SplitStats], at_most(len(SPLITS))]
    shards: Annotated[list[Shard], FailFast()]
    refused: Annotated[dict[str, Count], at_most(MOST_REASONS)]
    """Number of documents or files left out, by reason; refused.jsonl names each."""
    doubts: list[str] = []
    """What a user should know of how the tokenizer changes texts, with an example."""

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> Self:
        """Values that are stated twice must agree, so that readers can use either."""
        size, group = self.tokenizer.vocab_size, self.prepare.row_group_tokens
        if size > 1 << 16 and self.dtype == "uint16":
            raise ValueError(f"a vocabulary of {size} does not fit {self.dtype}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same file")
        for split in SPLITS:
            shards, told = self.of(split), self.splits.get(split)
            if told is None or told.tokens != sum(shard.tokens for shard in shards):
                raise ValueError(f"the shards of {split} do not add up to its tokens")
            for shard in shards:
                whole = shard.rows == shard.row_groups * group
                if shard is shards[-1]:
                    whole = (shard.row_groups - 1) * group < shard.rows <= shard.row_groups * group
                if shard.tokens != shard.rows or not shard.row_groups or not whole:
                    raise ValueError(f"{shard.file} has {shard.rows} rows in {shard.row_groups} groups of {group}")
        return self

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    @property
    def sha256(self) -> str:
        """Identity of the prepared data, covering the digests of every shard and of the tokenizer."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution given by `counts`; 0 if all are 0."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum()) if len(share) else 0.0


def write_manifest(folder: Path, manifest: Manifest) -> None:
    replace_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def read_manifest(folder: str | Path, given: str = "data.path=") -> Manifest:
    """Read the manifest of a prepared folder.

    Args:
        given: prefix of the folder's name in messages, if a user gave it.

    Raises:
        ConfigError: no folder, no manifest (not prepared, or preparation was interrupted), or not one of ours.
    """
    path = Path(folder) / MANIFEST
    try:
        if not os.path.isfile(path):
            what = "does not exist" if not os.path.exists(folder) else f"has no {MANIFEST}, so it is not prepared data"
            then = ", then set data.path=FOLDER (or to stdlib)" if given == "data.path=" else ""
            raise ConfigError(
                f"{given}{shortened(str(folder), 200)}: {what}.\n"
                f"Make it with `muster data prepare INPUT... --out FOLDER`{then}"
            )
        with open(path, "rb") as file:
            data = file.read(MANIFEST_BYTES + 1)
        if len(data) > MANIFEST_BYTES:
            raise ValueError(f"it has more than {MANIFEST_BYTES:,} bytes")
        check_values(data, MANIFEST_VALUES)
        return Manifest.model_validate_json(data)
    except ConfigError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["loc"] == ("format",):
            found = str(first["input"])[:20]
            raise ConfigError(
                f"{path} has format {found}, but this version reads {FORMAT}: prepare the data again"
            ) from None
        reason = first_reason(error)
    except (OSError, ValueError) as error:
        reason = str(error)
    reason = clip(reason, 200).removeprefix(": ")
    raise ConfigError(f"{path} is damaged ({reason}): remove the folder and prepare it again")


def sources_of(data: DataConfig) -> tuple[Source, ...]:
    """`data.path` as the list of sources it stands for."""
    return (Source(path=data.path),) if isinstance(data.path, str) else data.path


def only_source(data: DataConfig, examples: str) -> str:
    """The path of the one source that `examples`, such as images, are read from. Raises ConfigError for several."""
    if len(sources := sources_of(data)) > 1:
        raise ConfigError(f"data.path has {len(sources)} sources, but {examples} are read from exactly one")
    return sources[0].path


def read_manifests(data: DataConfig) -> list[Manifest]:
    """The manifest of every source of a mixture.

    Raises:
        ConfigError: a source is not prepared, or two sources have different tokenizers or end-of-text tokens.
    """
    sources = sources_of(data)
    if not sources:
        raise ConfigError("data.path is an empty list: give at least one prepared folder")
    manifests = [read_manifest(source.path) for source in sources]
    for source, manifest in zip(sources, manifests, strict=True):
        one, other = manifests[0].tokenizer, manifest.tokenizer
        if not one.is_as(other):
            what = (
                "tokenizers"
                if one.sha256 != other.sha256
                else f"end-of-text tokens ({one.eos_token} and {other.eos_token})"
            )
            raise ConfigError(
                f"data.path: {sources[0].path} and {source.path} have different {what}.\nPrepare both with the same: "
                f"`muster data prepare INPUT... --tokenizer {Path(sources[0].path) / TOKENIZER}`"
            )
    return manifests


def without_held_out(data: DataConfig) -> list[str]:
    """Sources without a held-out sequence, which takes at least two tokens. Raises ConfigError as `read_manifests`."""
    pairs = zip(sources_of(data), read_manifests(data), strict=True)
    return [source.path for source, manifest in pairs if manifest.splits["held_out"].tokens < 2]


def planned_vocabulary(config: Config) -> int | None:
    """As `vocabulary`, plus the tokens that the family adds; None if it has none, or is not known: data are then not
    looked at."""
    if "vocab_size" not in type(config.model).model_fields:
        return None
    return vocabulary(config.data) + getattr(config.model, "added_tokens", 0)


def made_vocabulary(data: DataConfig) -> int | None:
    """Size of the vocabulary that preparation itself makes; None: it uses an existing tokenizer."""
    return {"bytes": 257, "bpe": data.prepare.vocab_size}.get(data.prepare.tokenizer)


def vocabulary(data: DataConfig) -> int:
    """Vocabulary size of the data, or the one that they will have once prepared.

    Raises:
        ConfigError: the tokenizer that they will be prepared with cannot be used.
    """
    try:
        return read_manifests(data)[0].tokenizer.vocab_size
    except ConfigError:
        if (found := made_vocabulary(data)) is not None:
            return found
    from .tokenizer.tokenizer import TokenizerProcess  # most readers of manifests do without

    with TokenizerProcess(data.prepare.tokenizer, data.limits) as tokenizer:
        return tokenizer.vocab_size
