"""The Parquet files of an image data set: finds them, checks them before a run starts, and identifies them."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import ConfigError
from configs.reading.lfs import refuse_pointer
from configs.reading.parse import clip
from trainer.data.manifest import Split

IMAGE, LABEL, BYTES = "image", "label", "bytes"
HELD_OUT = ("validation", "valid", "test")
"""Name prefixes of files that are never trained on; the first one present is the held-out split."""
MOST_FILES = 100_000
FOOTER = 64 << 20
"""Most bytes of a footer."""
LARGEST_GROUP = 1 << 30
"""Most bytes that a row group may decompress to: `datasets` writes 100 images per row group."""


class Group(NamedTuple):
    """A row group."""

    file: Path
    number: int
    rows: int


class ImageFiles(NamedTuple):
    groups: list[Group]
    labels: np.ndarray
    """int64 [rows], those of all groups concatenated."""
    sha256: str
    """Digest of the names, sizes and footers of the files; a footer has the offsets, sizes and statistics of all that
    is in the file."""


def image_files(path: str) -> dict[Split, list[Path]]:
    """The Parquet files of each split: those named `validation...` or `test...` are held out, if there are any.

    Raises:
        ConfigError: there are none, too many, or none to train on.
    """
    found = Path(path)
    if found.is_file():
        return {"train": [found], "held_out": []}
    files = sorted(found.rglob("*.parquet"))[: MOST_FILES + 1] if found.is_dir() else []
    if not files or len(files) > MOST_FILES:
        what = "does not exist" if not found.exists() else "has no *.parquet" if not files else f"has over {MOST_FILES}"
        raise ConfigError(
            f"data.path={path} {what}: set it to a Parquet file of images, or a folder of them, as `datasets` writes "
            f"them (columns {IMAGE}: struct<{BYTES}, path> and {LABEL})"
        )
    apart = {name: [file for file in files if file.name.startswith(name)] for name in HELD_OUT}
    held_out = next((named for named in apart.values() if named), [])
    others = {file for named in apart.values() for file in named}
    train = [file for file in files if file not in others]
    if not train:
        raise ConfigError(f"data.path={path} has only held-out files, such as {files[0].name}: add files to train on")
    return {"train": train, "held_out": held_out}


def open_files(files: list[Path]) -> ImageFiles:
    """Check every file: its columns, the size of its row groups, and its labels.

    Raises:
        ConfigError: a file cannot be read, lacks a column, or has labels that are missing or negative; no rows; a row
            group that is too large.
    """
    groups: list[Group] = []
    labels: list[np.ndarray] = []
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(_identity(path))
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow)
                for number in range(file.metadata.num_row_groups):
                    group = file.metadata.row_group(number)
                    if group.total_byte_size > LARGEST_GROUP:
                        raise ConfigError(
                            f"{path}: row group {number} decompresses to {group.total_byte_size:,} bytes, over "
                            f"{LARGEST_GROUP:,}: write it with smaller row groups"
                        )
                    groups.append(Group(path, number, group.num_rows))
                column = file.read([LABEL], use_threads=False)[LABEL]
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a Parquet file: {clip(error, 200)}") from None
        if column.null_count:
            raise ConfigError(f"{path}: {column.null_count} rows have no {LABEL}; leave them out")
        found = column.to_numpy().astype(np.int64)
        if len(found) and found.min() < 0:
            raise ConfigError(f"{path}: {LABEL} is {found.min()} in a row: labels must be 0 or above")
        labels.append(found)
    if not sum(map(len, labels)):
        raise ConfigError(f"{files[0].parent}: the Parquet files have no rows")
    return ImageFiles([group for group in groups if group.rows], np.concatenate(labels), digest.hexdigest())


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


def _identity(path: Path) -> bytes:
    """Name, size and digest of the footer of a file. Raises ValueError if the footer is not valid or too large."""
    refuse_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        if file.read(4) != b"PAR1" or length > min(size - 8, FOOTER):
            raise ValueError("it does not end with a valid footer")
        file.seek(size - 8 - length)
        return f"{path.name}\0{size}\0".encode() + hashlib.sha256(file.read(length)).digest()
