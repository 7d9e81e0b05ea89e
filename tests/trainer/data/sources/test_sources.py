"""Raw files are read by name and content; files that only describe a data set are not trained on."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_inputs import LINES, ROWS, TEXTS, read
from hypothesis import given, settings
from hypothesis import strategies as st
from no_hang import ends

from configs import ConfigError
from configs.sections.data import PrepareConfig
from trainer.data.prepare.prepare import prepare
from trainer.data.sources import formats
from trainer.data.sources.damage import Damaged
from trainer.data.sources.find import find_inputs
from trainer.data.sources.formats import csv_rows, json_values

quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def as_csv(rows, **options) -> bytes:
    out = io.StringIO()
    csv.writer(out, **options).writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
    return out.getvalue().encode()


ARRAY, PRETTY = json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
KINDS = {
    "c4-train.00000.json.gz": gzip.compress(LINES),
    "lines.json": LINES,
    "lines.json.zst": zstandard.compress(LINES),
    "lines.JSON": b"\xef\xbb\xbf" + LINES,
    "crlf.json": LINES.replace(b"\n", b"\r\n"),
    "array.json": ARRAY,
    "pretty.json.xz": lzma.compress(PRETTY),
    "mark.json": b"\xef\xbb\xbf\n" + PRETTY,
    "objects.json": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "a.csv": as_csv(ROWS),
    "a.csv.bz2": bz2.compress(as_csv(ROWS, lineterminator="\n")),
    "mark.csv": b"\xef\xbb\xbf" + as_csv(ROWS, quoting=csv.QUOTE_ALL),
    "spaces.csv": b"\n id, text \n" + as_csv(ROWS).partition(b"\n")[2],
    "semicolons.csv": as_csv(ROWS, delimiter=";", quoting=csv.QUOTE_ALL),
    "a.tsv": as_csv(ROWS, delimiter="\t"),
    "part-00000": LINES,
    "lines.txt.gz": gzip.compress(LINES),
    "not-said.jsonl": gzip.compress(LINES),
    "a.jl": LINES,
    "array.txt": ARRAY,
    "pretty": PRETTY,
    "array.jsonl": PRETTY,
    "objects.jsonl": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_read_as_the_type_it_is(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(KINDS[name])
    assert read(tmp_path / name) == (TEXTS, [])


def test_one_object_a_file(tmp_path: Path):
    for row in ROWS[:2]:
        (tmp_path / f"{row['id']}.json").write_text(json.dumps(row, indent=4))
    assert read(tmp_path) == (TEXTS[:2], [])


FOREIGN = {
    "words.json": (b"no JSON at all", "malformed JSON"),
    "string.json": (b'"a text"', "malformed JSON"),
    "blank.json": (b" \n\n", "empty file"),
    "empty.json": (b"[]", "empty file"),
    "texts.json": (b'["a", "b"]', "not a JSON object"),
    "columns.json": (json.dumps({"text": {"0": "a", "1": "b"}}).encode(), "not text"),
    "package.json": (b'{\n "name": "x"\n}', "missing key"),
    "header.csv": (b"id,body\n1,x\n", "missing column"),
    "twice.csv": (b"text,text\na,b\n", "ambiguous column"),
    "nothing.csv": (b"id,text\n", "empty file"),
    "x.zip": (b"PK\x03\x04" + b"text " * 100, "not text"),
    "x.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"text " * 100), "not text"),
    "data-00000-of-00001.arrow": (b"\xff\xff\xff\xff\x10\0\0\0" + b"text " * 100, "not text"),
    "crawl.warc.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\n"), "not text"),
    "wide.txt": ("wide words".encode("utf-16"), "not text"),
    "wide.jsonl": (LINES.decode().encode("utf-16"), "not text"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_without_text_are_refused_by_name(tmp_path: Path, name: str):
    data, reason = FOREIGN[name]
    (tmp_path / name).write_bytes(data)
    texts, refused = read(tmp_path / name)
    assert texts == []
    assert {(file, why) for file, _, why in refused} == {(name, reason)}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x"])
def test_nested_keys_and_lists_of_texts(tmp_path: Path, name: str):
    rows = [
        {"meta": {"text": "one"}}, {"meta.text": "two"}, {"meta": [{"text": "three"}, {"text": "four"}]},
        {"meta": {"text": ["five", None, "six"]}}, {"meta": {"text": {"en": "no"}}}, {"meta": {}}, {"meta": 7},
        {"meta": {"text": None}},
    ]  # fmt: skip
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, refused = read(tmp_path / name, text_key="meta.text")
    assert texts == ["one", "two", "three\nfour", "five\nsix"]
    assert [(where, why) for _, where, why in refused] == [
        ("line 5", "not text"), ("line 6", "missing key"), ("line 7", "not a JSON object"), ("line 8", "not text")
    ]  # fmt: skip


def test_json_not_named_as_json_stays_text(tmp_path: Path):
    """A notebook, or an object without the key, may be code to learn from."""
    for name, text in {"a.ipynb": '{\n "cells": []\n}', "b.cfg": '{"name": "x"}\n', "c.c": "{ int x; }\n"}.items():
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == ([text], [])


PACKS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}


def test_everything_before_damage_is_read(tmp_path: Path):
    rows = [{"text": f"text {number} {random.Random(number).random()}"} for number in range(5000)]
    texts = [row["text"] for row in rows]
    plain = {
        "a.json": json.dumps(rows).encode(),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "a.csv": as_csv([row | {"id": 1} for row in rows]),
    }
    for name, data in plain.items():
        for ending, pack in {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.items():
            path = tmp_path / f"{name}.{ending}"
            packed = pack(data)
            path.write_bytes(packed[: len(packed) * 3 // 4])
            found, [refused] = read(path)
            assert found == texts[: len(found)]
            assert len(found) > 1000 or ending == "bz2", "whose blocks are larger"
            assert refused[2] == "truncated compressed file"
            assert refused[1].endswith(f" {len(found)}" if found else "")
    packed = gzip.compress(b"id,text\n1,a text\n2,a text that is cut off")
    (tmp_path / "cut.csv.gz").write_bytes(packed[:-9])
    assert read(tmp_path / "cut.csv.gz")[0] == ["a text"]
    (tmp_path / "cut.json").write_bytes(plain["a.json"][:5000])
    found, [refused] = read(tmp_path / "cut.json")
    assert found == texts[: len(found)]
    assert refused == ("cut.json", f"after value {len(found)}", "malformed JSON")


def test_gzip_with_padding_or_several_members_loses_nothing(tmp_path: Path):
    half = LINES.index(b"\n") + 1
    members = gzip.compress(LINES[:half]) + gzip.compress(b"") + gzip.compress(LINES[half:])
    for name, data in {"members": members, "padded": members + b"\0" * 100_000}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
        assert read(tmp_path / f"{name}.jsonl.gz") == (TEXTS, [])
    for name, data in {"garbage": members + b"garbage", "cut": members + members[:9]}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
        texts, [(_, where, reason)] = read(tmp_path / f"{name}.jsonl.gz")
        assert (texts, where) == (TEXTS, "after line 5")
        assert "compressed file" in reason
    with open(tmp_path / "sparse.jsonl.gz", "wb") as file:
        file.write(members)
        file.truncate(1 << 40)
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= 1 << 40:
            return
    texts, [(_, _, reason)] = read(tmp_path / "sparse.jsonl.gz")
    assert (texts, reason) == (TEXTS, "expands beyond the limit")


def test_xz_that_needs_a_gigabyte_is_refused(tmp_path: Path):
    for size, expected in ((1 << 26, (TEXTS, [])), (1 << 30, ([], [("x.jsonl.xz", "", "takes too much memory")]))):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": size}]
        (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(LINES, filters=filters))
        assert read(tmp_path / "x.jsonl.xz") == expected


def long_window(data: bytes) -> bytes:
    """Compress as `zstd --ultra --long=31` does from a pipe."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd command")
