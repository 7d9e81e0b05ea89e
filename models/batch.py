"""One micro-batch: what all kinds have in common, and one class for each kind of examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from models.loss import IGNORE


class MicroBatch:
    """B examples of any kind: a dataclass of tensors, of which `example_ids` is one.

    Attributes:
        example_ids: [B] int64, index of each example in the run, which seeds all randomness (`models.noise`); -1:
            padding, which no loss may count.
    """

    example_ids: Tensor

    def weight(self) -> int:
        """What the summed loss is divided by: by default the number of examples. Called on the CPU."""
        return int((self.example_ids >= 0).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return self._moved({name: x.to(device, non_blocking=non_blocking) for name, x in self.tensors().items()})

    def pinned(self) -> Self:
        """The same batch in pinned memory, for asynchronous copies to a GPU."""
        return self._moved({name: x.pin_memory() for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its attributes that are not None, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _moved(self, tensors: dict[str, Any]) -> Self:
        return replace(self, **tensors)  # type: ignore[type-var]


class Measured(NamedTuple):
    """Outputs of a network that has measured something as it computed them."""

    outputs: Tensor
    numbers: dict[str, Tensor]
    """Scalars by name, each a mean over the micro-batch: those of its section's `measures`."""


@dataclass
class Batch(MicroBatch):
    """Token sequences, or one part of each of them: B sequences of T tokens.

    Attributes:
        input_ids: [B, T] int64.
        labels: [B, T] int64, next-token targets already shifted; -100: not trained on.
        position_ids: [B, T] int64; restart at each document where documents are kept apart.
        document_ids: [B, T] int64, non-decreasing in a row: attention stays within equal ids. None: plain causal.
            Always for the whole sequences, even if the batch holds parts of them.
        sequence_ids: [B] int64, index of each sequence in the run; seeds dropout.
        part: (i, n): the T tokens are the i-th of n equally long parts of each sequence.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor | None
    sequence_ids: Tensor
    part: tuple[int, int] = (0, 1)

    @property
    def example_ids(self) -> Tensor:  # type: ignore[override]
        return self.sequence_ids

    def weight(self) -> int:
        """The number of labels that are trained on."""
        return int((self.labels != IGNORE).sum())


@dataclass
class ImageBatch(MicroBatch):
    """B images of one size.

    Attributes:
        images: [B, C, H, W] uint8.
        labels: [B] int64; -1: padding.
        example_ids: [B] int64.
    """

    images: Tensor
    labels: Tensor
    example_ids: Tensor

    @property
    def inputs(self) -> Tensor:
        """What a network sees: fp32 in [-1, 1]."""
        return self.images.float() / 127.5 - 1


@dataclass
class CaptionBatch(ImageBatch):
    """B images, each with a text of at most T bytes.

    Attributes:
        text_ids: [B, T] int64: bytes + 1, then 0 for padding.
    """

    text_ids: Tensor


@dataclass
class PairBatch(MicroBatch):
    """B pairs of a source of at most S tokens and a target of at most T; each ends with the end-of-text token.

    Attributes:
        source_ids: [B, S] int64.
        source_mask: [B, S] bool; false: padding.
        input_ids: [B, T] int64: the end-of-text token, then the target without its own.
        labels: [B, T] int64, the target; -100: padding.
        example_ids: [B] int64.
        decode: texts of lists of tokens; None: of a training split, of which none are shown.
    """

    source_ids: Tensor
    source_mask: Tensor
    input_ids: Tensor
    labels: Tensor
    example_ids: Tensor
    decode: Callable[[Sequence[Sequence[int]]], list[str]] | None = None

    def weight(self) -> int:
        """The number of target tokens."""
        return int((self.labels != IGNORE).sum())


@dataclass
class RowBatch(MicroBatch):
    """B rows of F features.

    Attributes:
        inputs: [B, F] fp32.
        labels: classes [B] int64, -1: padding; or K numbers each [B, K] fp32, standardised as the features are.
        example_ids: [B] int64.
        scale: of such numbers, [2, K] fp32: the mean and the standard deviation that they were standardised by.
    """

    inputs: Tensor
    labels: Tensor
    example_ids: Tensor
    scale: Tensor | None = None


class Texts(NamedTuple):
    """What a network sees of B texts of at most T tokens."""

    token_ids: Tensor
    """[B, T] int64."""
    mask: Tensor
    """[B, T] bool; false: padding, after the text. No row is all padding."""


@dataclass
class TextBatch(MicroBatch):
    """B texts of at most T tokens.

    Attributes:
        token_ids, mask: see `Texts`.
        labels, scale: as of a `RowBatch`.
        example_ids: [B] int64.
        decode: texts of lists of tokens; None: of a training split, of which none are shown.
    """

    token_ids: Tensor
    mask: Tensor
    labels: Tensor
    example_ids: Tensor
    scale: Tensor | None = None
    decode: Callable[[Sequence[Sequence[int]]], list[str]] | None = None

    @property
    def inputs(self) -> Texts:
        return Texts(self.token_ids, self.mask)


@dataclass
class SeriesBatch(MicroBatch):
    """B series of at most T observations of V numbers.

    Attributes:
        times: [B, T] fp32 from 0 on, ascending; padding repeats the last.
        values: [B, T, V] fp32, standardised; 0 where nothing was observed.
        observed: [B, T, V] bool.
        example_ids: [B] int64.
    """

    times: Tensor
    values: Tensor
    observed: Tensor
    example_ids: Tensor


class Graphs(NamedTuple):
    """What a network sees of B graphs: one graph of N nodes and E edges, in which they are not connected."""

    nodes: Tensor
    """[N, F]: numbers fp32, or categories int64."""
    edges: Tensor
    """[2, E] int64: from and to which of the N nodes; none leads back to where it starts."""
    edge_features: Tensor | None
    """[E, D], as nodes."""
    graph_of_node: Tensor
    """[N] int64, ascending."""
    size: int
    """B."""
    roots: Tensor | None = None
    """[B] int64: the node of each graph that is asked about; None: the graph is."""


@dataclass
class GraphBatch(MicroBatch):
    """B graphs, side by side.

    Attributes:
        nodes, edges, edge_features, graph_of_node, roots: see `Graphs`. Padding is a graph of one node.
        labels, scale: as of a `RowBatch`.
        example_ids: [B] int64.
    """

    nodes: Tensor
    edges: Tensor
    edge_features: Tensor | None
    graph_of_node: Tensor
    labels: Tensor
    example_ids: Tensor
    scale: Tensor | None = None
    roots: Tensor | None = None

    @property
    def inputs(self) -> Graphs:
        return Graphs(self.nodes, self.edges, self.edge_features, self.graph_of_node, len(self.example_ids), self.roots)
