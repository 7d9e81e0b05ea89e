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
    with pytest.raises(ConfigError, match="--convention active: this table has total"):
        table.counted_as("active")


def test_rows_of_one_kind(tmp_path):
    path = csv(tmp_path, "n,d,loss,set\n1e6,2e7,4.5,x\n1e6,2e7,4.6,y\n")
    assert read_table(path, where={"set": "y"}).loss.tolist() == [4.6]
    with pytest.raises(ConfigError, match="no rows are left"):
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
        ("n,d,loss\nsmall,2,3\n", {}, "row 1 of column n contains 'small', which is not a number"),
        ("n,d,val\n1,2,3\n1,2,x\n", {"loss": "val"}, "row 2 of column val contains 'x', which is not a number"),
        ("n,d,loss, loss\n1,2,3,4\n", {}, "two columns have the name loss"),
    ],
)
def test_mistakes(tmp_path, text, columns, words):
    with pytest.raises(ConfigError) as error:
        read_table(csv(tmp_path, text), columns)
    assert words in str(error.value)


def test_files_that_are_not_tables(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_table(tmp_path / "missing.csv")
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="neither CSV nor Parquet"):
        read_table(path)


def test_budgets_that_differ_by_rounding_are_one():
    c = np.array([1.0e15, 3.02e15, 0.995e15, 2.98e15, 1.004e15, 9e15])
    table = Table(np.ones(6), np.ones(6), c, np.ones(6))
    assert budgets(table).level.tolist() == [0, 1, 0, 1, 0, 2]


def test_spaces_around_names_and_values_are_ignored(tmp_path):
    path = csv(tmp_path, "n, d , loss, recipe\n1e6, 2e7, 4.5, a\n1e6, 2e7, 4.6,  b\n")
    assert read_table(path, {" n ": "n "}, {"recipe ": " b"}).loss.tolist() == [4.6]
    assert read_table(path).recipe == ("a", "b")


def test_an_empty_cell_can_be_chosen(tmp_path):
    path = csv(tmp_path, "n,d,loss,recipe,k\n1e6,2e7,4.5,,1\n1e6,2e7,4.6,z,\n")
    assert read_table(path).recipe == ("", "z")
    assert read_table(path, where={"recipe": ""}).loss.tolist() == [4.5]
    found = read_table(path, where={"k": ""})
    assert (found.loss.tolist(), found.run) == ([4.6], ("row 2",))
    parquet.write_table(
        pa.table({"n": [1e6, 2e6], "d": [1e7, 1e7], "loss": [4.0, 3.9], "recipe": [None, "z"]}), tmp_path / "r.parquet"
    )
    assert read_table(tmp_path / "r.parquet", where={"recipe": ""}).loss.tolist() == [4.0]


def test_rows_of_impossible_models_are_left_out(tmp_path):
    rows = {
        "dense": ",,,,", "zero": "0,,,,", "one": "1,1,1,1,", "moe": "8,2,1,0.25,inf",
        "half": "1.5,1,1,1,", "negative": "-4,1,1,1,", "endless": "inf,1,1,1,", "unknown": "nan,2,1,0.25,",
        "fine": "8,2,0,0.25,", "no top": "8,,1,0.25,", "over": "8,2,1,1.5,", "none": "8,2,1,0,", "read": "8,2,1,0.25,0",
    }  # fmt: skip
    text = "".join(f"1e6,2e7,4.5,{name},{row}\n" for name, row in rows.items())
    table = read_table(csv(tmp_path, f"n,d,loss,run,experts,top_k,granularity,active_ratio,unique\n{text}"))
    assert table.run == ("dense", "zero", "one", "moe")
    assert {name: values.tolist()[:3] for name, values in table.extra.items() if name != "unique"} == {
        "experts": [1, 1, 1], "top_k": [1, 1, 1], "granularity": [1, 1, 1], "active_ratio": [1, 1, 1]
    }  # fmt: skip
    assert dict(table.excluded) == {
        "half": "experts=1.5", "negative": "experts=-4", "endless": "experts=inf", "unknown": "experts=nan",
        "fine": "granularity=0", "no top": "top_k=nan", "over": "active_ratio=1.5", "none": "active_ratio=0",
        "read": "unique=0",
    }  # fmt: skip
    assert "2 rows with experts empty or 0: treated as dense, experts=1" in table.notes


def test_a_table_without_a_usable_row(tmp_path):
    path = csv(tmp_path, "n,d,loss\n1e6,2e7,-3.5\n1e6,0,4\n")
    with pytest.raises(ConfigError, match=r"no row can be used: 2 rejected, such as row 1: loss=-3\.5"):
        read_table(path)
    table = read_table(csv(tmp_path, "n,d,loss\n1e6,2e7,3.5\n"))
    with pytest.raises(ConfigError, match=r"--max-budget 1000 leaves no run: the smallest one spends 1\.2e\+14 FLOPs"):
        table.up_to(1000)


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_separators_of_a_text_table(tmp_path, between):
    rows = ["n,d,loss,recipe", "1e6,1e8,3.5,a", "2e6,1e8,NA,a", "3e6,1e8,3.1,b"]
    (tmp_path / "t.csv").write_text("\n".join(rows).replace(",", between))
    table = read_table(tmp_path / "t.csv")
    assert (table.loss.tolist(), table.recipe) == ([3.5, 3.1], ("a", "b"))
    assert table.excluded == (("row 2", "loss=nan"),)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_every_kind_of_text_column_in_parquet(tmp_path, kind):
    table = pa.table({"n": [1e6, 2e6], "d": [1e8, 1e8], "loss": [pa.scalar(3, pa.decimal128(5, 2)), None]})
    for name in ("recipe", "run"):
        table = table.append_column(name, pa.array(["a", "b"], kind))
    parquet.write_table(table, tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet")
    assert (found.recipe, found.run, found.loss.tolist()) == (("a",), ("a",), [3.0])
    assert found.excluded == (("b", "loss=nan"),)


def test_a_column_that_is_needed_is_never_left_out(tmp_path):
    table = pa.table({"n": [1e6], "d": [1e8], "loss": [3.0], "recipe": [["a"]], "notes": [["of no kind"]]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"column recipe is of type list<.*, neither numbers nor text"):
        read_table(tmp_path / "t.parquet")
    parquet.write_table(table.drop_columns("recipe"), tmp_path / "t.parquet")
    assert len(read_table(tmp_path / "t.parquet")) == 1
    with pytest.raises(ConfigError, match="column notes is of type list"):
        read_table(tmp_path / "t.parquet", where={"notes": "x"})
