"""What readers have in common that keep all examples of a split in memory."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from configs import ConfigError
from trainer.data.manifest import Split

from .order import KEPT_ORDERS, mix, shuffled


class InMemory:
    """A reader whose training split goes on epoch after epoch, and whose held-out split ends at `len()`.

    Attributes:
        order: of an epoch: which example is at each place.
    """

    bad_pages: list[tuple[str, int]] = []
    """All examples are read before a run starts."""
    split: Split
    order: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        """Examples in one pass; training goes on after it."""
        raise NotImplementedError

    def locate(self, index: int) -> int:
        """The example of this index of the run. Raises IndexError past the end of the held-out split."""
        if index < 0 or (self.split == "held_out" and index >= len(self)):
            raise IndexError(f"example {index} of {len(self)}")
        epoch, place = divmod(index, len(self))
        return int(self.order(epoch)[place])


def epochs(size: int, split: Split, *key: int | str) -> Callable[[int], np.ndarray]:
    """`InMemory.order`: shuffled by the key and the epoch; of a held-out split, as the examples are."""
    held_out = split == "held_out"
    return lru_cache(KEPT_ORDERS)(lambda epoch: np.arange(size) if held_out else shuffled(size, mix(*key, epoch)))


def classes_of(labels: np.ndarray, path: str, name: str) -> np.ndarray:
    """[N] int64. Raises ConfigError, in which `name` says where the labels are."""
    if (wrong := (labels < 0) | (labels != np.floor(labels)) | (labels >= 2**24)).any():
        raise ConfigError(
            f"data.path={path}: {name} has {labels[wrong][0]:g}, but classes are whole numbers from 0: correct it, or "
            "set task=regression"
        )
    return labels.astype(np.int64)


def scale_of(values: np.ndarray, standardise: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; (0, 1) unless asked for, and a deviation of 1 where it is 0."""
    if not standardise:
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    deviation = values.std(0)
    return values.mean(0), np.where(deviation > 0, deviation, 1.0)
