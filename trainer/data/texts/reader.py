"""Reads texts with labels, all of them into memory: a text is a pure function of (seed, index)."""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from configs import counted
from configs.sections.data import DataConfig, TextsConfig
from models.batch import TextBatch
from trainer.data.manifest import Split, only_source
from trainer.data.parquet_files import (
    EmptySplit,
    check_bytes,
    chosen_and_fitted,
    files_of_splits,
    readable,
    row_of,
)
from trainer.data.read.in_memory import check_numbers, labels_of
from trainer.data.read.order import KEPT_ORDERS, mix
from trainer.data.tokenizer.tokenizer_files import content, settings

from .encoded import Encoded, padded, text_columns

NEEDS = "texts (a column of text, data.texts.text, and data.texts.labels)"
KEPT = 1 << 16
"""Texts whose tokens are kept."""
UNKNOWN = -1
"""Label of Hugging Face's data sets for an example whose class is not published."""


class Table(NamedTuple):
    """The texts of some files."""

    texts: pa.ChunkedArray
    """None: damaged."""
    labels: np.ndarray
    """[texts, K] float64; NaN: missing."""
    damaged: np.ndarray
    """Bool [texts]: no UTF-8."""
    empty: np.ndarray
    """Bool [texts]: nothing but white space, or missing; damaged ones too."""
    starts: list[tuple[int, str]]
    """Number of the first text of each file, and the file's name."""
    sha256: str
    """Identity of the files."""

    @property
    def unlabelled(self) -> np.ndarray:
        """Bool [texts]."""
        return ~np.isfinite(self.labels).all(1)

    @property
    def whole(self) -> np.ndarray:
        """Bool [texts]: there is a text, and a label."""
        return ~(self.empty | self.unlabelled)

    @property
    def left_out(self) -> str:
        """How many texts are not whole, and where the first one is; empty: none."""
        if not (bad := ~self.whole).any():
            return ""
        first, others = int(bad.argmax()), int((self.unlabelled & ~self.empty).sum())
        why = {"damaged": self.damaged, "empty": self.empty & ~self.damaged}
        parts = [f"{int(each.sum()):,} {how}" for how, each in why.items() if each.any()]
        parts += [f"{others:,} without a label"] if others else []
        return (
            f"{counted(int(bad.sum()), 'text')} left out ({', '.join(parts)}): the first is "
            f"{row_of(first, self.starts)}"
        )


