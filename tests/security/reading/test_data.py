"""Raw and prepared data from strangers: read within bounds, or refused by name; never a crash, a hang or a bomb."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_data import MIB, muster, parquet_bombs, text_bombs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from second_user import as_second_user, let_in, needs_second_user

from configs import ConfigError
from configs.sections.data import DataConfig, LimitsConfig, PrepareConfig
from trainer.data.default import ensure_prepared
from trainer.data.manifest import MANIFEST, Manifest, Split, SplitStats, read_manifest, write_manifest
from trainer.data.prepare import encode
from trainer.data.prepare.encode import Encoded
from trainer.data.prepare.prepare import prepare
from trainer.data.prepare.shard_writer import SplitWriter
from trainer.data.read.reader import Dataset
from trainer.data.read.shards import DataError
from trainer.data.show import inspect
from trainer.data.sources import find
from trainer.data.sources.parquet import ParquetProcess

SMALL = PrepareConfig(tokenizer="bytes", held_out=0.0, row_group_tokens=1000)
quick = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def refusals(folder: Path) -> dict[str, str]:
    """The last reason of each file that was refused."""
    lines = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
    return {Path(line["path"]).name: line["reason"] for line in lines}


def go(inputs, out: Path, config: PrepareConfig = SMALL, **options) -> Manifest:
    return prepare(inputs, out, config, **{"workers": 1, "progress": False} | options)


# Raw files.


@pytest.mark.slow
def test_bombs_are_refused_by_name_and_the_rest_goes_on(tmp_path):
    (bombs := tmp_path / "bombs").mkdir()
    text_bombs(bombs)
    parquet_bombs(bombs)
    files = sorted(path.name for path in bombs.iterdir())
    assert all((bombs / name).stat().st_size < MIB // 8 for name in files)
    (bombs / "good.txt").write_text("a good document")
    ended = muster("data", "prepare", bombs, "--out", tmp_path / "out", "--tokenizer", "bytes", "--workers", 2)
    assert ended.code == 0, ended.said
    reasons = refusals(tmp_path / "out")
    assert sorted(reasons) == files
    assert {name for name, why in reasons.items() if why != "expands beyond the limit"} <= {"prefix.parquet"}
    assert ended.peak < 700, "four processes, each with pyarrow and numpy"


@pytest.mark.slow
def test_a_bomb_alone_is_one_message(tmp_path):
    parquet_bombs(tmp_path)
    ended = muster("data", "prepare", tmp_path / "nulls.parquet", "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert ended.code == 2
    assert len(ended.said.strip().splitlines()) <= 3
    assert "nulls.parquet" in ended.said
    assert "--limit expansion=N" in ended.said
    assert not (tmp_path / "out").exists()


def test_limits_are_raised_by_keys(tmp_path):
    pq.write_table(pa.table({"text": ["\0" * 20 * MIB]}), tmp_path / "zeros.parquet", compression="zstd")
    with pytest.raises(ConfigError, match="expands beyond the limit"):
        go([tmp_path / "zeros.parquet"], tmp_path / "out")
    made = go([tmp_path / "zeros.parquet"], tmp_path / "out", limits=LimitsConfig(expansion=100_000))
    assert made.splits["train"].bytes == 20 * MIB
    with pytest.raises(ConfigError, match="limits changed"):
        go([tmp_path / "zeros.parquet"], tmp_path / "out")


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz"])
def test_a_sparse_file(tmp_path, ending):
    with open(tmp_path / f"sparse.{ending}", "wb") as file:
        file.truncate(1 << 40)
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= 1 << 40:
            pytest.skip("this file system does not tell of holes")
    (tmp_path / "good.txt").write_text("good")
    go([tmp_path], tmp_path / "out")
    assert refusals(tmp_path / "out")[f"sparse.{ending}"] in ("not text", "damaged compressed file")


def test_strict_makes_a_bomb_an_error(tmp_path):
    text_bombs(tmp_path)
    with pytest.raises(ConfigError, match=r"--strict: .*blank\.jsonl\.zst.*expands beyond the limit"):
        go([tmp_path / "blank.jsonl.zst"], tmp_path / "out", strict=True)


@pytest.mark.slow
def test_a_dictionary_that_names_one_text_a_million_times_is_read_one_by_one(tmp_path):
    """What it unpacks to stays within its budget, but 64 rows at once would not fit into the memory."""
    named = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20, np.int32)), pa.array(["x" * (2 * MIB)]))
    pq.write_table(pa.table({"text": named}), tmp_path / "d.parquet", compression="zstd")
    limits = LimitsConfig(expansion=10**6, memory=64)
    assert go([tmp_path / "d.parquet"], tmp_path / "out", limits=limits).splits["train"].documents == 20


def test_many_values_in_one_json_object(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "RECORD_VALUES", 1000)
    texts = [{"text": "[,{" * 1000}, {"text": "good", "extra": [[]] * 2000}, {"text": 'quo"te\\' * 900}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    made = go([tmp_path / "x.jsonl"], tmp_path / "out")
    assert made.refused == {"too many values": 1}
    assert made.splits["train"].documents == 2


@pytest.mark.parametrize("damage", ["column", "rows", "gone"])
def test_odd_parquet_files(tmp_path, damage):
    path = tmp_path / "x.parquet"
    if damage == "column":
        pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    elif damage == "rows":
        pq.write_table(pa.table({"text": ["a"] * 10}), path)
        path.write_bytes(path.read_bytes().replace(b"PAR1", b"PAR0"))
    else:
        path.write_bytes(b"PAR1" + (1 << 31).to_bytes(4, "little") + b"PAR1")
    reason = "ambiguous column" if damage == "column" else "damaged Parquet file"
    with pytest.raises(ConfigError, match=rf"x\.parquet.*{reason}"):
        go([path], tmp_path / "out")


@pytest.fixture(scope="module")
def process():
    process = ParquetProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def parquet_bytes(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("whole")
    texts = [f"text {i} " * (i % 7) for i in range(200)]
    kinds = [{"use_dictionary": False}, {}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}]
    for number, kind in enumerate(kinds):
        pq.write_table(pa.table({"text": texts}), folder / f"{number}", compression="zstd", row_group_size=50, **kind)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@settings(quick, max_examples=300)
@given(which=st.integers(0, 2), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_any_damage_to_parquet_is_rows_and_one_refusal(process, parquet_bytes, tmp_path, which, flips):
    data = bytearray(parquet_bytes[which])
    for share, bits in flips:
        data[int(share * (len(data) - 1))] ^= bits
    (tmp_path / "x.parquet").write_bytes(data)
    rows = list(process.rows(str(tmp_path / "x.parquet"), "text", 1 << 24, 1 << 26, 128 * MIB, 1))
    assert rows
    bad = [row for row in rows if row.data is None and row.detail != "null"]
    assert bad == [row for row in rows[-1:] if row in bad]
    assert all(row.reason for row in bad)


def test_a_reader_that_dies_costs_one_file(tmp_path, process):
    good = tmp_path / "good.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), good)

    def rows(path):
        return list(process.rows(str(path), "text", 1 << 24, 1 << 26, 128 * MIB, 1))

    assert [row.data for row in rows(good)] == [b"a", b"b"]
    os.kill(process._child._process.pid, 9)
    [row] = rows(good)
    assert (row.reason, row.data) == ("cannot be read", None)
    assert "SIGKILL" in row.detail
    assert [row.data for row in rows(good)] == [b"a", b"b"]


def test_a_file_that_is_left_in_the_middle_does_not_show_in_the_next(tmp_path, process):
    for name in "ab":
        pq.write_table(pa.table({"text": [name * 1000] * 5000}), tmp_path / name)

    def rows(name):
        return process.rows(str(tmp_path / name), "text", 1 << 24, 1 << 26, 128 * MIB, 1)

    assert next(rows("a")).data == b"a" * 1000
    assert {row.data for row in rows("b")} == {b"b" * 1000}


# Folders.


def test_links_in_circles_pipes_and_devices(tmp_path):
    (tmp_path / "in" / "a" / "b").mkdir(parents=True)
    (tmp_path / "in" / "x.txt").write_text("one")
    (tmp_path / "in" / "a" / "b" / "y.txt").write_text("two")
    for number in range(12):  # what follows links without looking back meets 12^40 paths
        (tmp_path / "in" / "a" / f"loop{number}").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    (tmp_path / "in" / "zero.txt").symlink_to("/dev/zero")
    for number, given_ in enumerate(["in", "in/**", "in/**/*.txt"]):
        made = go([str(tmp_path / given_)], tmp_path / f"out{number}")
        assert made.splits["train"].documents == 2, given_
        assert refusals(tmp_path / f"out{number}") == dict.fromkeys(
            ["self.txt", "pipe.txt", "zero.txt"], "unreadable file"
        )
    assert [os.path.basename(file.path) for file in find.find_inputs([f"{tmp_path}/in/*/../x.txt"])] == ["x.txt"]


def test_a_pipe_that_is_named_is_one_message(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        go([tmp_path / "pipe.txt"], tmp_path / "out")


def test_globs_find_what_glob_finds(tmp_path, monkeypatch):
    import glob

    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.md", ".h/i.txt", "b/.j/k.txt", "b/d/[x]/l.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z").symlink_to(tmp_path / "b" / "d")
    monkeypatch.chdir(tmp_path)
    for root in ("", f"{tmp_path}/"):
        for pattern in ("**/*.txt", "b/**/*.txt", "*/**/*.txt", "**/d/**/*.txt", "**/*.md", "*.txt", "**/d/*"):
            found = {os.path.realpath(path) for path in find._matches(root + pattern, set())}
            assert found == {os.path.realpath(path) for path in glob.glob(root + pattern, recursive=True)}, pattern
            assert all(path.startswith(root) for path in find._matches(root + pattern, set()))


def test_a_tree_deeper_than_the_stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Path("x.txt").write_text("deep")
    os.chdir(tmp_path)
    try:
        assert [os.path.basename(file.path) for file in find.find_inputs(["d"])] == ["x.txt"]
    finally:
        subprocess.run(["rm", "-rf", "d"], check=True)  # shutil's own is as deep as the tree


@needs_second_user
def test_what_may_not_be_read_is_refused_by_name(tmp_path):
    (let_in(tmp_path) / "in" / "shut").mkdir(parents=True)
    (tmp_path / "in" / "good.txt").write_text("good")
    (tmp_path / "in" / "bad.txt").write_text("bad")
    (tmp_path / "in").chmod(0o755)
    (tmp_path / "in" / "good.txt").chmod(0o644)
    (tmp_path / "in" / "bad.txt").chmod(0)
    (tmp_path / "in" / "shut").chmod(0)
    code = (
        "import sys; from configs.sections.data import LimitsConfig\n"
        "from trainer.data.sources.find import find_inputs\n"
        "from trainer.data.sources.read import Reader\n"
        "reader = Reader('text', LimitsConfig())\n"
        "for file in find_inputs([sys.argv[1]]):\n"
        "    print(file.path.rpartition('/')[2], *(getattr(item, 'reason', 'read') for _, item in reader.read(file)))"
    )
    imports = ["numpy", "pyarrow.parquet", "trainer.data.sources.read", "encodings.idna"]
    done = as_second_user(code, tmp_path / "in", imports=imports)
    assert done.stdout == "bad.txt unreadable file\ngood.txt read\nshut unreadable file\n", done.stderr


# Prepared folders.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"text {number} " * 100)
    go([folder / f"{number}.txt" for number in range(20)], folder / "out", SMALL.model_copy(update={"held_out": 0.3}))
    return folder / "out"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def change(folder: Path, **parts) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def paths_of(tree, before=()):
    """Every place in a tree of JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from paths_of(value, (*before, key))