def test_zstd_with_a_long_window(tmp_path: Path):
    packed = long_window(LINES)
    skippable = b"\x5a\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"12345678"
    for data in (packed, skippable + packed, packed + zstandard.compress(LINES) + skippable):
        (tmp_path / "x.jsonl.zst").write_bytes(data)
        texts, refused = read(tmp_path / "x.jsonl.zst")
        assert texts == TEXTS * (len(texts) // 5)
        assert len(texts) == (10 if data.startswith(packed) and data != packed else 5)
        assert refused == []
    many = long_window(b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(2000)))
    (tmp_path / "cut.jsonl.zst").write_bytes(many[: len(many) // 2])
    texts, [(_, where, reason)] = read(tmp_path / "cut.jsonl.zst")
    assert 500 < len(texts) < 1500
    assert (where, reason) == (f"after line {len(texts)}", "truncated compressed file")
    (tmp_path / "bad.jsonl.zst").write_bytes(many[: len(many) // 2] + b"\xff" * (len(many) // 2))
    assert read(tmp_path / "bad.jsonl.zst")[1][-1][2] == "damaged compressed file"
    (tmp_path / "second.jsonl.zst").write_bytes(zstandard.compress(LINES * 200) + packed)
    assert read(tmp_path / "second.jsonl.zst") == (TEXTS * 201, [])
    (tmp_path / "skips.jsonl.zst").write_bytes(skippable * 20 + packed)
    assert read(tmp_path / "skips.jsonl.zst") == (TEXTS, [])
    (tmp_path / "padded.jsonl.zst").write_bytes(packed + b"\0" * 1000)
    assert read(tmp_path / "padded.jsonl.zst") == (TEXTS, [])


def test_padded_or_damaged_zstd_loses_nothing(tmp_path: Path):
    packer = zstandard.ZstdCompressor(write_checksum=True)
    packed = packer.compress(LINES) + zstandard.compress(b"") + b"\x5a\x2a\x4d\x18\1\0\0\0x" + packer.compress(LINES)
    for pad in (1, 3, 512, 100_000):
        (tmp_path / "padded.jsonl.zst").write_bytes(packed + b"\0" * pad)
        assert read(tmp_path / "padded.jsonl.zst") == (TEXTS * 2, []), pad
    for rest in (b"\0\0junk", b"\0" * 9 + packed, b"junk" + b"\0" * 99):
        (tmp_path / "junk.jsonl.zst").write_bytes(packed + rest)
        texts, [(_, where, reason)] = read(tmp_path / "junk.jsonl.zst")
        assert (texts, where, reason) == (TEXTS * 2, "after line 10", "damaged compressed file")


def test_a_file_with_two_names_is_read_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").hardlink_to(tmp_path / "a.jsonl")
    assert read(tmp_path) == (TEXTS, [])
    assert read(tmp_path / "a.jsonl", tmp_path / "b.jsonl") == (TEXTS, [])


def test_a_file_name_that_is_not_utf8(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:1]}), tmp_path / "x")
    packed = {b"g\xff.gz": gzip.compress(LINES), b"z\xff.zst": long_window(LINES) + b"\0\0", b"c\xff.csv": b"text\na\n"}
    for name, data in {b"p\xff.parquet": (tmp_path / "x").read_bytes(), b"bad\xfe.txt": b"x\xff", **packed}.items():
        (folder / os.fsdecode(name)).write_bytes(data)
    made = prepare([folder], tmp_path / "out", PrepareConfig(tokenizer="bytes", held_out=0.0), workers=1)
    assert made.splits["train"].documents == 2 + (10 if shutil.which("zstd") else 5)
    [refused] = map(json.loads, (tmp_path / "out" / "refused.jsonl").read_text().splitlines())
    assert os.fsencode(refused["path"]).endswith(b"bad\xfe.txt")


def test_zstd_with_a_long_window_without_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "x.jsonl.zst").write_bytes(long_window(LINES))
    assert read(tmp_path / "x.jsonl.zst") == ([], [("x.jsonl.zst", "", "zstd window too large")])


