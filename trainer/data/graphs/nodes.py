"""Reads the nodes of one graph: an example is a node with sampled neighbours, a pure function of (seed, index)."""

from collections.abc import Sequence

import numpy as np
import torch

from configs import ConfigError, counted
from configs.sections.data import DataConfig
from models.batch import GraphBatch
from trainer.data.manifest import Split, sources_of
from trainer.data.parquet_files import EmptySplit, files_of_splits, held_out_rows
from trainer.data.read.in_memory import classes_of, epochs
from trainer.data.read.order import mix, shuffled

from .files import EDGE_FEATURES, LABELS, NEEDS, NODES, read_graphs
from .reader import FeaturesOf

TYPICAL = 256
"""Neighbourhoods whose FLOPs are taken for those of all."""


class Nodes(FeaturesOf):
    """Nodes of a graph that have a label, each with the neighbours that send it messages, and theirs: as many at each
    distance as `data.graphs.neighbours` says (arXiv:1706.02216). Not for several threads at once.

    The training split goes on epoch after epoch, each in a different order and with other neighbours. The held-out
    split is the share `data.prepare.held_out` of the nodes, whose neighbours are drawn once; both see the whole graph.

    Attributes:
        classes: largest label + 1.

    Raises:
        ConfigError: as `files.read_graphs`; several sources or graphs; not a class for each node; a missing or
            infinite number; an empty split.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train"):
        self.split, self._neighbours = split, config.graphs.neighbours
        if len(sources := sources_of(config)) > 1:
            raise ConfigError(f"data.path has {len(sources)} sources, but data.kind=nodes reads exactly one")
        self.path = sources[0].path
        self.packed = read_graphs(files_of_splits(self.path, NEEDS)["train"])
        labels, size = self.packed.labels, len(self.packed.nodes)
        if len(labels) != 1:
            raise ConfigError(
                f"data.path={self.path} has {counted(len(labels), 'graph')}, but data.kind=nodes learns from the nodes "
                "of one: keep one row, or set data.kind=graphs"
            )
        if labels.shape[1] != size:
            raise ConfigError(
                f"data.path={self.path}: {LABELS} has {counted(labels.shape[1], 'label')} for "
                f"{counted(size, 'node')}: give each node one (null: it has none)"
            )
        if self.packed.broken.any():
            raise ConfigError(
                f"data.path={self.path}: {NODES} or {EDGE_FEATURES} has a number that is missing or infinite: correct "
                "it"
            )
        apart, labelled = held_out_rows(size, config.prepare.held_out, config.prepare.seed), np.isfinite(labels[0])
        self._nodes = np.flatnonzero((apart if split == "held_out" else ~apart) & labelled)
        if not len(self._nodes):
            raise EmptySplit(self.path, "node", split)
        self.labels = torch.from_numpy(classes_of(labels[0, self._nodes], self.path, LABELS))
        self.classes = int(classes_of(labels[0, labelled], self.path, LABELS).max()) + 1
        self._by_receiver = np.argsort(self.packed.edges[:, 1], kind="stable")
        degrees = np.bincount(self.packed.edges[:, 1], minlength=size)
        self._ends = degrees.cumsum()
        self._key = mix(seed, "nodes") if split == "train" else mix("held out")
        self.order = epochs(len(self), split, self._key)
        self.typical = range(min(len(self), TYPICAL))

    @property
    def notes(self) -> list[str]:
        """What the graph is."""
        nodes, edges = counted(len(self.packed.nodes), "node"), counted(len(self.packed.edges), "edge")
        found = [
            f"data.path={self.path}: a graph of {nodes} and {edges}, {len(self):,} to train on, {self.classes} classes"
        ]
        if unlabelled := int((~np.isfinite(self.packed.labels)).sum()):
            found.append(f"{counted(unlabelled, 'node')} without a label: only neighbours of others")
        return found

    def __len__(self) -> int:
        return len(self._nodes)

    def examples(self, indices: Sequence[int]) -> GraphBatch:
        """Neighbourhoods side by side; -1 stands for padding: a node of zeros without a label."""
        which = [self.locate(index) if index >= 0 else -1 for index in indices]
        both = zip(indices, which, strict=True)
        found = [self._around(index, self._nodes[place]) if index >= 0 else ([-1], []) for index, place in both]
        sizes = np.array([len(nodes) for nodes, _ in found])
        first = sizes.cumsum() - sizes
        chosen = np.concatenate([nodes for nodes, _ in found])
        nodes = self.packed.nodes[chosen]
        nodes[chosen < 0] = 0
        used = np.array([edge for _, edges in found for edge in edges], np.int64).reshape(-1, 3)
        edges = used[:, :2] + np.repeat(first, [len(edges) for _, edges in found])[:, None]
        ids, labels = torch.tensor(indices, dtype=torch.int64), self.labels[torch.tensor(which).clamp(min=0)]
        labels[ids < 0] = -1
        features = self.packed.edge_features
        return GraphBatch(
            torch.from_numpy(nodes), torch.from_numpy(edges.T.copy()),
            torch.from_numpy(features[used[:, 2]]) if features.shape[1] else None,
            torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)), labels, ids, None, torch.from_numpy(first),
        )  # fmt: skip

    def _around(self, index: int, root: int) -> tuple[list[int], list[tuple[int, int, int]]]:
        """(nodes, the root first; sampled edges as (from, to, number), the ends by their place among these nodes)."""
        nodes, edges, frontier = {int(root): 0}, [], [int(root)]
        for most in self._neighbours:
            reached = []
            for node in frontier:
                end = self._ends[node]
                incoming = self._by_receiver[self._ends[node - 1] if node else 0 : end]
                if len(incoming) > most:
                    incoming = incoming[shuffled(len(incoming), mix(self._key, index, node))[:most]]
                for edge in incoming.tolist():
                    sender = int(self.packed.edges[edge, 0])
                    if sender not in nodes:
                        nodes[sender] = len(nodes)
                        reached.append(sender)
                    edges.append((nodes[sender], nodes[node], edge))
            frontier = reached
        return list(nodes), edges