ODD = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=5),
    st.builds(list), st.builds(dict), st.builds(lambda: [[] for _ in range(100)]),
    st.sampled_from([-1, 0, 1, 2, 63, 256, 257, 65536, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 1e308]),
    st.sampled_from(["/etc/passwd", "../x", "..", ".", "", "a/b", "\0", "manifest.json", "tokenizer.json", "9" * 5000]),
)  # fmt: skip


def refusal(folder: Path, split: Split) -> str:
    """Why a split cannot be read; empty where it can."""
    try:
        dataset = Dataset(DataConfig(path=str(folder)), 64, 0, split)
        assert dataset.sequence(0)["input_ids"].max() < dataset.vocab_size <= 1 << 24
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


@settings(quick, max_examples=250)
@given(data=st.data())
def test_any_manifest_is_read_or_refused_in_one_message(prepared, tmp_path_factory, data):
    tree = json.loads((prepared / MANIFEST).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *above, key = data.draw(st.sampled_from(list(paths_of(tree))))
        at = tree
        for step in above:
            at = at[step]
        action = data.draw(st.sampled_from(["set", "set", "remove", "double"]))
        if action == "set":
            at[key] = data.draw(ODD)
        elif action == "remove":
            del at[key]
        elif isinstance(at, list):
            at.append(at[key])
        else:
            at[f"{key}x"] = at[key]
    folder = tmp_path_factory.mktemp("manifest")
    for path in prepared.iterdir():
        if path.name != MANIFEST:
            (folder / path.name).symlink_to(path)
    (folder / MANIFEST).write_text(json.dumps(tree))
    for split in ("train", "held_out"):
        message = refusal(folder, split)
        assert len(message.splitlines()) <= 3
        assert len(message) < 1000


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"1", b"[" * 10**6, b'{"a":' * 10**6, b"\xff\xfe", b'{"format": NaN}', b"1" * 10**6, b"{}"],
)
def test_what_is_no_manifest(copy, text):
    (copy / MANIFEST).write_bytes(text)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        read_manifest(copy)


