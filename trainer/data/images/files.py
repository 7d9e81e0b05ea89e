"""The Parquet files of an image data set: checks them before a run starts."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import ConfigError
from trainer.data.parquet_files import check_groups, identity, readable

IMAGE, LABEL, BYTES = "image", "label", "bytes"
NEEDS = f"images, as `datasets` writes them (columns {IMAGE}: struct<{BYTES}, path> and {LABEL}: int)"


class Group(NamedTuple):
    """A row group."""

    file: Path
    number: int
    rows: int


class ImageFiles(NamedTuple):
    groups: list[Group]
    labels: np.ndarray
    """int64 [rows], those of all groups concatenated; -1: none."""
    sha256: str
    """Digest of the names, sizes and footers of the files; a footer has the offsets, sizes and statistics of all that
    is in the file."""
    unlabelled: tuple[int, str]
    """How many rows have no label, and where the first one is."""


def open_files(files: list[Path]) -> ImageFiles:
    """Check every file: its columns, the size of its row groups, and its labels.

    Raises:
        ConfigError: a file cannot be read, lacks a column, or has negative labels; no row has a label; a row group that
            is too large.
    """
    groups: list[Group] = []
    labels: list[np.ndarray] = []
    digest = hashlib.sha256()
    missing, first = 0, ""
    for path in files:
        with readable(path):
            digest.update(identity(path))
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow)
                found = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
                check_groups(path, [group.total_byte_size for group in found])
                groups += [Group(path, number, group.num_rows) for number, group in enumerate(found)]
                column = file.read([LABEL], use_threads=False)[LABEL]
        none = column.is_null().to_numpy()
        values = column.fill_null(0).to_numpy().astype(np.int64)
        if len(values) and values.min() < 0:
            raise ConfigError(f"{path}: {LABEL} is {values.min()} in a row: labels must be 0 or above")
        if none.any():
            missing, first = missing + int(none.sum()), first or f"{path.name}, row {int(none.argmax())}"
        labels.append(np.where(none, -1, values))
    if not any((each >= 0).any() for each in labels):
        raise ConfigError(f"{files[0].parent}: the Parquet files have no rows{' with a label' if missing else ''}")
    whole = np.concatenate(labels)
    return ImageFiles([group for group in groups if group.rows], whole, digest.hexdigest(), (missing, first))


def _check_columns(path: Path, schema: pa.Schema) -> None:
    wanted = f"columns {IMAGE}: struct<{BYTES}, path> and {LABEL}: int, as `datasets` writes them"
    for name in (IMAGE, LABEL):
        if name not in schema.names:
            raise ConfigError(
                f"{path} has no column {name} (it has {', '.join(schema.names)[:200]}): it needs {wanted}"
            )
    image, label = schema.field(IMAGE).type, schema.field(LABEL).type
    inside = [field.name for field in image] if pa.types.is_struct(image) else []
    if BYTES not in inside or not _is_binary(image.field(BYTES).type):
        raise ConfigError(f"{path}: {IMAGE} is {str(image)[:100]}: it needs {wanted}")
    if not pa.types.is_integer(label):
        raise ConfigError(f"{path}: {LABEL} is {str(label)[:100]}: it needs {wanted}")


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