class Texts(Encoded):
    """Texts of a Parquet file, or of a folder of them. Not for several threads at once.

    The training split goes on epoch after epoch, each in a different order, see `Encoded`. The held-out split (see
    `files_of_splits`, and `rows_of_split`) has one order and ends at `len()`. Texts that are not whole belong to
    neither.

    Args:
        config: with a tokenizer's file in `prepare.tokenizer`.
        most: tokens of a text, of a longer one of which the end is cut off.
        numbers: the labels are numbers, not classes.

    Attributes:
        classes: largest label + 1; 0: the labels are numbers.
        left_out: see `Table.left_out`.
        typical: examples of about the mean length.

    Raises:
        ConfigError: no such files or columns, they hold no texts or labels; several sources; an empty split.
    """

    def __init__(self, config: DataConfig, most: int, seed: int, split: Split = "train", numbers: bool = False):
        self.config, self.most, self.split = config, most, split
        self.path, keys = only_source(config, "texts"), config.texts
        files = files_of_splits(self.path, NEEDS)
        self.apart = bool(files["held_out"])
        """Whether the held-out split has files of its own."""
        table = trained = read_table(files["train"], keys, numbers)
        if split == "held_out" and self.apart:
            table = read_table(files["held_out"], keys, numbers)
        wholes = table.whole, trained.whole
        chosen, fitted = chosen_and_fitted(split, *wholes, self.apart, config.prepare)
        if not (chosen.any() and fitted.any()):
            raise EmptySplit(self.path, "text", split, table.left_out or trained.left_out)
        self.sha256, self.left_out = table.sha256, table.left_out
        self.rows = table.texts.take(pa.array(np.flatnonzero(chosen)))
        labels = table.labels[chosen], trained.labels[fitted]
        self.labels, self.classes, self.scale = labels_of(*labels, keys, "texts", self.path, numbers)
        self._lengths = pc.binary_length(self.rows).to_numpy().astype(np.int64)
        self._key = mix(seed, "texts")
        self.order = lru_cache(KEPT_ORDERS)(self.order_of)
        self._tokens = lru_cache(KEPT)(self._encoded)
        lengths = self._lengths[np.asarray(self.order(0))]
        self.typical = np.abs(lengths - lengths.mean()).argsort(kind="stable")[:2].tolist()

    def examples(self, indices: Sequence[int]) -> TextBatch:
        """Texts, padded; -1 stands for an empty one without a label. Raises ConfigError if the tokenizer fails on
        one."""
        rows = [self.locate(index) if index >= 0 else None for index in indices]
        tokens = [self._around[0] if row is None else self._tokens(row) for row in rows]
        ids, labels = torch.tensor(indices, dtype=torch.int64), self.labels[[row or 0 for row in rows]]
        labels[ids < 0] = -1 if self.scale is None else 0
        decode = self.decode if self.split == "held_out" else None
        return TextBatch(*padded(tokens, self.end), labels, ids, self.scale, decode)

    def texts(self) -> Iterator[str]:
        """All of them."""
        for each in self.rows:
            yield each.as_py()

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens before and after every text: BERT's [CLS] and [SEP], or whatever the tokenizer's settings call
        `cls_token` and `sep_token`; without them the end-of-text token before it."""
        told = settings(self.tokenizer.file)
        first, last = (
            None if (name := content(told.get(key))) is None else self.tokenizer.token_to_id(name)
            for key in ("cls_token", "sep_token")
        )
        return (self.end if first is None else first,), () if first is None or last is None else (last,)

    def _encoded(self, row: int) -> tuple[int, ...]:
        before, after = self._around
        tokens = self.tokenizer.encode(self.rows[row].as_py())
        return (*before, *tokens[: max(self.most - len(before) - len(after), 0)], *after)[: self.most]


def read_table(files: Sequence[Path], keys: TextsConfig, numbers: bool = False) -> Table:
    """Read texts and labels.

    Args:
        numbers: the labels are numbers, not classes.

    Raises:
        ConfigError: a file is not Parquet, or too large; a column is missing, or holds no texts or no numbers.
    """
    (texts,), sha256 = text_columns(files, {"texts.text": keys.text}, "texts", check=False)
    labels, starts, rows = [], [], 0
    for path in files:
        with readable(path), pq.ParquetFile(path) as file:
            for name in keys.labels:
                otherwise = "set data.texts.labels, or number the classes from 0"
                check_numbers(path, file.schema_arrow, name, "data.texts.labels", otherwise)
            check_bytes(path, 8 * len(keys.labels) * (rows + file.metadata.num_rows), "labels")
            table = file.read(list(keys.labels), use_threads=False)
        columns = [table[name].cast(pa.float64()).to_numpy() for name in keys.labels]
        labels.append(np.stack(columns, axis=1).astype(np.float64))
        starts.append((rows, path.name))
        rows += table.num_rows
    found = np.concatenate(labels)
    if not numbers:
        found[found == UNKNOWN] = np.nan
    texts, damaged = _readable(texts)
    length = pc.fill_null(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0)
    return Table(texts, found, damaged, pc.equal(length, 0).to_numpy(), starts, sha256)


def _readable(texts: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """(texts, which are damaged): damaged ones become None."""
    damaged = np.zeros(len(texts), bool)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        whole = []
        for row, data in enumerate(texts.cast(pa.large_binary()).to_pylist()):
            try:
                whole.append(None if data is None else data.decode())
            except UnicodeDecodeError:
                whole.append(None)
                damaged[row] = True
        texts = pa.chunked_array([pa.array(whole, pa.large_string())])
    return texts, damaged
