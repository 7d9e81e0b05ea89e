"""The Parquet files of a data set that is read without preparation: those of each split, and their identity."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from configs import ConfigError
from configs.reading.lfs import refuse_pointer
from configs.reading.parse import clip
from configs.sections.data import PrepareConfig

from .manifest import Split
from .read.order import mix, shuffled

Reader = TypeVar("Reader")
HELD_OUT = ("validation", "valid", "test")
"""Name prefixes of files that are never trained on; the first one present is the held-out split."""
MOST_FILES = 100_000
FOOTER = 64 << 20
"""Most bytes of a footer."""
MOST_BYTES = 4 << 30
"""Most bytes of all examples that a reader keeps in memory."""
LARGEST_GROUP = 1 << 30
"""Most bytes that a row group may decompress to: `datasets` writes 100 images per row group."""


class EmptySplit(ConfigError):
    """A split without an example.

    Args:
        example: such as "image".
        why: why there is none.
    """

    def __init__(self, path: str, example: str, split: Split, why: str = "") -> None:
        use = "train on" if split == "train" else "hold out"
        super().__init__(f"data.path={path} has no {example} to {use}{f': {why}' if why else ''}")


def unless_empty(opened: Callable[[], Reader], split: Split) -> Reader | None:
    """A reader, or None for a held-out split without an example. Raises ConfigError."""
    try:
        return opened()
    except EmptySplit:
        if split == "held_out":
            return None
        raise


def files_of_splits(path: str, needs: str) -> dict[Split, list[Path]]:
    """The Parquet files of each split: those named `validation...` or `test...` are held out, if there are any.

    Args:
        needs: what a file must hold, for messages.

    Raises:
        ConfigError: there are none, too many, or none to train on.
    """
    found = Path(path)
    if found.is_file():
        return {"train": [found], "held_out": []}
    files = sorted(found.rglob("*.parquet"))[: MOST_FILES + 1] if found.is_dir() else []
    if not files or len(files) > MOST_FILES:
        what = "does not exist" if not found.exists() else f"has over {MOST_FILES}" if files else "has no *.parquet"
        raise ConfigError(f"data.path={path} {what}: set it to a Parquet file of {needs}, or a folder of them")
    apart = {name: [file for file in files if file.name.startswith(name)] for name in HELD_OUT}
    held_out = next((named for named in apart.values() if named), [])
    others = {file for named in apart.values() for file in named}
    train = [file for file in files if file not in others]
    if not train:
        raise ConfigError(f"data.path={path} has only held-out files, such as {files[0].name}: add files to train on")
    return {"train": train, "held_out": held_out}


def rows_of_split(split: Split, rows: int, own_files: bool, config: PrepareConfig) -> np.ndarray:
    """Bool [rows]: which rows of its files a split has.

    Args:
        own_files: the held-out split has files of its own; otherwise it is the share `held_out` of the others' rows.
    """
    apart = held_out_rows(rows, 0.0 if own_files else config.held_out, config.seed)
    return apart if split == "held_out" and not own_files else ~apart


def chosen_and_fitted(
    split: Split, whole: np.ndarray, trained: np.ndarray, own_files: bool, config: PrepareConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(Rows that a split has, rows of the training split, which numbers are standardised by), each bool [rows].

    Args:
        whole: bool [rows], which rows of the split's files may be used.
        trained: the same of the training split's.
        own_files: see `rows_of_split`.
    """
    chosen, fitted = (
        rows_of_split(of, len(each), own_files, config) & each for of, each in ((split, whole), ("train", trained))
    )
    return chosen, fitted


def row_of(number: int, starts: Sequence[tuple[int, str]]) -> str:
    """Where a row of several files is, in words; `starts`: number of the first row of each, and its name."""
    start, name = max(each for each in starts if each[0] <= number)
    return f"row {number - start} of {name}"


def held_out_rows(rows: int, share: float, seed: int) -> np.ndarray:
    """Bool [rows]: which rows of files without held-out ones are held out."""
    held_out = np.zeros(rows, bool)
    held_out[shuffled(rows, mix("held out", seed))[: round(share * rows)]] = True
    return held_out


def identity(path: Path) -> bytes:
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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error in reading a Parquet file into a ConfigError that names it."""
    try:
        yield
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a Parquet file: {clip(error, 200)}") from None


def check_bytes(path: Path, size: int, what: str) -> None:
    """Raise ConfigError if the examples of some files, of which `path` is one, take too much memory."""
    if size > MOST_BYTES:
        raise ConfigError(f"{path.parent}: the {what} take over {MOST_BYTES:,} bytes of memory")


def check_groups(path: Path, sizes: Sequence[int]) -> None:
    """Raise ConfigError if a row group decompresses to too many bytes."""
    for number, size in enumerate(sizes):
        if size > LARGEST_GROUP:
            raise ConfigError(
                f"{path}: row group {number} decompresses to {size:,} bytes, over {LARGEST_GROUP:,}: write it with "
                "smaller row groups"
            )
