"""What readers have in common that keep all examples of a split in memory."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from configs import ConfigError
from configs.reading.parse import shortened
from configs.sections.data import RowsConfig, TextsConfig
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


class Labels(NamedTuple):
    values: torch.Tensor
    """[N] int64 classes, or [N, K] fp32 standardised numbers."""
    classes: int
    """Largest label + 1; 0: the labels are numbers."""
    scale: torch.Tensor | None
    """[2, K]: mean and standard deviation of the numbers."""


def labels_of(
    labels: np.ndarray, fitted: np.ndarray, config: RowsConfig | TextsConfig, key: str, path: str, numbers: bool
) -> Labels:
    """The labels of a split.

    Args:
        labels: [N, K] float64, a column for each of `config.labels`.
        fitted: those that numbers are standardised by.
        key: of `data`, which `config` is.
        numbers: they are numbers, not classes.

    Raises:
        ConfigError: several columns of classes; a label that is no class.
    """
    if numbers:
        mean, deviation = scale_of(fitted, config.standardise)
        scale = torch.from_numpy(np.stack([mean, deviation]).astype(np.float32))
        return Labels(torch.from_numpy(((labels - mean) / deviation).astype(np.float32)), 0, scale)
    if len(config.labels) > 1:
        raise ConfigError(
            f"data.{key}.labels has {len(config.labels)} columns, but task=classification predicts one: name one, or "
            "set task=regression"
        )
    values = torch.from_numpy(classes_of(labels[:, 0], path, f"column {config.labels[0]}"))
    return Labels(values, int(values.max()) + 1, None)


def check_numbers(path: Path, schema: pa.Schema, name: str, key: str, otherwise: str) -> None:
    """Raise ConfigError unless a file has one column of this name, of numbers.

    Args:
        key: of the config, which names the column.
        otherwise: what to do if it holds something else.
    """
    if schema.names.count(name) != 1:
        there = shortened(", ".join(schema.names), 200)
        raise ConfigError(f"{path} should have exactly one column {name} (it has {there}): set {key}")
    kind = schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ConfigError(f"{path}: column {name} is {shortened(str(kind), 60)}, not numbers: {otherwise}")


def scale_of(values: np.ndarray, standardise: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; (0, 1) unless asked for, and a deviation of 1 where it is 0."""
    if not standardise:
        return np.zeros(values.shape[1]), np.ones(values.shape[1])
    deviation = values.std(0)
    return values.mean(0), np.where(deviation > 0, deviation, 1.0)