def test_a_manifest_that_is_no_file(copy, monkeypatch):
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    with pytest.raises(ConfigError, match="not prepared data"):
        read_manifest(copy)
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="not prepared data"):
        read_manifest(copy)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="does not exist"):
            read_manifest(tmp := str(copy / name))
        assert tmp
    monkeypatch.setattr("trainer.data.manifest.MANIFEST_BYTES", 100)
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).write_text(" " * 101)
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        read_manifest(copy)


def test_shards_of_a_manifest_are_files_beside_it_and_counted_once(copy):
    shards = json.loads((copy / MANIFEST).read_text())["shards"]
    for file in ("../x.parquet", "/etc/passwd", "..", "a/b", ""):
        change(copy, shards=[shards[0] | {"file": file}, *shards[1:]])
        with pytest.raises(ConfigError, match=r"damaged .*(outside its folder|add up)"):
            read_manifest(copy)
    change(copy, shards=[shards[0], *shards])
    with pytest.raises(ConfigError, match="two shards have the same file"):
        read_manifest(copy)
    change(copy, shards=shards)
    path = copy / shards[0]["file"]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is missing"):
        Dataset(DataConfig(path=str(copy)), 64, 0)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(np.zeros(5000, np.int64)),
        pa.array([[1, 2]] * 5000, pa.list_(pa.uint16())),
        pa.array([1, None] * 2500, pa.uint16()),
        pa.array(["a"] * 5000),
        pa.array(np.zeros(5000, np.float32)),
    ],
    ids=lambda column: str(column.type),
)
def test_shards_of_other_columns(copy, column):
    tree = json.loads((copy / MANIFEST).read_text())
    shard = next(each for each in tree["shards"] if each["split"] == "train")
    pq.write_table(pa.table({"tokens": column}), copy / shard["file"], row_group_size=1000)
    shard |= {"rows": 5000, "tokens": 5000, "row_groups": 5, "bytes": (copy / shard["file"]).stat().st_size}
    tree["splits"]["train"]["tokens"] = 5000
    (copy / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"has columns .*, not tokens of uint16"):
        Dataset(DataConfig(path=str(copy)), 64, 0)


