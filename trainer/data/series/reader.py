"""Reads series of observations at irregular times, all of them into memory: one is a pure function of (seed, index)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs import Config, ConfigError, counted
from configs.reading.parse import shortened
from configs.sections.data import DataConfig
from configs.sections.pairs import check_packaged
from models.batch import SeriesBatch
from trainer.data.bundled import at_hand
from trainer.data.manifest import Split, only_source, sources_of
from trainer.data.parquet_files import (
    EmptySplit,
    check_bytes,
    check_groups,
    chosen_and_fitted,
    files_of_splits,
    identity,
    readable,
)
from trainer.data.read.in_memory import InMemory, epochs

TIMES, VALUES = "times", "values"
NEEDS = f"series (columns {TIMES}: list of numbers, ascending, and {VALUES}: as many lists of numbers)"


OBJECT = 32
"""Bytes that a number takes in a list of Python's."""


class Found(NamedTuple):
    """The series of some files, N of them, padded to the longest."""

    times: np.ndarray
    """[N, T] float64."""
    values: np.ndarray
    """[N, T, V] float64; NaN: not observed."""


class Series(InMemory):
    """Series of a Parquet file, or of a folder of them. Not for several threads at once.

    The splits are as of `trainer.data.rows.reader.Rows`. Times count from the first of a series, in units of the
    longest series to train on; values have mean 0 and variance 1 in the training split, number by number.

    Attributes:
        width: numbers of an observation.

    Raises:
        ConfigError: no such files, or they hold no series; several sources; an empty split.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train"):
        self.split = split
        self.path = only_source(config, "series")
        files = files_of_splits(self.path, NEEDS)
        found = trained = read_series(files["train"])
        if split == "held_out" and files["held_out"]:
            found = read_series(files["held_out"], trained.values.shape[2])
        wholes = np.ones(len(found.times), bool), np.ones(len(trained.times), bool)
        chosen, fitted = chosen_and_fitted(split, *wholes, bool(files["held_out"]), config.prepare)
        if not (chosen.any() and fitted.any()):
            raise EmptySplit(self.path, "series", split)
        self.width = trained.values.shape[2]
        known = trained.values[fitted].reshape(-1, self.width)
        counts = np.isfinite(known).sum(0)
        if not counts.all():
            raise ConfigError(f"data.path={self.path}: number {int(counts.argmin())} of {VALUES} is never observed")
        mean, deviation = np.nanmean(known, 0), np.nanstd(known, 0)
        values = (found.values[chosen] - mean) / np.where(deviation > 0, deviation, 1.0)
        times = found.times - found.times[:, :1]
        longest = (trained.times[fitted][:, -1] - trained.times[fitted][:, 0]).max()
        self.times = torch.from_numpy((times[chosen] / (longest or 1.0)).astype(np.float32))
        self.observed = torch.from_numpy(np.isfinite(values))
        self.values = torch.from_numpy(np.nan_to_num(values).astype(np.float32))
        self.order = epochs(len(self), split, seed, "series")

    def __len__(self) -> int:
        return len(self.times)

    def examples(self, indices: Sequence[int]) -> SeriesBatch:
        """Series stacked; -1 stands for padding, in which nothing is observed."""
        rows = torch.tensor([self.locate(index) if index >= 0 else 0 for index in indices])
        ids = torch.tensor(indices, dtype=torch.int64)
        observed = self.observed[rows] & (ids >= 0)[:, None, None]
        return SeriesBatch(self.times[rows], self.values[rows] * observed, observed, ids)


def read_series(files: Sequence[Path], width: int | None = None) -> Found:
    """Read the series of files.

    Args:
        width: numbers that an observation must have; None: as the first one has.

    Raises:
        ConfigError: a file cannot be read or holds no series; times that do not ascend; too many.
    """
    every: list[tuple[np.ndarray, np.ndarray]] = []
    numbers = 0
    for path in files:
        with readable(path), pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            check_groups(path, [group.total_byte_size for group in groups])
            # A few bytes may say that a number is repeated so often that it fills the memory.
            numbers += sum(group.column(n).num_values for group in groups for n in range(group.num_columns))
            check_bytes(path, OBJECT * numbers, "series")
            table = file.read([TIMES, VALUES], use_threads=False)
        columns = [table[name].to_pylist() for name in (TIMES, VALUES)]
        for row, (times, values) in enumerate(zip(*columns, strict=True)):
            every.append(_checked(path, row, times, values, width))
            width = every[0][1].shape[1]
    if not every:
        raise ConfigError(f"{files[0].parent}: the Parquet files have no rows")
    assert width
    longest = max(len(times) for times, _ in every)
    check_bytes(files[0], 8 * len(every) * longest * (width + 1), "series, padded to the longest,")
    found = Found(np.zeros((len(every), longest)), np.full((len(every), longest, width), np.nan))
    for row, (times, values) in enumerate(every):
        found.times[row] = np.pad(times, (0, longest - len(times)), mode="edge")
        found.values[row, : len(times)] = values
    return found


def _checked(path: Path, row: int, times: Any, values: Any, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    """[T] and [T, V] float64 of a row. Raises ConfigError."""
    where = f"{path}, row {row}"
    if not times or not values or len(times) != len(values):
        sizes = f"{counted(len(times or ()), 'time')} and {len(values or ())} {VALUES}"
        raise ConfigError(f"{where} has {sizes}: it needs {NEEDS}")
    when = np.array([np.nan if each is None else each for each in times], np.float64)
    if not np.isfinite(when).all() or (np.diff(when) < 0).any():
        raise ConfigError(f"{where}: {TIMES} must be finite and ascend")
    width = width or len(values[0] or ()) or 1
    if wrong := [len(each or ()) for each in values if len(each or ()) != width]:
        raise ConfigError(f"{where} has an observation of {counted(wrong[0], 'number')}, others have {width}")
    what = np.array([[np.nan if number is None else number for number in each] for each in values], np.float64)
    what[np.isinf(what)] = np.nan
    return when, what


def _check_columns(path: Path, schema: pa.Schema) -> None:
    for name, depth in ((TIMES, 1), (VALUES, 2)):
        if schema.names.count(name) != 1:
            raise ConfigError(f"{path} has not one column {name} (it has {shortened(', '.join(schema.names), 200)}): "
                              f"it needs {NEEDS}")  # fmt: skip
        kind = schema.field(name).type
        for _ in range(depth):
            kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else pa.null()
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise ConfigError(f"{path}: {name} is {shortened(str(schema.field(name).type), 60)}: it needs {NEEDS}")


def ensure_series(config: Config) -> tuple[DataConfig, list[str]]:
    """See `trainer.data.kinds.Kind.ensure`. Raises ConfigError as `Series`, or if the model has other sizes."""
    check_packaged(config, "series")
    data = at_hand(config)
    series = Series(data, config.run.seed)
    if files_of_splits(series.path, NEEDS)["held_out"]:
        Series(data, config.run.seed, "held_out")
    if (own := getattr(config.model, "inputs", series.width)) != series.width:
        raise ConfigError(
            f"model.inputs is {own}, but an observation of data.path={config.data.path} has {series.width} numbers: "
            f"set model.inputs={series.width}"
        )
    most = series.times.shape[1]
    return data, [f"data.path={series.path}: {len(series):,} series of up to {most} times, {series.width} numbers each"]


def inputs_of_series(data: DataConfig) -> tuple[str, str, dict[str, Any]]:
    """(path, digest, profile) of what a run reads."""
    path, digest, rows = sources_of(data)[0].path, hashlib.sha256(), 0
    for file in files_of_splits(path, NEEDS)["train"]:
        with readable(file):
            digest.update(identity(file))
            rows += pq.read_metadata(file).num_rows
    return path, digest.hexdigest(), {"series": rows}
