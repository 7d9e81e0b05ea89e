"""Topology: the degrees of parallelism and the ZeRO stage. The rules for combining them are in `configs.topology`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.base import Degree, Section

MOST_PROCESSES = 2**20
MOST_STAGES = 2**10
REFUSED = {
    "cp": "context parallelism (ring attention) is not in DeepSpeed 0.19: set parallel.sp (Ulysses)",
    "dualpipe": "DualPipe, which keeps two copies of the weights, is not in DeepSpeed 0.19: set "
    "parallel.pp_schedule=dualpipev",
    "mics": "MiCS was removed from DeepSpeed (its issue 8489): set parallel.hpz with parallel.zero_stage=3",
    "vpp": "interleaved 1F1B (virtual pipeline stages) is not in DeepSpeed 0.19: set parallel.pp_schedule=dualpipev",
}
"""Kinds of parallelism that other frameworks have, and what to use instead."""


class ParallelConfig(Section):
    """World size is dp * tp * pp * sp; expert parallelism reuses the ranks of dp, tp and sp."""

    dp: Degree = 1
    """Data parallel: each rank reads its own micro-batches."""
    tp: Degree = 1
    """Tensor parallel: attention heads and widths are split (AutoTP)."""
    pp: int = Field(1, gt=0, le=MOST_STAGES)
    """Pipeline parallel: layers are split into stages."""
    pp_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """`dualpipev`: each rank holds two of 2 * pp stages, arranged in a V, for a smaller pipeline bubble; needs 2 * pp
    micro-batches."""
    ep: Degree = 1
    """Expert parallel: experts are split and tokens are sent to them (AutoEP)."""
    sp: Degree = 1
    """Sequence parallel: each sequence is split, and attention by heads (Ulysses)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks partition: 1: optimizer states, 2: gradients too, 3: weights too."""
    hpz: Degree = 1
    """ZeRO-3: groups of this many neighbouring ranks also hold a full copy of the weights, so that gathers stay within
    a node (hpZ)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in CPU memory: `optimizer`: optimizer states and their step (ZeRO 1 to 3); `parameters`: weights too
    (ZeRO-3)."""

    @model_validator(mode="before")
    @classmethod
    def _refused_by_name(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in REFUSED.keys() & value.keys():
                raise ValueError(REFUSED[key])
        return value

    @model_validator(mode="after")
    def _check(self):
        if self.world_size > MOST_PROCESSES:
            raise ValueError(f"parallel.dp * tp * pp * sp is {self.world_size:,} processes: at most {MOST_PROCESSES:,}")
        return self

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.sp

    @property
    def stages(self) -> int:
        """Stages of the pipeline; with DualPipeV, two per rank."""
        return self.pp * (2 if self.pp_schedule == "dualpipev" else 1)
