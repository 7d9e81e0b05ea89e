"""What a run reads: prepared token shards, their weights, and how raw text becomes them; images; rows; graphs."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator

from configs.base import Length, Section, Size, file_path


class Source(Section):
    """One source of a mixture: a prepared folder and its sampling weight."""

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
    """Fraction of the documents held out from all training runs."""
    seed: int = 0
    """Seed of the split by document."""
    row_group_tokens: Length = 65536
    """Tokens in one Parquet row group, the unit of reading and shuffling; at least train.seq_len."""

    _path = field_validator("tokenizer")(file_path)


class LimitsConfig(Section):
    """Limits on reading untrusted files; a file that exceeds them is refused by name. A few bytes can unpack to
    billions, and no library that reads them sets a bound."""

    expansion: int = Field(default=256, ge=1, le=10**6)
    """Most bytes that one byte of a compressed or Parquet file may unpack to, a record counting as 256 more; 16 MiB
    where that comes to less."""
    memory: int = Field(default=128, ge=16, le=1 << 24)
    """MiB of memory for reading a Parquet file, a tokenizer.json or a block of prepared data; more where that is large.
    """
    seconds: int = Field(default=1, ge=1, le=10**6)
    """Seconds of CPU time for the same; more where the file or the text is large."""


class ImagesConfig(Section):
    """How images are read, for tasks that learn from images."""

    size: Size | None = None
    """Height and width that images are resized to; None: all must already have the same size."""
    channels: Literal[1, 3] = 3
    """3: RGB; 1: greyscale; images are converted."""
    crop: int = Field(0, ge=0, le=2**16)
    """Augmentation: pad each training image by this many black pixels on every side and crop it at random to its size.
    """
    caption: str = "text"
    """Column of the text that belongs to an image, for tasks that learn from both."""
    flip: bool = False
    """Augmentation: mirror half of the training images, left to right."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """Augmentation: how much brightness, contrast and, in colour, saturation change at most, either way."""


class RowsConfig(Section):
    """How rows of numbers are read, for tasks that learn from rows."""

    labels: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)] = ("label",)
    """Columns to predict: one of classes (whole numbers from 0), or one or more of numbers."""
    features: Annotated[tuple[str, ...], Field(min_length=1, max_length=100_000)] | None = None
    """Columns that they are predicted from; None: all other columns, which must hold numbers."""
    standardise: bool = True
    """Shift and scale features, and predicted numbers, to mean 0 and variance 1 in the training split."""


class PairsConfig(Section):
    """How pairs of texts are read, for tasks that learn one from the other. data.prepare.tokenizer encodes both."""

    source: str = "source"
    """Column of the source texts, or a field of the struct `translation`, such as en."""
    target: str = "target"
    """Column of the target texts, likewise."""


class TextsConfig(Section):
    """How texts with labels are read. data.prepare.tokenizer encodes them."""

    text: str = "text"
    """Column of the texts."""
    labels: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)] = ("label",)
    """Columns that are predicted: one of classes (whole numbers from 0), or one or more of numbers."""
    standardise: bool = True
    """Shift and scale predicted numbers to mean 0 and variance 1 in the training split."""


class GraphsConfig(Section):
    """How graphs are read, for tasks that learn from their nodes."""

    neighbours: Annotated[tuple[Size, ...], Field(min_length=1, max_length=100)] = (10, 10)
    """Neighbours sampled of each node, hop by hop: one number for each layer of the network."""


BUNDLED = {
    "bundled:dates": "pairs",
    "bundled:xor": "rows",
    "bundled:wine": "rows",
    "bundled:diabetes": "rows",
    "bundled:digits": "images",
    "bundled:functions": "graphs",
    "bundled:karate": "nodes",
    "bundled:packages": "texts",
    "bundled:glyphs": "captions",
    "bundled:pendulums": "series",
}
"""Names in place of `data.path` of data sets that need no download, and the kind of their examples."""
PACKAGED = {"stdlib": "tokens"} | BUNDLED
"""All names that are no paths."""


class DataConfig(Section):
    path: str | tuple[Source, ...] = "stdlib"
    """A folder made by `muster data prepare`, a list of {path, weight}, or `stdlib`: the source code of this machine's
    Python standard library, prepared at first use under run.root/data. Images: a Parquet file or a folder of them, as
    Hugging Face `datasets` writes them; no preparation is needed. Graphs: likewise. Rows: the same, with a column of
    numbers each. Pairs: the same, with two columns of text. Texts: with one of text, and one of labels. Small bundled
    ones to begin with: bundled:xor, bundled:wine and bundled:diabetes (rows), bundled:digits (images of 8 x 8),
    bundled:functions (graphs), bundled:karate (nodes), bundled:dates (pairs), bundled:packages (texts),
    bundled:glyphs (images with captions), bundled:pendulums (series), written at first use under run.root/data."""
    kind: Literal["rows", "images", "graphs", "nodes", "pairs", "texts", "captions", "series"] | None = None
    """What examples are, for families that take several kinds of them; None: the first that the family takes."""
    images: ImagesConfig = ImagesConfig()
    """How images are read."""
    rows: RowsConfig = RowsConfig()
    """How rows are read."""
    pairs: PairsConfig = PairsConfig()
    """How pairs are read."""
    texts: TextsConfig = TextsConfig()
    """How texts with labels are read."""
    graphs: GraphsConfig = GraphsConfig()
    """How the nodes of a graph are read."""
    document_mask: bool = True
    """Attention stays within a document and positions restart at each document."""
    on_bad_page: Literal["stop", "skip"] = "stop"
    """What happens when a page fails its checksum, or an image cannot be decoded: the run stops, or what is in it gets
    weight zero and is counted."""
    prefetch: int = Field(4, gt=0, le=2**16)
    """Micro-batches read ahead of the training thread."""
    prepare: PrepareConfig = PrepareConfig()
    """How raw text becomes token shards."""
    limits: LimitsConfig = LimitsConfig()
    """Limits on reading untrusted files."""

    _path = field_validator("path")(file_path)
