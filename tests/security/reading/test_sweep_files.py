"""Whatever a sweep's file, its plan.json or a table holds, reading it ends soon: in trials, or in one message."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from no_hang import ends

from cluster.sweep.design.plan import plan
from cluster.sweep.train.progress import PLAN, read_plan
from configs import ConfigError
from configs.reading.parse import parse_yaml
from configs.sweep.definition import load_sweep
from models.scaling.table import MAX_TABLE_BYTES, MAX_TABLE_ROWS, _check_unpacked, read_table

HEAD = "base: quickstart\nset: {model.vocab_size: 4096}\n"
ISOFLOP = HEAD + "isoflop: {budgets: [1e15], sizes: 3}\n"
GRID = HEAD + "grid: {}\n"
MANY = f"[{', '.join(map(str, range(1, 301)))}]"

WRONG = {
    "draws": (HEAD + "random: {n: 1000000000}\naxes: {optim.lr: {low: 1e-4, high: 1e-2}}\n", "random.n=1000000000"),
    "sizes": (HEAD + "isoflop: {budgets: [1e15], sizes: 1000000000}\n", "isoflop.sizes=1000000000: should be less"),
    "budgets": (HEAD + "isoflop: {budgets: [1e300]}\n", "isoflop.budgets=[1e+300]: should be at most 1e+30"),
    "grid": (GRID + f"axes: {{optim.lr: {MANY}, train.seq_len: {MANY}}}\n", "the sweep has 90,000 trials"),
    "seeds": (ISOFLOP + f"seeds: {MANY}\nrules: {{lr_scale: {MANY}}}\n", "the sweep has 270,000 trials"),
    "variants": (
        ISOFLOP + f"variants: {{m: {{experts: {MANY}, top_k: {MANY}, granularity: {MANY}}}}}\n",
        "the lists have 27,000,000 combinations: at most 10,000",
    ),
    "granularity": (
        ISOFLOP + "variants: {m: {experts: 8, granularity: [101, 103, 107, 109, 113, 127]}}\n",
        "no width of at most 16,777,216 is a multiple of every granularity",
    ),
    "aspect": (ISOFLOP + "shape: {aspect_ratio: 1e-30}\n", "shape.aspect_ratio=1e-30: should be greater than"),
    "shapes": (ISOFLOP + "shape: {aspect_ratio: 0.001, slack: 1e30, head_dim: 2}\n", "over 20,000 shapes are near"),
    "no width": (
        HEAD + "isoflop: {budgets: [1e15], tokens_per_parameter: 1e-300}\n",
        "isoflop.budgets=1e15: this needs a model.hidden_size of over 16,777,216",
    ),
    "no steps": (HEAD + "grid: {budget: 1e30}\naxes: {optim.lr: [1]}\n", "train.steps="),
    "layers": (GRID + "axes: {model.num_layers: [1000000000]}\n", "model.num_layers=1000000000: should be less than"),
    "whole range": (
        HEAD + "random: {n: 3}\naxes: {train.steps: {low: 1, high: 1e30}}\n",
        "axes.train.steps: train.steps is a whole number: low and high should be under",
    ),
    "deep key": (GRID + f"axes: {{? {'a.' * 5000}b : [1]}}\n", "is nested over 64 levels deep"),
    "deep set": (
        f"base: quickstart\nset: {{? {'a.' * 100}b : 1}}\n" + ISOFLOP.removeprefix(HEAD),
        "is nested over 64 levels deep"),
    "root": (ISOFLOP + f"root: {'r' * 300}\n", "a path has at most 4,095 bytes, and each file name at most 255"),
    "base": (f"base: {'b' * 5000}\n" + ISOFLOP.removeprefix(HEAD), "base="),
    "name": (ISOFLOP + f"variants: {{{'v' * 300}: {{}}}}\n", "at most 200 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_message_says_what_is_wrong_with_a_sweep(tmp_path, name):
    text, told = WRONG[name]
    (tmp_path / "sweep.yaml").write_text(text)
    with ends(), pytest.raises(ConfigError) as caught:
        plan(load_sweep(tmp_path / "sweep.yaml"), 4096)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert len(str(caught.value)) < 800


def test_what_the_wrong_ones_are_made_of_is_planned(tmp_path):
    for text in (ISOFLOP, GRID + "axes: {optim.lr: [1e-3, 2e-3]}\n"):
        (tmp_path / "sweep.yaml").write_text(text)
        assert plan(load_sweep(tmp_path / "sweep.yaml"), 4096).trials


ITEM = {
    "name": "a", "variant": "dense", "budget": None, "flops": 1e9, "spent": 1e9, "tokens": 10, "steps": 5,
    "from_step": 0, "after": None, "parameters": {"total": 5},
}  # fmt: skip
TREE = {"vocab_size": 64, "open": 0, "warnings": [], "trials": [ITEM]}


@pytest.mark.parametrize(
    "tree",
    [[], None, {}, TREE | {"trials": 5}, TREE | {"trials": [5]}, TREE | {"trials": [{}]}, TREE | {"open": "x"},
     TREE | {"trials": [ITEM | {"name": "../x"}]}, TREE | {"trials": [ITEM | {"more": 1}]}, TREE | {"vocab_size": None},
     TREE | {"trials": [ITEM | {"steps": "5"}]}, TREE | {"trials": [ITEM | {"parameters": [1]}]}],
    ids=range(12),
)  # fmt: skip
def test_a_plan_that_is_none(tmp_path, tree):
    (tmp_path / PLAN).write_text(json.dumps(TREE))
    assert read_plan(tmp_path)[0][0].name == "a"
    (tmp_path / PLAN).write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"plan\.json is not what `muster sweep run` writes"):
        read_plan(tmp_path)


def test_a_plan_that_is_no_json(tmp_path):
    for text in ("[" * 100_000, "{", '{"vocab_size": ' + "9" * 5000 + "}"):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises(ConfigError, match=r"plan\.json is not what `muster sweep run` writes"):
            read_plan(tmp_path)


def refused(path: Path) -> str:
    with ends(), pytest.raises(ConfigError) as caught:
        read_table(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    return str(caught.value)


def test_tables_that_expand(tmp_path):
    rows = "n,d,c,loss\n" + "1e8,2e9,1.2e18,3.4\n" * 4
    for name, write in (("t.csv", Path.write_bytes), ("t.csv.gz", lambda p, b: p.write_bytes(gzip.compress(b)))):
        path = tmp_path / name
        write(path, rows.encode())
        assert len(read_table(path)) == 4
        write(path, rows.encode() + b"\n" * MAX_TABLE_BYTES)
        assert f"over {MAX_TABLE_BYTES:,} bytes" in refused(path)
        write(path, rows.encode() + b"1,1,1,1\n" * MAX_TABLE_ROWS)
        assert f"over {MAX_TABLE_ROWS:,} rows" in refused(path)
        write(path, b"a," * 1_000_000 + b"\n" + b"1," * 1_000_000 + b"\n")
        assert "over 1,000 columns" in refused(path)
        write(path, b"n,d,c,loss\n1,1,1\xff\n")
        assert "t.csv" in refused(path)


def test_parquet_tables_that_expand(tmp_path):
    path = tmp_path / "t.parquet"
    good = {"n": [1e8, 2e8], "d": [2e9, 2e9], "c": [1.2e18, 1e18], "loss": [3.4, 3.3]}
    parquet.write_table(pa.table(good | {"run": ["a", "b"], "notes": [["x"], ["y"]]}), path)
    assert read_table(path).run == ("a", "b")
    word = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["x" * 10_000_000]))
    parquet.write_table(pa.table({key: [values[0]] * 10_000 for key, values in good.items()} | {"run": word}), path)
    assert path.stat().st_size < 2_000_000  # 100 GB as text
    assert "run" in refused(path)
    parquet.write_table(pa.table({key: [values[0]] * (MAX_TABLE_ROWS + 1) for key, values in good.items()}), path)
    assert f"over {MAX_TABLE_ROWS:,} rows" in refused(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "neither CSV nor Parquet" in refused(path)
    parquet.write_table(pa.table(good | {"n": [["1"], ["2"]]}), path)
    assert "n" in refused(path)


READ = """
import resource, sys
import pyarrow.csv, pyarrow.parquet
import configs.reading.parquet_pages
from pathlib import Path
from models.scaling.table import read_table

