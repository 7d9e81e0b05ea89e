"""Where a pipeline cuts the model."""

from configs.sections.parallel import ParallelConfig
from configs.stages import layers_of_ranks, stage_layers, stages_of_rank


def test_every_stage_has_a_layer_and_equal_work():
    for layers in range(1, 41):
        for stages in range(1, layers + 1):
            cut = stage_layers(layers, stages)
            assert [i for stage in cut for i in stage] == list(range(layers))
            assert all(cut)
            work = [len(stage) for stage in cut]
            work[0] += 1
            work[-1] += 1
            assert max(work) - min(work) <= 1, (layers, stages)


def test_known_cuts():
    assert [len(stage) for stage in stage_layers(4, 4)] == [1, 1, 1, 1]
    assert [len(stage) for stage in stage_layers(7, 4)] == [1, 2, 2, 2]
    assert [len(stage) for stage in stage_layers(32, 4)] == [8, 8, 8, 8]


def test_a_v_has_the_first_and_the_last_stage_on_one_rank():
    v = ParallelConfig(pp=3, pp_schedule="dualpipev")
    assert [stages_of_rank(v, rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    assert layers_of_ranks(7, v) == [[0, 6], [1, 2, 5], [3, 4]]
    assert layers_of_ranks(7, ParallelConfig(pp=3)) == [[0, 1], [2, 3, 4], [5, 6]]