def zeros(folder: Path, like: Path, group: int, groups: int) -> None:
    """Prepared data of nothing but zeros: a hundred million of them take 20 KB."""
    folder.mkdir()
    shutil.copy(like / "tokenizer.json", folder)
    writer = SplitWriter(folder, "train", "uint16", group, 257)
    for _ in range(groups):
        writer.add(Encoded(np.zeros(group, np.uint16)))
    shards, found = writer.close(), read_manifest(like)
    nothing = SplitStats(documents=0, bytes=0, characters=0, tokens=0, entropy=0.0)
    splits = {"train": writer.stats(), "held_out": nothing}
    prepared = found.prepare.model_copy(update={"row_group_tokens": group})
    write_manifest(folder, found.model_copy(update={"shards": shards, "splits": splits, "prepare": prepared}))


def test_prepared_data_that_unpack_to_far_more_than_they_are(prepared, tmp_path):
    zeros(tmp_path / "z", prepared, 1 << 20, 80)
    size = sum(path.stat().st_size for path in (tmp_path / "z").iterdir())
    assert size < MIB
    with pytest.raises(ConfigError, match=r"takes 160 MiB.*\n.*data\.limits\.memory=160"):
        Dataset(DataConfig(path=str(tmp_path / "z")), 64, 0)
    raised = DataConfig(path=str(tmp_path / "z"), limits=LimitsConfig(memory=160))
    assert Dataset(raised, 64, 0).sequence(0)["input_ids"].max() == 0


