"""Reads images with a text each."""

from collections.abc import Sequence

import pyarrow.compute as pc
import torch

from configs import ConfigError
from configs.sections.data import DataConfig
from models.batch import CaptionBatch
from trainer.data.manifest import Split
from trainer.data.texts.encoded import text_columns

from .reader import Images


class Captions(Images):
    """Images whose files have a column of texts too (data.images.caption). Not for several threads at once.

    Args:
        length: bytes of a text that are read.

    Raises:
        ConfigError: as `Images`; no such column, or no text in it, or one that is not UTF-8.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train", length: int = 64):
        super().__init__(config, seed, split)
        files = list(dict.fromkeys(group.file for group in self.groups))
        (self._texts,), _ = text_columns(files, {"images.caption": config.images.caption}, "captions")
        self._length = length
        if not (pc.max(pc.binary_length(self._texts)).as_py() or 0):
            raise ConfigError(f"{self.path}: column {config.images.caption} has no text: set data.images.caption")

    def examples(self, indices: Sequence[int]) -> CaptionBatch:
        """As `Images.examples`; the text of padding is empty."""
        found = super().examples(indices)
        texts = torch.zeros(len(indices), self._length, dtype=torch.int64)
        for place, index in enumerate(found.example_ids.tolist()):
            if index >= 0:
                group, row = self.locate(index)
                text = self._texts[self._ends[group] - self.groups[group].rows + row].as_py() or ""
                read = torch.tensor(list(text.encode()[: self._length]), dtype=torch.int64)
                texts[place, : len(read)] = read + 1
        return CaptionBatch(found.images, found.labels, found.example_ids, texts)
