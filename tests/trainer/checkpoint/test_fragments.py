"""Tensors cut into slices and stretches in one way and read in another; memory use of reading and writing."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import store
from trainer.checkpoint.fragments import (
    Box,
    covers,
    difference,
    fragment_key,
    intersection,
    lengths,
    parse_key,
    runs,
    share_out,
    size,
    whole,
    within,
)
from trainer.checkpoint.manifest import CheckpointError, committed
from trainer.checkpoint.store import Reader, Snapshot
from trainer.state import TrainState

SHAPES = [(), (7,), (5, 6), (4, 6, 5), (2, 3, 4, 3)]


def random_box(draw: random.Random, outer: Box) -> Box:
    return tuple(tuple(sorted(draw.sample(range(low, high + 1), 2))) for low, high in outer)  # type: ignore[misc]


def partition(draw: random.Random, box: Box, cuts: int) -> list[Box]:
    """Cut a box into disjoint boxes that cover it."""
    wide = [i for i, (low, high) in enumerate(box) if high - low > 1]
    if not cuts or not wide:
        return [box]
    i = draw.choice(wide)
    at = draw.randint(box[i][0] + 1, box[i][1] - 1)
    left, right = (*box[:i], (box[i][0], at), *box[i + 1 :]), (*box[:i], (at, box[i][1]), *box[i + 1 :])
    return partition(draw, left, cuts - 1) + partition(draw, right, cuts - 1)


def stretches(draw: random.Random, box: Box, cuts: int) -> list[tuple[int, int]]:
    edges = sorted({0, size(box), *(draw.randint(0, size(box)) for _ in range(cuts))})
    return list(itertools.pairwise(edges))


def index_of(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in box)


def write(path: Path, shards: list[dict[str, torch.Tensor]], shape: tuple[int, ...]) -> Reader:
    for rank, tensors in enumerate(shards):
        store.write_shard(path, rank, "t", Snapshot(tensors, {"weight": {"a": list(shape)}}, {}))
    store.commit(path, len(shards), "t", TrainState(), {}, 5)
    return Reader(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stretch_is_covered_by_few_boxes(shape):
    draw = random.Random(0)
    values = torch.arange(size(whole(shape))).view(shape)
    for _ in range(200):
        box = random_box(draw, whole(shape))
        low, high = sorted(draw.choices(range(size(box) + 1), k=2))
        found = list(runs(box, low, high))
        assert len(found) <= max(1, 2 * len(shape) - 1)
        flat = values[index_of(box)].reshape(-1)
        at = low
        for place, part in found:
            assert place == at
            assert torch.equal(values[index_of(part)].reshape(-1), flat[at : at + size(part)])
            at += size(part)
        assert at == max(low, high) or not size(box)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_element_is_taken_once_and_missing_ones_are_named(shape):
    draw = random.Random(1)
    for _ in range(100):
        wanted, held = random_box(draw, whole(shape)), [random_box(draw, whole(shape)) for _ in range(5)]
        taken, missing = share_out(wanted, held)
        counts, expected = torch.zeros(shape), torch.zeros(shape)
        for box in held:
            expected[index_of(box)] = 1
        for i, part in taken:
            assert intersection(part, held[i]) == part
            counts[index_of(part)] += 1
        for part in missing:
            assert not expected[index_of(part)].any()
        assert torch.equal(counts[index_of(wanted)], expected[index_of(wanted)])
        assert sum(size(part) for _, part in taken) + sum(map(size, missing)) == size(wanted)
        assert counts.sum() == counts[index_of(wanted)].sum()


def test_difference_and_index_within_a_box():
    outer, inner = ((2, 8), (1, 5)), ((3, 6), (1, 4))
    left = difference(outer, inner)
    assert sum(map(size, left)) + size(inner) == size(outer)
    values = torch.arange(100).view(10, 10)
    assert torch.equal(values[index_of(outer)][within(outer, inner)], values[index_of(inner)])
    assert lengths(inner) == (3, 3)


def test_key_has_the_box_only_if_it_is_not_the_whole_tensor():
    assert fragment_key("weight", "a.b", 3, ((0, 2), (0, 5)), (2, 5)) == "weight/a.b@3"
    assert fragment_key("exp_avg", "a.b", 0, ((1, 2), (0, 5)), (2, 5)) == "exp_avg/a.b@0[1:2,0:5]"
    assert parse_key("weight/a.b@3") == ("weight", "a.b", 3, None)
    assert parse_key("exp_avg/a.b@0[1:2,0:5]") == ("exp_avg", "a.b", 0, ((1, 2), (0, 5)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_written_one_way_read_another(tmp_path, shape, seed):
    """For any partition into boxes and stretches over ranks, every stretch of every box is read back."""
    draw = random.Random(seed)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
    for box in partition(draw, whole(shape), seed):
        flat = values[index_of(box)].reshape(-1)
        for low, high in stretches(draw, box, draw.randint(0, 3)):
            draw.choice(shards)[fragment_key("weight", "a", low, box, shape)] = flat[low:high].clone()
    reader = write(tmp_path, shards, shape)
    assert torch.equal(reader.weight("a"), values)
    for _ in range(30):
        box = random_box(draw, whole(shape))
        assert torch.equal(reader.read("weight", "a", box=box), values[index_of(box)].reshape(-1))
        low, high = sorted(draw.choices(range(size(box) + 1), k=2))
        read = reader.read("weight", "a", low, high - low, box)
        assert torch.equal(read, values[index_of(box)].reshape(-1)[low:high])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, 2)], "hold 8 of its 12 elements"),
        ([(0, 2), (2, 3), (1, 2)], "hold an element twice"),
        ([(0, 2), (1, 2)], "hold an element twice"),  # and row 2 is missing: the number of elements is right
        ([(0, 3), (0, 3)], "hold an element twice"),
    ],
)
def test_each_element_must_be_held_once(tmp_path, rows, problem):
    """A writer refuses to leave an element out or to write one twice, and a reader refuses such a checkpoint."""
    values = torch.randn(3, 4)

    def shard(low, high):
        return {fragment_key("weight", "a", 0, ((low, high), (0, 4)), (3, 4)): values[low:high].reshape(-1).clone()}

    with pytest.raises(CheckpointError, match=problem):
        write(tmp_path, [shard(*part) for part in rows], (3, 4))
    assert committed(tmp_path) == []
    write(tmp_path, [shard(0, 2), shard(2, 3)], (3, 4))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"] = {}
    for rank, part in enumerate(rows):
        store.write_shard(tmp_path, rank, "again", Snapshot(shard(*part), {}, {}))
        receipt = json.loads((tmp_path / f"receipt-{rank:05d}.json").read_text())
        manifest["files"][receipt["file"]["name"]] = receipt["file"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=problem):
        Reader(tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_cover_a_tensor_if_each_element_is_in_exactly_one(shape):
    draw = random.Random(2)
    for cuts in range(40):
        boxes = partition(draw, whole(shape), cuts % 7)
        assert covers(boxes, shape)
        other = [random_box(draw, whole(shape)) for _ in range(draw.randint(1, 3))]
        for changed in (boxes + other, other, boxes[1:], [*boxes[1:], *other]):
            counts = torch.zeros(shape)
            for box in changed:
                counts[index_of(box)] += 1
            assert covers(changed, shape) == bool((counts == 1).all())


def test_format_1_checkpoints_are_still_read(tmp_path):
    write(tmp_path, [{"weight/a@0": torch.arange(4.0), "weight/a@4": torch.arange(4.0, 10.0)}], (2, 5))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    assert torch.equal(Reader(tmp_path).weight("a"), torch.arange(10.0).view(2, 5))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(CheckpointError, match="format 3"):
        Reader(tmp_path)


MODEL_MB = 192
MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from trainer.checkpoint import store as checkpoint
from trainer.checkpoint.store import Reader, Snapshot
from trainer.state import TrainState

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

class Peak:
    def __enter__(self):
        self.base = self.peak = anonymous()
        self.over = False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.over:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.0005)
    def __exit__(self, *_):
        self.over = True
        self.thread.join()
        self.growth = max(self.peak, anonymous()) - self.base

path, rows, columns, count = Path(sys.argv[1]), 1024, 4096, int(sys.argv[2]) // 16
names = [f"p{i}" for i in range(count)]
shapes = {"weight": {name: [rows, columns] for name in names}}
share = {f"weight/{name}@0": torch.full((rows * columns,), float(i)) for i, name in enumerate(names)}
with Peak() as writing:
    checkpoint.write_shard(path, 0, "t", Snapshot(share, shapes, {}))
checkpoint.commit(path, 1, "t", TrainState(step=1), {}, 5)
held = sum(t.nbytes for t in share.values()) / 2**20
del share
with Peak() as reading:
    reader = Reader(path)
    mine = [reader.read("weight", n, box=((0, rows), (columns // 8, columns // 4))) for n in names]
assert all(bool((t == i).all()) for i, t in enumerate(mine))
print(held, writing.growth, sum(t.nbytes for t in mine) / 2**20, reading.growth)
"""


@pytest.mark.slow
def test_memory_grows_with_the_share_not_the_model(tmp_path):
    """Anonymous memory only: the kernel drops pages mapped from a file when it needs the room.

    Writing a share as large as the model makes no second copy of it. A reader of an eighth of every row, which touches
    nearly every page of the file, holds only that eighth.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "step-00000001"), str(MODEL_MB)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    held, writing, eighth, reading = map(float, done.stdout.split())
    assert held == MODEL_MB
    assert eighth == MODEL_MB / 8
    assert writing < MODEL_MB / 8
    assert reading < eighth + MODEL_MB / 16