def test_a_page_that_says_it_is_huge_is_not_unpacked(copy):
    path = copy / read_manifest(copy).of("train")[0].file
    at = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    assert data[at : at + 3] == b"\x15\x00\x15"  # the kind of the page, then its unpacked size
    whole, end = bytes(data), at + 3
    while data[end] & 128:
        end += 1
    size = len(whole[at + 3 : end + 1])
    data[at + 3 : end + 1] = b"\xff" * 4 + b"\x0f"
    # The longer number takes room of what follows it, which is damage enough; that size is what is seen first.
    del data[end + 1 + 5 - size : end + 1 + 2 * (5 - size)]
    path.write_bytes(data)
    assert len(data) == len(whole)
    dataset = Dataset(DataConfig(path=str(copy)), 64, 0)
    index = next(i for i in range(len(dataset)) if dataset.locate(i).row_group == 2)
    with pytest.raises(DataError, match="row group 2") as caught:
        dataset.sequence(index)
    assert caught.value.damaged


def test_a_footer_larger_than_its_row_groups_is_not_read(copy):
    tree = json.loads((copy / MANIFEST).read_text())
    shard = next(each for each in tree["shards"] if each["split"] == "train")
    path = copy / shard["file"]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"x": "y" * MIB}), path, row_group_size=1000)
    shard["bytes"] = path.stat().st_size
    (copy / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="a footer of"):
        Dataset(DataConfig(path=str(copy)), 64, 0)


def test_the_start_of_a_run_says_it_in_one_message(copy):
    from configs import from_dict

    change(copy, dtype="int8")
    with pytest.raises(ConfigError, match="damaged"):
        ensure_prepared(from_dict({"data": {"path": str(copy)}}))


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00000.parquet"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: None])
def test_what_is_no_file_is_not_read_to_its_end(prepared, tmp_path, name, make):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    path = next(folder.rglob(name))
    path.unlink()
    make(path)
    assert inspect(folder, verify=True)["problems"] == [f"{path} is missing, or is not a file"]
