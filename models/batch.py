"""One micro-batch of token sequences, as every model family takes it, or one part of each of its sequences."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Tensors of one micro-batch; B sequences of T tokens.

    Attributes:
        input_ids: [B, T] int64.
        labels: [B, T] int64, next-token targets already shifted; -100: not trained on.
        position_ids: [B, T] int64; restart at each document where documents are kept apart.
        document_ids: [B, T] int64, non-decreasing in a row: attention stays within equal ids. None: plain causal.
            Of the whole sequences, also where the batch holds parts of them.
        sequence_ids: [B] int64, index of each sequence in the run; seeds dropout.
        part: (i, n): the T tokens are the i-th of n equally long parts of each sequence.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor | None
    sequence_ids: Tensor
    part: tuple[int, int] = (0, 1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, which a GPU reads by itself."""
        moved: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Those of its attributes that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
