"""Reads images with a text each."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs import ConfigError
from configs.reading.parse import shortened
from configs.sections.data import DataConfig
from models.batch import CaptionBatch
from trainer.data.manifest import Split
from trainer.data.parquet_files import readable

from .reader import Images


class Captions(Images):
    """Images whose files have a column of texts too (data.images.caption). Not for several threads at once.

    Args:
        length: bytes of a text that are read.

    Raises:
        ConfigError: as `Images`; no such column.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train", length: int = 64):
        super().__init__(config, seed, split)
        self._texts = np.zeros((len(self._labels), length), np.int64)
        column, first = config.images.caption, 0
        for file in dict.fromkeys(group.file for group in self.groups):
            for text in _texts(file, column):
                found = np.frombuffer((text or "").encode()[:length], np.uint8)
                self._texts[first, : len(found)] = found.astype(np.int64) + 1
                first += 1

    def examples(self, indices: Sequence[int]) -> CaptionBatch:
        """As `Images.examples`; the text of padding is empty."""
        found = super().examples(indices)
        texts = torch.zeros(len(indices), self._texts.shape[1], dtype=torch.int64)
        for place, index in enumerate(found.example_ids.tolist()):
            if index >= 0:
                group, row = self.locate(index)
                texts[place] = torch.from_numpy(self._texts[self._ends[group] - self.groups[group].rows + row])
        return CaptionBatch(found.images, found.labels, found.example_ids, texts)


def _texts(path, column: str) -> list[str | None]:
    with readable(path), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if schema.names.count(column) != 1:
            there = shortened(", ".join(schema.names), 200)
            raise ConfigError(f"{path} has not one column {column} (it has {there}): set data.images.caption")
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(
                f"{path}: column {column} is {shortened(str(kind), 60)}, not texts: set data.images.caption"
            )
        return file.read([column], use_threads=False)[column].to_pylist()
