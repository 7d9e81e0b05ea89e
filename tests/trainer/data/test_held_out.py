"""A held-out split that cannot be used is said before a run starts, and never left out in silence."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import ConfigError, from_dict
from trainer.data.kinds import kind_of


def rows(folder, labels, name="validation.parquet"):
    folder.mkdir(exist_ok=True)
    for file, ys in (("train.parquet", [0, 1, 2] * 4), (name, labels)):
        pq.write_table(
            pa.table({"x": np.arange(len(ys), dtype=float), "label": pa.array(ys, pa.int64())}), folder / file
        )
    return from_dict(
        {"model": {"family": "mlp", "inputs": 1, "outputs": 3},
         "data": {"path": str(folder), "prepare": {"held_out": 0.0}},
         "run": {"root": str(folder.parent)}}
    )  # fmt: skip


def test_labels_that_the_model_lacks(tmp_path):
    config = rows(tmp_path / "d", [0, 7])
    with pytest.raises(ConfigError, match=r"^model\.outputs is 3, but .* has labels up to 7: set model\.outputs=8"):
        kind_of(config).ensure(config)


def test_a_file_that_is_damaged(tmp_path):
    config = rows(tmp_path / "d", [0, 1])
    kind_of(config).ensure(config)
    (tmp_path / "d" / "validation.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ConfigError, match=r"validation\.parquet"):
        kind_of(config).ensure(config)
    with pytest.raises(ConfigError, match=r"validation\.parquet"):
        kind_of(config).open(config, "held_out")


def test_none_at_all_is_no_mistake(tmp_path):
    config = rows(tmp_path / "d", [0, 1], name="train-2.parquet")
    kind_of(config).ensure(config)
    assert kind_of(config).open(config, "held_out") is None
    empty = rows(tmp_path / "e", [])
    kind_of(empty).ensure(empty)
    assert kind_of(empty).open(empty, "held_out") is None