with open("/proc/self/statm") as file:
    before = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # ends what does not end
resource.setrlimit(resource.RLIMIT_AS, (before + 500 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        print(len(read_table(path)), "rows")
    except ValueError as error:
        print(str(error).replace("\\n", " "))
"""
"""In a process that may hold 500 MB more than its imports."""


@pytest.mark.slow
def test_tables_take_neither_long_nor_much_memory(tmp_path):
    numbers = {name: [1.0] * 3 for name in ("n", "d", "loss")}
    tables = {
        "text.parquet": numbers | {"run": ["a" * (1 << 27), "b", "c"]},
        "wide.parquet": {key: [1.5] * 20_000 for key in ("n", "d", "loss", *(f"x{i}" for i in range(200)))},
        "twice.parquet": numbers,
    }
    for name, columns in tables.items():
        table = pa.table(columns)
        if name.startswith("twice"):
            table = table.append_column("n", table.column("n"))
        parquet.write_table(table, tmp_path / name, compression="zstd")
    head = b"n,d,loss"
    texts = {
        "cr.csv": head + b"\n" + b"1,2,3\r" * 2_700_000,
        "all cr.csv": head + b"\r" + b"1,2,3\r" * 100_000,
        "wide.csv": b",".join([head, *(b"x%d" % i for i in range(990))]) + (b"\n1,2,3" + b",ab" * 990) * 4_000,
        "twice.csv": b"n,d,loss,n\n1,2,3,4\n",
        "line.csv": head + b",run\n1,2,3," + b"a" * 3_000_000 + b"\n",
        "good.csv": head + b"\r\n1,2,3\r\n",
    }
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    told = {
        "text.parquet": "its pages decompress to", "wide.parquet": "20,000 rows of 203 columns, over 2,000,000 cells",
        "twice.parquet": "two columns have the name n", "cr.csv": "it has over 50,000 rows",
        "all cr.csv": "it has over 50,000 rows", "wide.csv": "it has over 2,000,000 cells",
        "twice.csv": "two columns have the name n", "line.csv": "a line is longer than 1,048,576 bytes",
        "good.csv": "1 rows",
    }  # fmt: skip
    paths = [str(tmp_path / name) for name in told]
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for (name, why), line in zip(told.items(), done.stdout.splitlines(), strict=True):
        assert why in line, name


def test_a_footer_that_lies_of_a_tables_pages(tmp_path, monkeypatch):
    """What the headers of its pages say counts, with statistics in them as well."""
    path = tmp_path / "t.parquet"
    columns = {"n": [1e8, 2e8], "d": [2e9, 2e9], "loss": [3.4, 3.3], "run": ["a" * 900, "b" * 900]}
    parquet.write_table(pa.table(columns), path, write_page_index=False, use_dictionary=False)
    assert len(read_table(path)) == 2
    monkeypatch.setattr("models.scaling.table.MAX_UNPACKED", 1500)
    footer = parquet.ParquetFile(path).metadata
    chunks = [footer.row_group(0).column(i) for i in range(4)]

    class Lies:
        """Of each column chunk: nothing is in it."""

        num_row_groups, num_columns = 1, 4

        def row_group(self, _):
            return self

        def column(self, i):
            names = ("path_in_schema", "has_dictionary_page", "dictionary_page_offset", "data_page_offset")
            known = {key: getattr(chunks[i], key) for key in (*names, "total_compressed_size")}
            return SimpleNamespace(**known, total_uncompressed_size=0)

    with pa.OSFile(str(path)) as source, pytest.raises(ValueError, match="its pages decompress to over 1,500 bytes"):
        _check_unpacked(Lies(), source, list(columns))


def test_a_sweep_reads_its_base_as_often_for_many_trials_as_for_few(tmp_path, monkeypatch):
    """A thousand lines of YAML for each of ten thousand trials would take minutes."""
    counts = []
    module = sys.modules["configs.load"]  # `configs.load` is the function
    monkeypatch.setattr(module, "parse_yaml", lambda text: counts.append(text) or parse_yaml(text))
    reads = []
    for many in (3, 30):
        (tmp_path / "sweep.yaml").write_text(
            HEAD + f"random: {{n: {many}}}\naxes: {{optim.lr: {{low: 1e-4, high: 1e-2}}}}\n"
        )
        counts.clear()
        assert len(plan(load_sweep(tmp_path / "sweep.yaml"), 4096).trials) == many
        reads.append(len(counts))
    assert reads[0] == reads[1] > 0
