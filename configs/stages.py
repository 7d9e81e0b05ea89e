"""Where a pipeline cuts the model: a pure function, so that a topology can be judged before any process starts."""


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """The decoder layers of each stage.

    The embedding counts as one layer of the first stage and the head as one of the last, and the stages get equally
    many. What remains goes, one each, to the last stage, the first, the second and so on: a stage is never without a
    decoder layer.
    """
    assert 1 <= stages <= num_layers
    least, more = divmod(num_layers + 2, stages)
    sizes = [least] * stages
    for stage in [stages - 1, *range(stages - 1)][:more]:
        sizes[stage] += 1
    sizes[0] -= 1
    sizes[-1] -= 1
    ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
