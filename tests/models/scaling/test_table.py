"""Tables of runs from files: named columns, what is assumed, what is left out, mistakes in one message."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from configs import ConfigError
from models.scaling.table import Table, budgets, read_table


def csv(tmp_path, text, name="runs.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_columns_are_named(tmp_path):
    path = csv(tmp_path, "params,toks,flops,val,who\n1e6,2e7,1.2e14,4.5,a\n2e6,1e7,1.3e14,4.4,b\n")
    table = read_table(path, {"n": "params", "d": "toks", "c": "flops", "loss": "val", "run": "who"})
    assert table.n.tolist() == [1e6, 2e6]
    assert table.c.tolist() == [1.2e14, 1.3e14]
    assert (table.run, table.convention, table.notes) == (("a", "b"), "given", ())


def test_missing_flops_or_tokens_are_noted(tmp_path):
    table = read_table(csv(tmp_path, "n,d,loss\n1e6,2e7,4.5\n"))
    assert table.c.tolist() == [1.2e14]
    assert "6 n d" in table.notes[0]
    table = read_table(csv(tmp_path, "n,c,loss\n1e6,1.2e14,4.5\n"))
    assert table.d.tolist() == [2e7]
    assert "c / (6 n)" in table.notes[0]


def test_parquet_and_conventions(tmp_path):
    path = tmp_path / "runs.parquet"
    columns = {"n": [1e6, 2e6], "d": [1e7, 1e7], "loss": [4.0, 3.9], "total": [3e6, 4e6], "experts": [1, 8]}
    parquet.write_table(pa.table(columns), path)
    table = read_table(path)
    assert table.extra["experts"].tolist() == [1, 8]
    assert table.counted_as("total").n.tolist() == [3e6, 4e6]
    with pytest.raises(ConfigError, match="--convention active: this table knows total"):
        table.counted_as("active")


def test_rows_of_one_kind(tmp_path):
    path = csv(tmp_path, "n,d,loss,set\n1e6,2e7,4.5,x\n1e6,2e7,4.6,y\n")
    assert read_table(path, where={"set": "y"}).loss.tolist() == [4.6]
    with pytest.raises(ConfigError, match="no row is left"):
        read_table(path, where={"set": "z"})


def test_rows_without_a_logarithm_are_left_out_with_their_reason(tmp_path):
    table = read_table(csv(tmp_path, "n,d,loss,run\n1e6,2e7,4.5,a\n1e6,2e7,nan,b\n1e6,0,4.2,c\n1e6,1e7,,d\n"))
    assert table.run == ("a",)
    assert table.excluded == (("b", "loss=nan"), ("c", "d=0, c=0"), ("d", "loss=nan"))


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("n,d\n1,2\n", {}, "no column loss: name it, such as --columns loss=...; the file has n, d"),
        ("n,loss\n1,2\n", {}, "no column d"),
        ("n,d,loss\n1,2,3\n", {"n": "size"}, "--columns n=size"),
        ("n,d,loss\n1,2,3\n", {"params": "n"}, "no such column; known are n, d, c, loss"),
        ("n,d,loss\nsmall,2,3\n", {}, "'small', which is no number"),
    ],
)
def test_mistakes(tmp_path, text, columns, words):
    with pytest.raises(ConfigError) as error:
        read_table(csv(tmp_path, text), columns)
    assert words in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_table(tmp_path / "missing.csv")
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="neither CSV nor Parquet"):
        read_table(path)


def test_budgets_hold_what_rounding_parts():
    c = np.array([1.0e15, 3.02e15, 0.995e15, 2.98e15, 1.004e15, 9e15])
    table = Table(np.ones(6), np.ones(6), c, np.ones(6))
    assert budgets(table).tolist() == [0, 1, 0, 1, 0, 2]
