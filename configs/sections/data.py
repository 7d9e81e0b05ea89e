"""What a run reads: prepared token shards, their weights, and how raw text becomes them."""

from typing import Literal

from pydantic import Field, PositiveFloat, field_validator

from configs.base import Length, Section, Size, file_path


class Source(Section):
    """One source of a mixture: a prepared folder and its share of the sequences."""

    path: str
    """A folder made by `muster data prepare`."""
    weight: PositiveFloat = 1.0
    """Relative to the other sources' weights."""

    _path = field_validator("path")(file_path)


class PrepareConfig(Section):
    """How `data.path: stdlib` (or raw files given to `muster data prepare`) becomes token shards."""

    tokenizer: str = "bpe"
    """`bytes`, `bpe` (trained on the data), or an existing one: a tokenizer.json, a folder with one, or the name of a
    model in this machine's Hugging Face cache."""
    vocab_size: Size = Field(default=4096, ge=257)
    """Size of a trained BPE vocabulary."""
    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents that no training run sees."""
    seed: int = 0
    """Of the split by document."""
    row_group_tokens: Length = 65536
    """Tokens of one Parquet row group, the unit of reading and shuffling; at least train.seq_len."""

    _path = field_validator("tokenizer")(file_path)


class LimitsConfig(Section):
    """What reading other people's files may take; what takes more is refused, with its name. A few bytes can unpack to
    billions, and no library that reads them sets a bound."""

    expansion: int = Field(default=256, ge=1, le=10**6)
    """Bytes that a byte of a compressed or Parquet file may unpack to, a record counting as 256 more; where that comes
    to less, 16 MiB."""
    memory: int = Field(default=128, ge=16, le=1 << 24)
    """MiB of memory to read a Parquet file, a tokenizer.json or a block of prepared data; more where that is large."""
    seconds: int = Field(default=1, ge=1, le=10**6)
    """Processor time for the same; more where the file or the text is large."""


class ImagesConfig(Section):
    """How images are read, for tasks that learn from them."""

    size: Size | None = None
    """Height and width that they are resized to; None: they all have one size."""
    channels: Literal[1, 3] = 3
    """3: red, green and blue, 1: grey; they are converted."""


class DataConfig(Section):
    path: str | tuple[Source, ...] = "stdlib"
    """A folder made by `muster data prepare`, a list of {path, weight}, or `stdlib`: the source of this machine's
    own Python standard library, prepared at first use under run.root/data. Images: a Parquet file or a folder of them,
    as Hugging Face `datasets` writes them, with nothing to prepare."""
    images: ImagesConfig = ImagesConfig()
    """How images are read."""
    document_mask: bool = True
    """Attention stays inside a document and positions restart at each."""
    on_bad_page: Literal["stop", "skip"] = "stop"
    """A page that fails its checksum stops the run, or its sequences weigh zero and are counted."""
    prefetch: int = Field(4, gt=0, le=2**16)
    """Micro-batches read ahead of the training thread."""
    prepare: PrepareConfig = PrepareConfig()
    """How raw text becomes token shards."""
    limits: LimitsConfig = LimitsConfig()
    """What reading other people's files may take."""

    _path = field_validator("path")(file_path)
