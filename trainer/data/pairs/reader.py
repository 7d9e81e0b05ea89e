"""Reads pairs of texts, all of them into memory: a pair is a pure function of (seed, index)."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from configs import ConfigError
from configs.reading.parse import shortened
from configs.sections.data import DataConfig, PairsConfig
from models.batch import PairBatch
from models.loss import IGNORE
from trainer.data.manifest import Split, sources_of
from trainer.data.parquet_files import EmptySplit, check_groups, files_of_splits, identity, readable, rows_of_split
from trainer.data.read.in_memory import InMemory
from trainer.data.read.order import KEPT_ORDERS, mix, shuffled
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.data.tokenizer.tokenizer_files import end_of_text

NEEDS = "pairs (two columns of text, data.pairs.source and target, or a struct translation with such fields)"
STRUCT = "translation"
"""Column of Hugging Face's data sets of translations: a text for each language."""
MOST_BYTES = 4 << 30
"""Most bytes of all texts."""
BUCKET, SORTED = 64, 64
"""Pairs of nearly equal length that are read one after the other, and buckets that are sorted together."""
KEPT = 1 << 16
"""Pairs whose tokens are kept."""


class Texts(NamedTuple):
    """The pairs of some files."""

    source: pa.ChunkedArray
    target: pa.ChunkedArray
    sha256: str
    """Identity of the files."""

    @property
    def whole(self) -> np.ndarray:
        """Bool [pairs]: both texts are there."""
        found = [pc.greater(pc.fill_null(pc.binary_length(each), 0), 0).to_numpy() for each in self[:2]]
        return found[0] & found[1]


