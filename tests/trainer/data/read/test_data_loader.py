"""The loader: the batches asked for, in order, read ahead within bounds; errors arrive; it ends."""

import itertools
import threading
from pathlib import Path

import pytest
import torch

from configs.sections.data import DataConfig
from trainer.data.manifest import read_manifest
from trainer.data.read.loader import Loader
from trainer.data.read.reader import Dataset
from trainer.data.read.shards import DataError

CPU = torch.device("cpu")


@pytest.fixture
def dataset(prepared: Path) -> Dataset:
    return Dataset(DataConfig(path=str(prepared)), 32, seed=0)


def test_batches_come_in_order(dataset: Dataset):
    plan = [[0, 1], [2, 3], [4, -1]]
    with Loader(dataset, plan, 2, CPU) as loader:
        loaded = list(loader)
    batches = [each.batch for each in loaded]
    assert [each.weight for each in loaded] == [int((batch.labels != -100).sum()) for batch in batches]
    assert [batch.sequence_ids.tolist() for batch in batches] == plan
    assert (batches[1].input_ids == dataset.examples([2, 3]).input_ids).all()
    assert loader.waited > 0
    with pytest.raises(StopIteration):
        next(loader)


def test_reads_ahead_within_bounds_and_closes_early(dataset: Dataset):
    asked = []
    reached = [threading.Event() for _ in range(5)]

    def plan():
        for first in itertools.count():
            asked.append(first)
            reached[first].set()
            yield [first]

    loader = Loader(dataset, plan(), 2, CPU)
    assert reached[2].wait(30)
    assert asked == [0, 1, 2]  # two ready, one waiting for its place
    assert next(loader).batch.sequence_ids.tolist() == [0]
    assert reached[3].wait(30)
    loader.close()
    assert asked == [0, 1, 2, 3]
    assert not any(thread.name == "data-loader" for thread in threading.enumerate())
    assert dataset.examples([1]).sequence_ids.tolist() == [1]


def test_errors_reach_the_consumer(prepared: Path, tmp_path: Path):
    import shutil

    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    dataset = Dataset(DataConfig(path=str(copy)), 32, seed=0)
    path = copy / read_manifest(copy).of("train")[0].file
    first = dataset.examples([0])
    path.write_bytes(b"\0" * path.stat().st_size)
    far = next(i for i in range(len(dataset)) if dataset.locate(i)[3] != dataset.locate(0)[3])
    with Loader(dataset, [[0], [far], [0]], 4, CPU) as loader:
        assert (next(loader).batch.input_ids == first.input_ids).all()
        with pytest.raises(DataError, match="row group"):
            next(loader)
        with pytest.raises(StopIteration):
            next(loader)
