"""Files of one column, kept as numpy arrays: one for each row group."""

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import Schema


class ParquetWriter:
    def __init__(self, path: str | Path, schema: Schema, **settings: Any) -> None:
        self._path, self._schema, self._groups = path, schema, []  # type: ignore[var-annotated]

    def write_table(self, table: list[np.ndarray], row_group_size: int) -> None:
        (column,) = table
        assert len(column) == row_group_size
        self._groups.append(column.copy())

    def close(self) -> None:
        names = np.array([*self._schema.names, *self._schema.types])
        with open(self._path, "wb") as file:
            np.savez(file, schema=names, **{f"group{i}": group for i, group in enumerate(self._groups)})


class ParquetFile:
    def __init__(self, path: str | Path, **settings: Any) -> None:
        self._arrays = np.load(path)
        name, kind = self._arrays["schema"].tolist()
        self._name, self.schema_arrow = name, Schema([name], [kind])

    @cached_property
    def metadata(self) -> SimpleNamespace:
        column = SimpleNamespace(
            dictionary_page_offset=None, data_page_offset=4, total_compressed_size=0, total_uncompressed_size=0
        )
        arrays = [self._arrays[f"group{i}"] for i in range(len(self._arrays.files) - 1)]
        groups = [SimpleNamespace(num_rows=len(array), column=lambda i: column) for array in arrays]
        return SimpleNamespace(num_row_groups=len(groups), row_group=groups.__getitem__)

    def read_row_group(self, group: int, columns: list[str], use_threads: bool) -> dict[str, SimpleNamespace]:
        array = self._arrays[f"group{group}"]
        return {self._name: SimpleNamespace(to_numpy=lambda: array)}

    def close(self) -> None:
        self._arrays.close()

    def __enter__(self) -> "ParquetFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
