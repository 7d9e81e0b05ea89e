"""Topology: the degrees of parallelism and the ZeRO stage."""

from typing import Literal

from pydantic import PositiveInt

from .base import Section


class ParallelConfig(Section):
    """World size is dp * tp * pp * sp; expert parallelism divides the dp * sp ranks."""

    dp: PositiveInt = 1
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    ep: PositiveInt = 1
    sp: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 0

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.sp
