"""Reads rows of numbers, all of them into memory: a row is a pure function of (seed, index)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs import ConfigError, counted
from configs.sections.data import DataConfig, RowsConfig
from models.batch import RowBatch
from trainer.data.manifest import Split, only_source
from trainer.data.parquet_files import (
    EmptySplit,
    check_bytes,
    check_groups,
    chosen_and_fitted,
    files_of_splits,
    identity,
    readable,
    row_of,
)
from trainer.data.read.in_memory import InMemory, check_numbers, epochs, labels_of, scale_of

NEEDS = "rows (a column of numbers for each feature, and data.rows.labels)"


class Table(NamedTuple):
    """The rows of some files; float64, in which NaN is a missing number."""

    features: np.ndarray
    """[rows, F]"""
    labels: np.ndarray
    """[rows, K]"""
    names: tuple[str, ...]
    """Of the features."""
    starts: list[tuple[int, str]]
    """Number of the first row of each file, and the file's name."""

    @property
    def whole(self) -> np.ndarray:
        """Bool [rows]: nothing is missing or infinite."""
        return np.isfinite(self.features).all(1) & np.isfinite(self.labels).all(1)

    @property
    def left_out(self) -> str:
        """How many rows are not whole, and where the first one is; empty: none."""
        if not (bad := ~self.whole).any():
            return ""
        unlabelled, first = int((~np.isfinite(self.labels)).any(1).sum()), int(bad.argmax())
        return (
            f"{counted(int(bad.sum()), 'row')} left out, {unlabelled:,} without a label and the others with a missing "
            f"or infinite number: the first is {row_of(first, self.starts)}"
        )


class Rows(InMemory):
    """Rows of a Parquet file, or of a folder of them. Not for several threads at once.

    The training split goes on epoch after epoch, each in a different order; the held-out split (`validation*` or
    `test*` files, or without them the share `data.prepare.held_out` of all rows) has one order and ends at `len()`.
    Rows that are not whole belong to neither.

    Args:
        numbers: the labels are numbers, not classes.

    Attributes:
        classes: largest label + 1; 0: the labels are numbers.
        left_out: see `Table.left_out`.

    Raises:
        ConfigError: no such files, a column is missing or holds no numbers, a label is not a class; several sources; an
            empty split.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train", numbers: bool = False):
        self.split = split
        self.path = only_source(config, "rows")
        files = files_of_splits(self.path, NEEDS)
        table = trained = read_table(files["train"], config.rows)
        if split == "held_out" and files["held_out"]:
            table = read_table(files["held_out"], config.rows, trained.names)
        wholes = table.whole, trained.whole
        chosen, fitted = chosen_and_fitted(split, *wholes, bool(files["held_out"]), config.prepare)
        if not (chosen.any() and fitted.any()):
            raise EmptySplit(self.path, "row", split, table.left_out or trained.left_out)
        self.names, self.left_out = table.names, table.left_out
        mean, deviation = scale_of(trained.features[fitted], config.rows.standardise)
        self.features = torch.from_numpy(((table.features[chosen] - mean) / deviation).astype(np.float32))
        labels = table.labels[chosen], trained.labels[fitted]
        self.labels, self.classes, self.scale = labels_of(*labels, config.rows, "rows", self.path, numbers)
        self.order = epochs(len(self), split, seed, "rows")

    def __len__(self) -> int:
        return len(self.labels)

    def examples(self, indices: Sequence[int]) -> RowBatch:
        """Rows stacked; -1 stands for padding: zeros without a label."""
        rows = torch.tensor([self.locate(index) if index >= 0 else 0 for index in indices])
        ids = torch.tensor(indices, dtype=torch.int64)
        features, labels = self.features[rows], self.labels[rows]
        features[ids < 0] = 0
        labels[ids < 0] = -1 if self.scale is None else 0
        return RowBatch(features, labels, ids, self.scale)


class Columns(NamedTuple):
    """What the footers of some files say of their rows."""

    names: tuple[str, ...]
    """Of the features."""
    sha256: str
    """As `ImageFiles.sha256`."""
    starts: list[tuple[int, str]]
    """As `Table.starts`."""
    rows: int


def read_columns(files: Sequence[Path], config: RowsConfig, names: Sequence[str] = ()) -> Columns:
    """Check files without reading the rows.

    Args:
        names: of the features; empty: those of `config`, which of the first file are by default all but the labels.

    Raises:
        ConfigError: a file cannot be read, lacks a column, or has a feature or label that is no number; too many rows.
    """
    digest, starts, rows = hashlib.sha256(), [], 0
    for path in files:
        with readable(path):
            digest.update(identity(path))
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        names = names or config.features or [each for each in schema.names if each not in config.labels]
        _check_columns(path, schema, names, config.labels)
        check_groups(path, [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)])
        starts.append((rows, path.name))
        rows += metadata.num_rows
        check_bytes(path, 8 * rows * (len(names) + len(config.labels)), "rows")
    return Columns(tuple(names), digest.hexdigest(), starts, rows)


def read_table(files: Sequence[Path], config: RowsConfig, names: Sequence[str] = ()) -> Table:
    """Read rows. Arguments and errors as `read_columns`."""
    found = read_columns(files, config, names)
    features, labels = [], []
    for path in files:
        with readable(path), pq.ParquetFile(path) as file:
            table = file.read([*found.names, *config.labels], use_threads=False)
        features.append(_numbers(table, found.names))
        labels.append(_numbers(table, config.labels))
    return Table(np.concatenate(features), np.concatenate(labels), found.names, found.starts)


def _check_columns(path: Path, schema: pa.Schema, names: Sequence[str], labels: Sequence[str]) -> None:
    for key, each in [*(("labels", each) for each in labels), *(("features", each) for each in names)]:
        otherwise = f"leave it out of data.rows.{key}, or convert it to numbers"
        check_numbers(path, schema, each, f"data.rows.{key}", otherwise)
    if not names:
        raise ConfigError(f"{path} has no columns but the labels ({', '.join(labels)}): it needs {NEEDS}")


def _numbers(table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """[rows, names] float64."""
    columns = [table[name].cast(pa.float64()).to_numpy() for name in names]
    return np.stack(columns, axis=1).astype(np.float64)
