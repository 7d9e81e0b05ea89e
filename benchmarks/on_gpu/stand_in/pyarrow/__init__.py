"""The part of pyarrow that the trainer needs for text files and its own shards, for machines without pyarrow.

It is found only if the folder above is on the path. It writes numpy's format, which only it can read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class ArrowException(Exception):
    pass


class Schema(NamedTuple):
    names: list[str]
    types: list[str]

    def equals(self, other: "Schema") -> bool:
        return self == other


def from_numpy_dtype(dtype: np.dtype) -> str:
    return str(dtype)


def field(name: str, kind: str, nullable: bool) -> tuple[str, str]:
    return name, kind


def schema(fields: list[tuple[str, str]]) -> Schema:
    return Schema([name for name, _ in fields], [kind for _, kind in fields])


def table(columns: list[np.ndarray], schema: Schema) -> list[np.ndarray]:
    return columns


def OSFile(path: str | Path) -> Any:
    return open(path, "rb")
