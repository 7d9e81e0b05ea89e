"""What readers have in common that keep texts in memory and encode them as they are read."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from configs import ConfigError
from configs.reading.parse import shortened
from configs.sections.data import DataConfig
from trainer.data.parquet_files import check_bytes, check_groups, identity, readable
from trainer.data.read.in_memory import InMemory
from trainer.data.read.order import mix, shuffled
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.data.tokenizer.tokenizer_files import end_of_text

STRUCT = "translation"
"""Column of Hugging Face's data sets of translations: a text for each language."""
BUCKET, SORTED = 64, 64
"""Examples of nearly equal length that are read one after the other, and buckets that are sorted together."""


class Encoded(InMemory):
    """The training split is shuffled, but with examples of nearly equal length side by side, which need little padding.

    Attributes:
        config: with a tokenizer's file in `prepare.tokenizer`, once an example is asked for.
    """

    config: DataConfig
    _lengths: np.ndarray
    """In bytes, of each example."""
    _key: int
    """Of the order."""

    def __len__(self) -> int:
        return len(self._lengths)

    @cached_property
    def tokenizer(self) -> TokenizerProcess:
        return TokenizerProcess(self.config.prepare.tokenizer, self.config.limits)

    @cached_property
    def end(self) -> int:
        """The end-of-text token."""
        return end_of_text(self.tokenizer.token_to_id, self.tokenizer.file)[1]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(each) for each in tokens]

    def order_of(self, epoch: int) -> np.ndarray:
        """See `InMemory.order`."""
        if self.split == "held_out":
            return shuffled(len(self), mix("held out"))
        key, several = mix(self._key, epoch), SORTED * BUCKET
        order = np.asarray(shuffled(len(self), key))
        blocks = [order[start : start + several] for start in range(0, len(order), several)]
        order = np.concatenate([block[self._lengths[block].argsort(kind="stable")] for block in blocks])
        starts = np.asarray(shuffled(-(-len(order) // BUCKET), mix(key, "buckets"))) * BUCKET
        return np.concatenate([order[start : start + BUCKET] for start in starts])


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of one length, which of them is no padding)."""
    found = torch.full((len(rows), max(1, *map(len, rows))), value, dtype=torch.int64)
    mask = torch.zeros_like(found, dtype=torch.bool)
    for number, row in enumerate(rows):
        found[number, : len(row)], mask[number, : len(row)] = torch.tensor(row, dtype=torch.int64), True
    return found, mask


def text_columns(
    files: Sequence[Path], columns: Mapping[str, str], what: str, check: bool = True
) -> tuple[list[pa.ChunkedArray], str]:
    """(columns of texts, identity of the files).

    Args:
        columns: what each is called, by the key of `data` that says so.
        what: they are, for messages.
        check: that all of it is UTF-8.

    Raises:
        ConfigError: a file is not Parquet, or too large; a column is missing or holds no texts.
    """
    digest, found, size = hashlib.sha256(), [], 0
    for path in files:
        with readable(path):
            digest.update(identity(path))
            with pq.ParquetFile(path) as file:
                names = [_column(path, file.schema_arrow, *pair) for pair in columns.items()]
                groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
                check_groups(path, [group.total_byte_size for group in groups])
                parts = [group.column(number) for group in groups for number in range(group.num_columns)]
                size += 8 * len(columns) * file.metadata.num_rows  # where each text begins
                stored = sum(part.total_uncompressed_size for part in parts if part.path_in_schema in names)
                check_bytes(path, size + stored, what)
            # Each text once: a file of a few bytes may repeat one so often that it fills the memory.
            with pq.ParquetFile(path, read_dictionary=names) as file:
                table = file.read(names, use_threads=False).flatten()
            size += sum(_bytes(chunk) for name in names for chunk in table[name].chunks)
            check_bytes(path, size, what)
            found.append([table[name].cast(pa.large_string()) for name in names])
            for each in found[-1] if check else ():
                each.validate(full=True)
    merged = [
        pa.chunked_array([chunk for each in found for chunk in each[n].chunks], pa.large_string())
        for n in range(len(columns))
    ]
    return merged, digest.hexdigest()


def _bytes(texts: pa.DictionaryArray) -> int:
    return pc.sum(pc.binary_length(texts.dictionary).cast(pa.int64()).take(texts.indices)).as_py() or 0


def _column(path: Path, schema: pa.Schema, key: str, name: str) -> str:
    """What the column of texts is called in the file. Raises ConfigError."""
    if schema.names.count(name) > 1:
        raise ConfigError(f"{path} has several columns {name}: rename all but one, or set data.{key} to another")
    there = {field.name: field.type for field in schema}
    if STRUCT in there and pa.types.is_struct(there[STRUCT]):
        there |= {f"{STRUCT}.{field.name}": field.type for field in there[STRUCT].fields}
    found = name if name in there else f"{STRUCT}.{name}"
    if found not in there:
        raise ConfigError(f"{path} has no column {name} (it has {shortened(', '.join(there), 200)}): set data.{key}")
    if not (pa.types.is_string(there[found]) or pa.types.is_large_string(there[found])):
        raise ConfigError(f"{path}: column {found} is {shortened(str(there[found]), 60)}, not text: set data.{key}")
    return found
