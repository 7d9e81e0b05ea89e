"""Reads graphs, all of them into memory: a graph is a pure function of (seed, index)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import ConfigError, counted
from configs.sections.data import DataConfig
from models.batch import GraphBatch
from trainer.data.manifest import Split, only_source
from trainer.data.parquet_files import (
    EmptySplit,
    chosen_and_fitted,
    files_of_splits,
)
from trainer.data.read.in_memory import InMemory, classes_of, epochs, scale_of

from .files import EDGE_FEATURES, LABELS, NEEDS, NODES, Packed, read_graphs

TYPICAL = 1024
"""Graphs whose FLOPs are taken for those of all."""


class FeaturesOf(InMemory):
    """What readers of graphs, and of the nodes of one, have in common."""

    packed: Packed
    path: str
    scale: Tensor | None = None
    """Of labels that are numbers: see `GraphBatch`."""

    def check_model(self, model: Any) -> None:
        """Raise ConfigError if a model has other features than the graphs, or predicts other numbers."""
        packed, predicted, outputs = self.packed, self.packed.labels.shape[1], getattr(model, "outputs", None)
        if self.scale is not None and outputs not in (None, predicted):
            raise ConfigError(
                f"model.outputs is {outputs}, but {LABELS} has {predicted}: set model.outputs={predicted}"
            )
        for key, name, values in (("", NODES, packed.nodes), ("edge_", EDGE_FEATURES, packed.edge_features)):
            own, width = getattr(model, f"{key}inputs", None), values.shape[1]
            if own is None or (key and not own):
                continue
            if own != width:
                raise ConfigError(
                    f"model.{key}inputs is {own}, but {name} of data.path={self.path} has {counted(width, 'column')}: "
                    f"set model.{key}inputs={width}"
                )
            most, whole = getattr(model, f"{key}categories", 0), values.dtype == np.int64
            if most and not whole:
                raise ConfigError(f"model.{key}categories is {most}, but {name} has no whole numbers: set it to 0")
            if most and len(values) and (values.min() < 0 or values.max() >= most):
                raise ConfigError(
                    f"model.{key}categories is {most}, but {name} goes from {values.min()} to {values.max()}: set it "
                    f"to {values.max() + 1}, with categories from 0 on"
                )


class Graphs(FeaturesOf):
    """Graphs of a Parquet file, or of a folder of them. Not for several threads at once.

    The training split goes on epoch after epoch, each in a different order; the held-out split (`validation*` or
    `test*` files, or without them the share `data.prepare.held_out` of all graphs) has one order and ends at `len()`.
    Graphs that are not whole belong to neither. Numbers to predict are standardised by the training split.

    Args:
        numbers: the labels are numbers, not classes.

    Attributes:
        classes: largest label of either split + 1; 0: the labels are numbers.

    Raises:
        ConfigError: as `files.read_graphs`; a label is not a class; several sources; an empty split.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train", numbers: bool = False):
        self.split = split
        self.path = only_source(config, "graphs")
        files = files_of_splits(self.path, NEEDS)
        packed = trained = read_graphs(files["train"])
        if split == "held_out" and files["held_out"]:
            packed = read_graphs(files["held_out"])
        widths = [each.labels.shape[1] for each in (packed, trained)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"data.path={self.path}: {LABELS} of the held-out files has {counted(widths[0], 'number')}, but that "
                f"of the others {widths[1]}: make them equally long"
            )
        wholes = packed.whole, trained.whole
        chosen, fitted = chosen_and_fitted(split, *wholes, bool(files["held_out"]), config.prepare)
        if not (chosen.any() and fitted.any()):
            raise EmptySplit(self.path, "graph", split)
        self.packed, self._rows = packed, np.flatnonzero(chosen)
        labels, self.classes, self.scale = packed.labels[chosen], 0, None
        if numbers:
            mean, deviation = scale_of(trained.labels[fitted])
            self.scale = torch.from_numpy(np.stack([mean, deviation]).astype(np.float32))
            self.labels = torch.from_numpy(((labels - mean) / deviation).astype(np.float32))
        else:
            if labels.shape[1] > 1:
                raise ConfigError(
                    f"data.path={self.path}: {LABELS} has {labels.shape[1]} numbers, but task=classification predicts "
                    "one class: keep one, or set task=regression"
                )
            self.labels = torch.from_numpy(classes_of(labels[:, 0], self.path, LABELS))
            self.classes = int(classes_of(packed.labels[packed.whole, 0], self.path, LABELS).max()) + 1
        self.order = epochs(len(self), split, seed, "graphs")
        self.typical = range(min(len(self), TYPICAL))

    @property
    def notes(self) -> list[str]:
        """What the graphs are, and what was left out."""
        packed, predicted = self.packed, self.packed.labels.shape[1]
        what = f"{self.classes} classes" if self.classes else f"{counted(predicted, 'number')} to predict"
        nodes, edges = (ends[-1] / len(packed.labels) for ends in (packed.node_ends, packed.edge_ends))
        found = [
            f"data.path={self.path}: {len(self):,} graphs of {nodes:.0f} nodes and {edges:.0f} edges on average, {what}"
        ]
        if packed.self_loops:
            found.append(f"{counted(packed.self_loops, 'edge')} left out, from a node to itself")
        return [*found, *filter(None, [packed.left_out])]

    def __len__(self) -> int:
        return len(self.labels)

    def examples(self, indices: Sequence[int]) -> GraphBatch:
        """Graphs side by side; -1 stands for padding: a node of zeros without a label."""
        ids, which = torch.tensor(indices, dtype=torch.int64), [self.locate(i) if i >= 0 else -1 for i in indices]
        rows = np.array([self._rows[each] if each >= 0 else -1 for each in which])
        packed = self.packed
        nodes, sizes = _slices(packed.nodes, packed.node_ends, rows, padding=1)
        edges, degrees = _slices(packed.edges, packed.edge_ends, rows)
        features, _ = _slices(packed.edge_features, packed.edge_ends, rows)
        first = np.repeat(sizes.cumsum() - sizes, degrees)
        labels = self.labels[torch.tensor(which).clamp(min=0)]
        labels[ids < 0] = -1 if self.scale is None else 0
        return GraphBatch(
            torch.from_numpy(nodes), torch.from_numpy((edges + first[:, None]).T.copy()),
            torch.from_numpy(features) if features.shape[1] else None,
            torch.from_numpy(np.repeat(np.arange(len(rows)), sizes)), labels, ids, self.scale,
        )  # fmt: skip


def _slices(values: np.ndarray, ends: np.ndarray, rows: np.ndarray, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(the values of some graphs one after another, how many each has); `padding` zeros for the graph -1."""
    zeros = np.zeros((padding, values.shape[1]), values.dtype)
    parts = [values[ends[row - 1] if row else 0 : ends[row]] if row >= 0 else zeros for row in rows.tolist()]
    return np.concatenate(parts), np.array([len(part) for part in parts])
