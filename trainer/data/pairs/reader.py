"""Reads pairs of texts, all of them into memory: a pair is a pure function of (seed, index)."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from configs.sections.data import DataConfig, PairsConfig
from models.batch import PairBatch
from models.loss import IGNORE
from trainer.data.manifest import Split, only_source
from trainer.data.parquet_files import EmptySplit, files_of_splits, rows_of_split
from trainer.data.read.order import KEPT_ORDERS, mix
from trainer.data.texts.encoded import Encoded, padded, text_columns

NEEDS = "pairs (two columns of text, data.pairs.source and target, or a struct translation with such fields)"
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


class Pairs(Encoded):
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
        self.path = only_source(config, "pairs")
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
        self.order = lru_cache(KEPT_ORDERS)(self.order_of)
        self._tokens = lru_cache(KEPT)(self._encoded)

    def examples(self, indices: Sequence[int]) -> PairBatch:
        """Pairs, padded; -1 stands for a pair of which nothing is trained on. Raises ConfigError if the tokenizer fails
        on one."""
        end = self.end
        pairs = [self._tokens(self.locate(index)) if index >= 0 else ((end,), ()) for index in indices]
        source, mask = padded([source for source, _ in pairs], end)
        labels, real = padded([target for _, target in pairs], IGNORE)
        inputs = torch.full_like(labels, end)
        inputs[:, 1:] = labels[:, :-1].where(real[:, :-1], torch.tensor(end))
        ids = torch.tensor(indices, dtype=torch.int64)
        return PairBatch(source, mask, inputs, labels, ids, self.decode if self.split == "held_out" else None)

    def texts(self) -> Iterator[str]:
        """Of all pairs."""
        for source, target in zip(self.source, self.target, strict=True):
            yield from (source.as_py(), target.as_py())

    def _encoded(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        texts = (self.source[row].as_py(), self.target[row].as_py())
        source, target = ((*self.tokenizer.encode(text)[: self.most - 1], self.end) for text in texts)
        return source, target


def read_texts(files: Sequence[Path], config: PairsConfig) -> Texts:
    """Read pairs.

    Raises:
        ConfigError: a file is not Parquet, or too large; a column is missing or holds no texts.
    """
    (source, target), sha256 = text_columns(files, {f"pairs.{key}": name for key, name in config}, "pairs")
    return Texts(source, target, sha256)
