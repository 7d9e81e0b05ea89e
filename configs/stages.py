"""Where a pipeline splits the model: pure functions, so that a topology can be checked before any process starts."""

from functools import lru_cache
from itertools import accumulate

from .sections.parallel import ParallelConfig


@lru_cache(maxsize=64)
def stage_layers(num_layers: int, stages: int) -> list[range]:
    """The decoder layers of each stage.

    The embedding counts as one layer of the first stage and the head as one of the last, and layers are divided
    equally. The remainder goes, one each, to the last stage, the first, the second and so on; no stage is without a
    decoder layer.
    """
    assert 1 <= stages <= num_layers
    least, more = divmod(num_layers + 2, stages)
    sizes = [least] * stages
    for stage in [stages - 1, *range(stages - 1)][:more]:
        sizes[stage] += 1
    sizes[0] -= 1
    sizes[-1] -= 1
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def stages_of_rank(parallel: ParallelConfig, rank: int) -> list[int]:
    """The stages of a pipeline rank: stage `rank`, and in a V, which turns at the last rank, also its mirror image."""
    return [rank] if parallel.stages == parallel.pp else [rank, parallel.stages - 1 - rank]


@lru_cache(maxsize=64)
def layers_of_ranks(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """The decoder layers of each pipeline rank."""
    cut = stage_layers(num_layers, parallel.stages)
    return [[i for stage in stages_of_rank(parallel, rank) for i in cut[stage]] for rank in range(parallel.pp)]