class Pairs(InMemory):
    """Pairs of a Parquet file, or of a folder of them. Not for several threads at once.

    The training split goes on epoch after epoch, each in a different order: shuffled, but with pairs of nearly equal
    length side by side, which need little padding. The held-out split (see `files_of_splits`, and `rows_of_split`) has
    one order and ends at `len()`. Pairs without a source or a target belong to neither.

    Args:
        config: with a tokenizer's file in `prepare.tokenizer`.
        most: tokens of a source and of a target, longer ones of which are cut off.

    Raises:
        ConfigError: no such files or columns, they hold no texts; several sources; an empty split.
    """

    def __init__(self, config: DataConfig, most: int, seed: int, split: Split = "train"):
        self.config, self.most, self.split = config, most, split
        if len(sources := sources_of(config)) > 1:
            raise ConfigError(f"data.path has {len(sources)} sources, but pairs are read from exactly one")
        self.path = sources[0].path
        files = files_of_splits(self.path, NEEDS)
        self.apart = bool(files["held_out"])
        """Whether the held-out split has files of its own."""
        texts = read_texts(files[split] or files["train"], config.pairs)
        self.sha256, whole = texts.sha256, texts.whole
        chosen = rows_of_split(split, len(whole), bool(files["held_out"]), config.prepare)
        self.left_out = int((chosen & ~whole).sum())
        """Pairs of the split without a source or a target."""
        rows = pa.array(np.flatnonzero(chosen & whole))
        if not len(rows):
            why = f"{self.left_out:,} are without a source or a target" if self.left_out else ""
            raise EmptySplit(self.path, "pair", split, why)
        self.source, self.target = texts.source.take(rows), texts.target.take(rows)
        self._lengths = sum(pc.binary_length(each).to_numpy().astype(np.int64) for each in (self.source, self.target))
        self._key = mix(seed, "pairs")
        self.order = lru_cache(KEPT_ORDERS)(self._order_of)
        self._tokens = lru_cache(KEPT)(self._encoded)

    def __len__(self) -> int:
        return len(self._lengths)

    def examples(self, indices: Sequence[int]) -> PairBatch:
        """Pairs, padded; -1 stands for a pair of which nothing is trained on. Raises ConfigError if the tokenizer fails
        on one."""
        end = self._end
        pairs = [self._tokens(self.locate(index)) if index >= 0 else ((end,), ()) for index in indices]
        source, mask = _padded([source for source, _ in pairs], end)
        labels, real = _padded([target for _, target in pairs], IGNORE)
        inputs = torch.full_like(labels, end)
        inputs[:, 1:] = labels[:, :-1].where(real[:, :-1], torch.tensor(end))
        ids = torch.tensor(indices, dtype=torch.int64)
        return PairBatch(source, mask, inputs, labels, ids, self._decode if self.split == "held_out" else None)

    def texts(self) -> Iterator[str]:
        """Of all pairs."""
        for source, target in zip(self.source, self.target, strict=True):
            yield from (source.as_py(), target.as_py())

    @cached_property
    def _tokenizer(self) -> TokenizerProcess:
        return TokenizerProcess(self.config.prepare.tokenizer, self.config.limits)

    @cached_property
    def _end(self) -> int:
        return end_of_text(self._tokenizer.token_to_id, self._tokenizer.file)[1]

    def _encoded(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        texts = (self.source[row].as_py(), self.target[row].as_py())
        source, target = ((*self._tokenizer.encode(text)[: self.most - 1], self._end) for text in texts)
        return source, target

    def _decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [self._tokenizer.decode(each) for each in tokens]

    def _order_of(self, epoch: int) -> np.ndarray:
        if self.split == "held_out":
            return shuffled(len(self), mix("held out"))
        key, several = mix(self._key, epoch), SORTED * BUCKET
        order = np.asarray(shuffled(len(self), key))
        blocks = [order[start : start + several] for start in range(0, len(order), several)]
        order = np.concatenate([block[self._lengths[block].argsort(kind="stable")] for block in blocks])
        starts = np.asarray(shuffled(-(-len(order) // BUCKET), mix(key, "buckets"))) * BUCKET
        return np.concatenate([order[start : start + BUCKET] for start in starts])


def _padded(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of one length, which of them is no padding)."""
    found = torch.full((len(rows), max(1, *map(len, rows))), value, dtype=torch.int64)
    mask = torch.zeros_like(found, dtype=torch.bool)
    for number, row in enumerate(rows):
        found[number, : len(row)], mask[number, : len(row)] = torch.tensor(row, dtype=torch.int64), True
    return found, mask


def read_texts(files: Sequence[Path], config: PairsConfig) -> Texts:
    """Read pairs.

    Raises:
        ConfigError: a file is not Parquet, or too large; a column is missing or holds no texts.
    """
    digest, columns, size = hashlib.sha256(), [], 0
    for path in files:
        with readable(path):
            digest.update(identity(path))
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
                check_groups(path, groups)
                _check_bytes(path, size + sum(groups))
                names = [_column(path, file.schema_arrow, key, name) for key, name in config]
            # Each text once: a file of a few bytes may repeat one so often that it fills the memory.
            with pq.ParquetFile(path, read_dictionary=names) as file:
                table = file.read(names, use_threads=False).flatten()
            size += sum(_bytes(chunk) for name in names for chunk in table[name].chunks)
            _check_bytes(path, size)
            columns.append([table[name].cast(pa.large_string()) for name in names])
            for each in columns[-1]:
                each.validate(full=True)  # that it is UTF-8
    source, target = (pa.chunked_array([chunk for each in columns for chunk in each[n].chunks]) for n in (0, 1))
    return Texts(source, target, digest.hexdigest())


def _check_bytes(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise ConfigError(f"{path.parent}: the pairs take over {MOST_BYTES:,} bytes of memory")


def _bytes(texts: pa.DictionaryArray) -> int:
    return pc.sum(pc.binary_length(texts.dictionary).cast(pa.int64()).take(texts.indices)).as_py() or 0


def _column(path: Path, schema: pa.Schema, key: str, name: str) -> str:
    """What the column of texts is called in the file. Raises ConfigError."""
    if schema.names.count(name) > 1:
        raise ConfigError(f"{path} has several columns {name}: rename all but one, or set data.pairs.{key} to another")
    there = {field.name: field.type for field in schema}
    if STRUCT in there and pa.types.is_struct(there[STRUCT]):
        there |= {f"{STRUCT}.{field.name}": field.type for field in there[STRUCT].fields}
    found = name if name in there else f"{STRUCT}.{name}"
    if found not in there:
        raise ConfigError(
            f"{path} has no column {name} (it has {shortened(', '.join(there), 200)}): set data.pairs.{key}"
        )
    if not (pa.types.is_string(there[found]) or pa.types.is_large_string(there[found])):
        raise ConfigError(
            f"{path}: column {found} is {shortened(str(there[found]), 60)}, not text: set data.pairs.{key}"
        )
    return found
