"""Series from Parquet: padded, standardised, split, and refused by name where they are not series."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs import ConfigError, load
from trainer.data import parquet_files
from trainer.data.kinds import kind_of
from trainer.data.series.reader import read_series

ROWS = {
    "times": [[1.0, 2.0, 5.0], [0.0, 1.5], [3.0, 3.5, 4.0]],
    "values": [[[1, 10], [2, None], [3, 30]], [[None, 5], [4, 6]], [[0, 0], [1, 1], [2, 2]]],
}


def write(folder: Path, name: str = "train.parquet", **columns) -> Path:
    pq.write_table(pa.table(ROWS | columns), folder / name)
    return folder


def config(path: Path, *overrides: str):
    keys = [f"data.path={path}", "data.prepare.held_out=0", f"run.root={path.parent / 'runs'}", *overrides]
    return load("pendulums", keys)


def test_series_are_padded_and_standardised(tmp_path):
    asked = config(write(tmp_path))
    _, notes = kind_of(asked).ensure(asked)
    assert notes == [f"data.path={tmp_path}: 3 series of up to 3 times, 2 numbers each"]
    reader = kind_of(asked).open(asked, "train")
    batch = reader.examples([0, 1, 2, -1])
    first = [reader.locate(index) for index in range(3)]
    assert sorted(first) == [0, 1, 2]
    by_row = {row: place for place, row in enumerate(first)}
    assert torch.allclose(batch.times[by_row[0]], torch.tensor([0, 0.25, 1.0]))
    assert torch.allclose(batch.times[by_row[1]], torch.tensor([0, 0.375, 0.375]))
    assert batch.observed[by_row[1]].tolist() == [[False, True], [True, True], [False, False]]
    assert not batch.observed[3].any()
    numbers = np.array([1, 2, 3, 4, 0, 1, 2])
    wanted = (torch.tensor([1.0, 2.0, 3.0]) - numbers.mean()) / numbers.std()
    assert torch.allclose(batch.values[by_row[0], :, 0], wanted.float())
    assert batch.weight() == 3


def test_held_out_files_are_scaled_by_those_to_train_on(tmp_path):
    write(write(tmp_path), "test.parquet", values=[[[9, 9]] * 3, [[9, 9]] * 2, [[9, 9]] * 3])
    asked = config(tmp_path)
    held_out = kind_of(asked).open(asked, "held_out")
    assert (held_out.values[0, 0] > 1).any()
    assert len(held_out) == 3


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"times": [[2.0, 1.0, 5.0], *ROWS["times"][1:]]}, r"row 0: times must be finite and ascend"),
        ({"times": [[1.0, 2.0], *ROWS["times"][1:]]}, r"row 0 has 2 times and 3 values: it needs series"),
        ({"values": [[[1, 1]] * 3, [[1]] * 2, [[1, 1]] * 3]}, r"row 1 has an observation of 1 number, others have 2"),
        ({"values": [[[1, None]] * 3, [[1, None]] * 2, [[1, None]] * 3]}, r"number 1 of values is never observed"),
        ({"times": ["a", "b", "c"]}, r"times is string: it needs series"),
    ],
)
def test_what_is_no_series_is_refused(tmp_path, columns, said):
    asked = config(write(tmp_path, **columns))
    with pytest.raises(ConfigError, match=said):
        kind_of(asked).ensure(asked)


def test_a_small_file_of_many_numbers_is_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    path = write(tmp_path, times=[[0.0] * 10_000] * 3, values=[[[1.0, 2.0]] * 10_000] * 3)
    assert (path / "train.parquet").stat().st_size < 10_000
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match="the series take over 1,000,000 bytes of memory"):
        read_series([path / "train.parquet"])


def test_another_width_is_refused(tmp_path):
    asked = config(write(tmp_path), "model.inputs=3")
    with pytest.raises(ConfigError, match=r"model\.inputs is 3, .* has 2 numbers: set model\.inputs=2"):
        kind_of(asked).ensure(asked)
