"""Rows of numbers: what is read of Parquet files, in which order, and what is left out or refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs import ConfigError, from_dict
from configs.sections.data import DataConfig
from trainer.data.kinds import kind_of
from trainer.data.rows.reader import Rows


def write(path, count=50, **columns):
    draw = np.random.default_rng(0)
    table = {"a": draw.normal(5, 2, count), "b": draw.integers(0, 9, count), "label": np.arange(count) % 3} | columns
    pq.write_table(pa.table(table), path, row_group_size=16)
    return path


def rows(path, split="train", numbers=False, seed=0, **keys):
    return Rows(DataConfig(path=str(path), rows=keys), seed, split, numbers)


def test_a_row_is_a_function_of_seed_and_index(tmp_path):
    path = write(tmp_path / "x.parquet")
    one, other, again = rows(path), rows(path, seed=1), rows(path)
    size = len(one)
    assert size == 48  # 5% of 50 are held out
    epoch, second = [one.locate(i) for i in range(size)], [one.locate(i) for i in range(size, 2 * size)]
    assert sorted(epoch) == sorted(second) == list(range(size))
    assert epoch != second != [other.locate(i) for i in range(size, 2 * size)]
    assert [again.locate(i) for i in (77, 3)] == [one.locate(77), one.locate(3)]
    batch = one.examples([3, -1, 60])
    assert torch.equal(batch.inputs[2], one.features[one.locate(60)])
    assert (batch.inputs[1].tolist(), batch.labels[1], batch.weight()) == ([0, 0], -1, 2)


def test_splits_share_no_row_and_features_are_standardised_by_the_training_split(tmp_path):
    path = write(tmp_path / "x.parquet", c=np.arange(50.0), d=np.full(50, 7))
    train, held_out = rows(path), rows(path, "held_out")
    assert train.names == ("a", "b", "c", "d")
    assert torch.allclose(train.features.mean(0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(train.features.std(0, correction=0), torch.tensor([1.0, 1, 1, 0]), atol=1e-6)
    plain = [rows(path, split, standardise=False).features[:, 2] for split in ("train", "held_out")]
    assert sorted(torch.cat(plain).tolist()) == list(range(50))
    shift, spread = plain[0].mean(), plain[0].std(correction=0)
    assert torch.allclose(held_out.features[:, 2], (plain[1] - shift) / spread, atol=1e-6)
    with pytest.raises(IndexError):
        held_out.locate(len(held_out))


def test_numbers_are_standardised_and_keep_their_scale(tmp_path):
    found = rows(write(tmp_path / "x.parquet"), numbers=True, labels=["a", "b"], features=["label"])
    assert found.labels.shape == (48, 2)
    assert torch.allclose(found.labels.mean(0), torch.zeros(2), atol=1e-6)
    own = found.labels * found.scale[1] + found.scale[0]
    plain = rows(tmp_path / "x.parquet", numbers=True, labels=["a", "b"], features=["label"], standardise=False)
    assert torch.allclose(own, plain.labels, atol=1e-5)


def test_files_of_their_own_are_held_out(tmp_path):
    write(tmp_path / "train.parquet"), write(tmp_path / "validation.parquet", 7)
    assert (len(rows(tmp_path)), len(rows(tmp_path, "held_out"))) == (50, 7)
    nothing = write(tmp_path / "x.parquet", 3)
    config = from_dict({"model": {"family": "mlp", "inputs": 2}, "data": {"path": str(nothing)}})
    assert kind_of(config).open(config, "held_out") is None


def test_none_are_held_out_where_none_are_asked_for(tmp_path):
    data = {"path": str(write(tmp_path / "x.parquet")), "prepare": {"held_out": 0}}
    config = from_dict({"model": {"family": "mlp", "inputs": 2}, "data": data})
    assert kind_of(config).open(config, "held_out") is None
    assert len(kind_of(config).open(config, "train")) == 50


def test_the_record_tells_the_data_by_the_footers_alone(tmp_path, monkeypatch):
    """The digest covers sizes and statistics of all columns; the rows are not read for it."""
    path = write(tmp_path / "x.parquet")
    config = from_dict({"model": {"family": "mlp", "inputs": 2}, "data": {"path": str(path)}})
    monkeypatch.delattr(pq.ParquetFile, "read")
    [one] = kind_of(config).inputs(config.data)
    assert one["profile"] == {"rows": 50, "features": 2}
    write(path, a=np.zeros(50))
    [other] = kind_of(config).inputs(config.data)
    assert one["digest"] != other["digest"]


def test_rows_that_are_not_whole_are_counted_and_left_out(tmp_path):
    a = np.arange(50.0)
    a[4], a[9] = np.nan, np.inf
    label = pa.array([None if i in (7, 9) else i % 3 for i in range(50)])
    path = write(tmp_path / "x.parquet", a=a, label=label)
    config = from_dict(
        {"model": {"family": "mlp", "inputs": 2}, "data": {"path": str(path), "rows": {"standardise": False}}}
    )
    _, notes = kind_of(config).ensure(config)
    assert notes[1] == (
        "3 rows left out, 2 without a label and the others with a missing or infinite number: the first is row 4 of "
        "x.parquet"
    )
    parts = [kind_of(config).open(config, split).features[:, 0] for split in ("train", "held_out")]
    assert set(torch.cat(parts).tolist()) == set(range(50)) - {4, 7, 9}


REFUSED = {
    "no label": (
        {"labels": ["y"]},
        {},
        r"should have exactly one column y \(it has a, b, label\): set data\.rows\.labels",
    ),
    "text": ({}, {"c": ["x"] * 50}, r"column c is string, not numbers: leave it out of data\.rows\.features"),
    "a class below 0": ({}, {"label": np.arange(50) - 1}, r"column label has -1, but classes are whole numbers from 0"),
    "half a class": ({}, {"label": np.arange(50) / 2}, r"column label has 0\.5, but classes .* set task=regression"),
    "two labels": ({"labels": ["a", "label"]}, {}, r"data\.rows\.labels has 2 columns, but task=classification"),
    "nothing whole": (
        {},
        {"a": [float("nan")] * 50},
        r"has no row to train on: 50 rows left out, 0 without .*: the first is row 0 of x",
    ),
    "nothing else": ({"labels": ["a", "b", "label"]}, {}, r"no columns but the labels \(a, b, label\)"),
}


@pytest.mark.parametrize(("keys", "columns", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, keys, columns, message):
    with pytest.raises(ConfigError, match=message):
        rows(write(tmp_path / "x.parquet", **columns), **keys)


SIZES = {
    "inputs": ({"inputs": 5}, {}, r"model\.inputs is 5, but an example .* has 2 numbers: set model\.inputs=2"),
    "classes": ({"outputs": 2}, {}, r"model\.outputs is 2, but .* labels up to 2: set model\.outputs=3"),
    "numbers": ({"outputs": 2}, {"task": "regression"}, r"data\.rows\.labels are 1: set model\.outputs=1"),
    "weights": ({}, {"train": {"class_weights": [1, 2]}}, r"train\.class_weights has 2 weights for 10 classes"),
    "text": ({}, {"data": {"path": "stdlib"}}, r"data\.path=stdlib is text, but task=classification learns from rows"),
}


@pytest.mark.parametrize(("model", "sections", "message"), SIZES.values(), ids=SIZES)
def test_a_model_of_other_sizes_is_refused(tmp_path, model, sections, message):
    path = write(tmp_path / "x.parquet")
    tree = {"model": {"family": "mlp", "inputs": 2} | model, "data": {"path": str(path)}} | sections
    config = from_dict(tree)
    with pytest.raises(ConfigError, match=message):
        kind_of(config).ensure(config)