def test_a_small_file_with_a_long_window_is_held_to_its_budget(tmp_path: Path):
    (tmp_path / "x.jsonl.zst").write_bytes(long_window(b'{"text": "' + b"a" * (48 << 20)))
    texts, [(_, _, reason)] = read(tmp_path / "x.jsonl.zst")
    assert texts == []
    assert reason in ("expands beyond the limit", "zstd window too large")


def test_a_row_that_does_not_match_the_header_is_refused_and_the_rest_read(tmp_path: Path):
    (tmp_path / "x.csv").write_bytes(
        b'id,text\n1,good\n2,not, quoted\n3,"bad" quotes\n\n4\n5,caf\xe9\n6,\n7,"good, too"\n'
    )
    texts, refused = read(tmp_path / "x.csv")
    assert texts == ["good", "good, too"]
    assert [(where, why) for _, where, why in refused] == [
        ("row 2", "malformed CSV"), ("row 3", "malformed CSV"), ("row 4", "malformed CSV"), ("row 5", "invalid UTF-8"),
        ("row 6", "empty document"),
    ]  # fmt: skip


def test_an_unclosed_quote_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "RECORD_BYTES", 1000)
    (tmp_path / "x.csv").write_bytes(b'text\ngood\n"' + b"a line\n" * 1000)
    assert read(tmp_path / "x.csv") == (["good"], [("x.csv", "after row 1", "record too long")])
    (tmp_path / "x.json").write_bytes(b'[{"text": "good"}, {"text": "' + b"a" * 300_000)
    assert read(tmp_path / "x.json") == (["good"], [("x.json", "after value 1", "record too long")])


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class Dribble(io.RawIOBase):
    """A stream that returns one byte, then two, then one ... so that every value is cut somewhere."""

    def __init__(self, data: bytes):
        self.data = io.BytesIO(data)

    def peek(self, size: int) -> bytes:
        return self.data.getvalue()

    def read(self, size: int = -1) -> bytes:
        return self.data.read(1 + self.data.tell() % 2)

    def readline(self, size: int | None = -1) -> bytes:
        return self.data.readline(size)


