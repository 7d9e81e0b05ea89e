"""Where a pipeline cuts the model."""

from configs.stages import stage_layers


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
