"""One micro-batch of token sequences, as every model family takes it."""

from dataclasses import dataclass, fields, replace

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
        sequence_ids: [B] int64, index of each sequence in the run; seeds dropout.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor | None
    sequence_ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)