@quick
@given(st.lists(TREES, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_any_json_is_split_into_its_values(values, indent, array):
    options = {"indent": indent, "ensure_ascii": indent is None}
    if array:
        data = json.dumps(values, **options)
    else:
        values = [value for value in values if isinstance(value, dict)]
        data = "\n".join(json.dumps(value, **options) for value in values)
    for stream in (Dribble(data.encode()), io.BytesIO(data.encode())):
        assert [json.loads(value) for value in json_values(stream, lambda size: None)] == values


def assert_refusal(reason: str, detail: str) -> None:
    assert reason
    assert detail


@quick
@given(st.binary(max_size=60) | st.text('[]{},:" \\a\n', max_size=60).map(str.encode))
def test_any_bytes_are_values_or_one_refusal(data):
    for cut in (json_values, lambda stream, count: csv_rows(stream, "a", False, count)):
        try:
            list(cut(Dribble(data), lambda size: None))
        except Damaged as error:
            assert_refusal(*error.args)


@pytest.mark.parametrize("line", [b"\n", b'"\n', b"a\n", b',"\n'])
def test_a_small_csv_file_of_many_lines_is_held_to_its_budget(tmp_path: Path, line: bytes):
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b'text\n"' + line * ((48 << 20) // len(line))))
    with ends():
        _, refused = read(tmp_path / "x.csv.gz")
    assert refused[-1][2] == "expands beyond the limit"


def test_endless_brackets_are_refused_early():
    for data in (b"[" * (1 << 20), b'{"a":' * (1 << 18)):
        with pytest.raises(Damaged, match="nested"):
            list(json_values(io.BytesIO(data), lambda size: None))


# Folders.


def test_linked_folders_are_read_once_after_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (root / "z" / "z.txt", root / "a.txt", elsewhere / "deep" / "b.txt", elsewhere / "c.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.stem} is a text of its own")
    (elsewhere / "deep" / "around").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(root)
    (root / "again").symlink_to("z")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked2").symlink_to(elsewhere / "deep")
    (root / "file.txt").symlink_to(elsewhere / "c.txt")
    found = [os.path.relpath(file.path, root) for file in find_inputs([root])]
    assert found == ["a.txt", "file.txt", "z/z.txt", "linked/deep/b.txt"]
    texts, refused = read(root)
    assert len(texts) == 4
    assert refused == []
    for given_ in (f"{root}/**", f"{root}/**/*.txt", f"{root}/*"):
        assert sorted(read(given_)[0]) == sorted(texts), given_
    config = PrepareConfig(tokenizer="bytes")
    prepare([root], tmp_path / "out", config, workers=1)
    said = capsys.readouterr().err.replace("\n", "")
    assert f"{root}/linked -> {elsewhere}" in said
    assert "again" not in said, "through it nothing was found"
    prepare([root / "linked"], tmp_path / "out2", config, workers=1)
    assert f"{root}/linked -> " not in capsys.readouterr().err.replace("\n", ""), "it was asked for"


def test_a_link_to_a_folder_that_contains_the_input_is_refused_by_name(tmp_path: Path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "other.txt").write_text("not of the input")
    (tmp_path / "in" / "sub" / "up").symlink_to("../..")
    (tmp_path / "in" / "all").symlink_to("/")
    for given_ in ("in", "in/**", "in/**/*", "in/**/*.txt"):
        texts, refused = read(f"{tmp_path}/{given_}")
        assert texts == ["a"], given_
        assert sorted(refused) == [("all", "", "unreadable file"), ("up", "", "unreadable file")], given_


# A folder with a data set.

CARD = "---\nlicense: odc-by\ntask_categories:\n- text-generation\n---\n# A data set\n"


def names(refused: list[tuple[str, str, str]]) -> list[str]:
    return sorted(name for name, _, _ in refused)


def test_files_beside_records_are_named_and_not_trained_on(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(LINES)
    for name in ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", "CITATION.cff"):
        (tmp_path / name).write_text("about the data\n")
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"description": "text", "features": {}}}))
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x"}], "_split": None}, indent=2))
    for given_ in (tmp_path, f"{tmp_path}/**"):
        texts, refused = read(given_)
        assert texts == TEXTS
        assert names(refused) == [
            "CITATION.cff", "LICENSE", "LICENSE.txt", "NOTICE", "README.md", "dataset_infos.json", "state.json"
        ]  # fmt: skip
    assert sorted(read(tmp_path, tmp_path / "README.md")[0]) == sorted(["about the data\n", *TEXTS])
    assert read(tmp_path / "README.md") == (["about the data\n"], [])


