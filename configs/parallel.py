"""Topology: the degrees of parallelism and the ZeRO stage."""

from typing import Literal

from pydantic import PositiveInt

from .base import Section


class ParallelConfig(Section):
    """World size is dp * tp * pp * sp; expert parallelism divides the dp * sp ranks."""

    dp: PositiveInt = 1
    """Data parallel: each rank reads its own micro-batches."""
    tp: PositiveInt = 1
    """Tensor parallel."""
    pp: PositiveInt = 1
    """Pipeline parallel."""
    ep: PositiveInt = 1
    """Expert parallel."""
    sp: PositiveInt = 1
    """Sequence parallel."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks share out: 1 optimizer states, 2 gradients too, 3 weights too."""

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.sp
