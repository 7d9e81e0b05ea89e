"""Token sequences with some tokens hidden, for masked language modelling."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from configs import Config
from models.batch import Batch
from models.loss import IGNORE
from models.tasks.masked_language_modelling import masked

from .reader import Dataset

SHOWN = 4
"""Texts of a sample."""


class MaskedReader:
    """Reads a split of prepared data as `Dataset` does, and hides tokens: of training sequences others each time they
    are read, of held-out ones the same in every evaluation of every run."""

    def __init__(self, dataset: Dataset, config: Config):
        self.dataset, self.bad_pages = dataset, dataset.bad_pages
        of_run = (config.run.seed, "mask") if dataset.split == "train" else (0, "held-out mask")
        self._how = (config.train.mask_rate, dataset.vocab_size, dataset.eos_id, *of_run)

    def __len__(self) -> int:
        return len(self.dataset)

    def examples(self, indices: Sequence[int]) -> Batch:
        """As `Dataset.examples`; the labels are the hidden tokens."""
        return masked(self.dataset.examples(indices), *self._how)


class MaskedTexts(NamedTuple):
    """Held-out sequences with hidden tokens, and how they are decoded."""

    batch: Batch
    decode: Callable[[Sequence[int]], str]

    def texts(self, found_BT: Tensor) -> list[str]:
        """The first texts with each hidden token in brackets: as found, and after a bar as it is, if that differs."""
        return [
            self._text(*(each[row].tolist() for each in (self.batch.input_ids, self.batch.labels, found_BT)))
            for row in range(min(SHOWN, len(found_BT)))
        ]

    def _text(self, tokens: list[int], labels: list[int], found: list[int]) -> str:
        parts: list[str] = []
        for hidden, places in groupby(range(len(tokens)), key=lambda place: labels[place] != IGNORE):
            if not hidden:
                parts.append(self.decode([tokens[place] for place in places]))
                continue
            for place in places:
                both = [found[place]] if found[place] == labels[place] else [found[place], labels[place]]
                parts.append(f"[{'|'.join(self.decode([token]) for token in both)}]")
        return "".join(parts)