def test_files_beside_parts_without_an_extension(tmp_path: Path):
    for name in ("README", "LICENSE", "_SUCCESS"):
        (tmp_path / name).write_text("not data")
    (tmp_path / "part-00000").write_bytes(LINES)
    texts, refused = read(tmp_path)
    assert texts == TEXTS
    assert refused == [(name, "", "not data") for name in ("LICENSE", "README", "_SUCCESS")]
    (tmp_path / "part-00000").write_text("prose of its own")
    assert len(read(tmp_path)[0]) == 4


def test_in_a_data_set_with_a_card_only_data_is_read(tmp_path: Path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "c4.py").write_text("import datasets\n")
    (tmp_path / "extra.txt").write_text("a text\n")
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(LINES))
    texts, refused = read(tmp_path)
    assert texts == [*TEXTS, "a text\n"]
    assert names(refused) == ["README.md", "c4.py"]


def test_a_readme_among_other_texts_is_read(tmp_path: Path):
    for name in ("README.md", "_main.py", "LICENSE", "_notes"):
        (tmp_path / name).write_text(f"{name}\n")
    assert read(tmp_path) == (["LICENSE\n", "README.md\n", "_main.py\n", "_notes\n"], [])
    (tmp_path / "numbers.csv").write_text("id,text\n1,good\n")
    assert read(tmp_path)[0] == ["_main.py\n", "good"]


def test_a_folder_written_by_spark(tmp_path: Path):
    folder = tmp_path / "in"
    (folder / "_temporary").mkdir(parents=True)
    for name in ("part-0.parquet", "_metadata", "_common_metadata", "_temporary/part-0.parquet"):
        pq.write_table(pa.table({"text": TEXTS}), folder / name)
    (folder / "_SUCCESS").touch()
    config = PrepareConfig(tokenizer="bytes", held_out=0.0)
    made = prepare([folder], tmp_path / "out", config, workers=1, progress=False, strict=True)
    assert (made.splits["train"].documents, made.refused) == (5, {"not data": 4})
    for name in ("README.md", "LICENSE", "main.py"):
        (folder / name).write_text("about\n")
    assert read(folder)[0] == ["about\n", *TEXTS]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "_SUCCESS").touch()
    (tmp_path / "texts" / "part-0").write_text("a text")
    prepare([tmp_path / "texts"], tmp_path / "out2", config, workers=1, progress=False, strict=True)


@pytest.mark.parametrize("out", ["", ".", "plain/x", "/proc/x/y", "bad\udcff"])
def test_an_output_folder_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text("a text")
    with pytest.raises(ConfigError, match="--out"):
        prepare(["plain"], out, PrepareConfig(tokenizer="bytes"), workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_an_empty_folder_is_reported(tmp_path: Path):
    (tmp_path / ".hidden").touch()
    with pytest.raises(ConfigError, match=r"holds no files \(names that begin with a dot are skipped\)"):
        find_inputs([tmp_path])


def test_preparing_counts_and_names_files_beside_data(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(LINES)
    (tmp_path / "in" / "README.md").write_text("about\n")
    config = PrepareConfig(tokenizer="bytes", held_out=0.0)
    made = prepare([tmp_path / "in"], tmp_path / "out", config, workers=1, progress=False)
    assert made.refused == {"not data": 1}
    assert made.splits["train"].documents == 5
    with pytest.raises(ConfigError, match=r"README\.md: not data: .* by name"):
        prepare([tmp_path / "in"], tmp_path / "strict", config, workers=1, progress=False, strict=True)
