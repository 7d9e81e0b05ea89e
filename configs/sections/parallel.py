"""Topology: the degrees of parallelism and the ZeRO stage. What cannot be combined stands in `configs.topology`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.base import Degree, Section

MOST_PROCESSES = 2**20
MOST_STAGES = 2**10
REFUSED = {
    "cp": "context parallelism (ring attention) is not in DeepSpeed 0.19: set parallel.sp (Ulysses)",
    "dualpipe": "DualPipe, with all weights twice, is not in DeepSpeed 0.19: set parallel.pp_schedule=dualpipev",
    "mics": "MiCS was removed from DeepSpeed (issue 8489 there): set parallel.hpz with parallel.zero_stage=3",
    "vpp": "a virtual pipeline (interleaved 1F1B) is not in DeepSpeed 0.19: set parallel.pp_schedule=dualpipev",
}
"""Kinds of parallelism known elsewhere, and what to use instead."""


class ParallelConfig(Section):
    """World size is dp * tp * pp * sp; expert parallelism uses the ranks of dp, tp and sp again."""

    dp: Degree = 1
    """Data parallel: each rank reads its own micro-batches."""
    tp: Degree = 1
    """Tensor parallel: attention heads and widths are split (AutoTP)."""
    pp: int = Field(1, gt=0, le=MOST_STAGES)
    """Pipeline parallel: layers are split into stages."""
    pp_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """`dualpipev`: each rank holds two of 2 * pp stages, in a V, so that it waits less; needs 2 * pp micro-batches."""
    ep: Degree = 1
    """Expert parallel: experts are split, tokens travel (AutoEP)."""
    sp: Degree = 1
    """Sequence parallel: each sequence is split, attention by heads (Ulysses)."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the data-parallel ranks share out: 1 optimizer states, 2 gradients too, 3 weights too."""
    hpz: Degree = 1
    """ZeRO-3: as many neighbouring ranks also share a whole copy of the weights, for gathers within a node (hpZ)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in CPU memory: optimizer states and their step (ZeRO 1 to 3); `parameters`: weights too (ZeRO-3)."""

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
            raise ValueError(
                f"parallel.dp * tp * pp * sp asks for {self.world_size:,} processes: at most {MOST_PROCESSES:,}"
            )
        return self

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.sp

    @property
    def stages(self) -> int:
        """Stages of the pipeline; of DualPipeV two on each rank."""
        return self.pp * (2 if self.pp_schedule == "dualpipev" else 1)
