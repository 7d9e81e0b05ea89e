"""JSON is recognised by its first bytes, however long its first record, and however it is compressed or named."""

import gzip
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_inputs import LINES, ROWS, TEXTS, detail, read

from trainer.data.sources import formats

LONG = [{"text": f"{number} " + "word " * 2000} for number in range(4)]
HUGE = [{"text": f"{number} " + "word " * 60_000} for number in range(3)]
NAMES = [
    "a.zst",
    "a.txt.zst",
    "a.json.zst",
    "a.ndjson.zstd",
    "a.jsonl.zst.part",
    "a.gz",
    "a",
    "a.txt",
    "part-00000.out",
]


def lines(rows: list[dict], **options) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def packed(name: str, data: bytes) -> bytes:
    return zstandard.compress(data) if ".zst" in name else gzip.compress(data) if ".gz" in name else data


@pytest.mark.parametrize("rows", [LONG, HUGE], ids=["long", "huge"])
@pytest.mark.parametrize("name", NAMES)
def test_a_long_first_record(tmp_path: Path, name: str, rows: list[dict]):
    texts = [row["text"] for row in rows]
    for data in (lines(rows), json.dumps(rows).encode(), json.dumps(rows, indent=1).encode(), lines(rows, indent=1)):
        (tmp_path / name).write_bytes(packed(name, data))
        assert read(tmp_path / name) == (texts, []), data[:40]


def test_an_array_over_several_lines_named_jsonl(tmp_path: Path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json.dumps(LONG, indent=1).encode()))
    assert read(tmp_path / "a.jsonl.zst") == ([row["text"] for row in LONG], [])


def test_a_bad_line_in_a_compressed_file_loses_only_itself(tmp_path: Path):
    bad = lines(LONG).splitlines(keepends=True)
    bad[1] = b'{"text": "broken\n'
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(b"".join(bad)))
    texts, refused = read(tmp_path / "a.json.zst")
    assert texts == [LONG[number]["text"] for number in (0, 2, 3)]
    assert refused == [("a.json.zst", "line 2", "malformed JSON")]


def test_a_small_first_member(tmp_path: Path):
    for name, data in {"a.txt.gz": LINES, "a.csv.gz": b"id;text\n1;a\n"}.items():
        (tmp_path / name).write_bytes(gzip.compress(data[:5]) + gzip.compress(data[5:]))
    assert read(tmp_path / "a.txt.gz") == (TEXTS, [])
    assert read(tmp_path / "a.csv.gz") == (["a"], [])


WITHOUT_KEY = {
    "lines": (b'{"content": "a"}\n{"content": "b"}\n', [], ["missing key"] * 2),
    "array": (b'[{"content": "a"}]', [], ["missing key"]),
    "single": (b'{"content": "a"}', [], ["missing key"]),
    "first": (b'{"version": 1}\n{"text": "b"}\n', ["b"], ["missing key"]),
    "null": (b'{"text": null}\n{"text": "b"}\n', ["b"], ["not text"]),
    "cut": (b'[{"text": "a"}, {"text": "b"}, {"te', ["a", "b"], ["malformed JSON"]),
    "cut in the first": (b'{"text": "a', [], ["malformed JSON"]),
    "broken": (b'{"text": "a"}\n{"text": "b}\n{"text": "c"}\n', ["a", "c"], ["malformed JSON"]),
}


@pytest.mark.parametrize("case", WITHOUT_KEY)
@pytest.mark.parametrize("name", ["a", "a.txt", "a.txt.gz"])
def test_json_without_the_key_is_refused(tmp_path: Path, name: str, case: str):
    data, texts, reasons = WITHOUT_KEY[case]
    (tmp_path / name).write_bytes(packed(name, data))
    found, refused = read(tmp_path / name)
    assert found == texts
    assert [reason for _, _, reason in refused] == reasons


PROSE = {
    "a.txt": '{"text": "an example of JSON lines"}\nThis is prose that goes on.\nMore.\n',
    "b.txt": '{"text": "one"}\n{"text": "two"}\nThis is prose.\nIt goes on.\nAnd on.\n',
    "c.py": '{"a": 1}\nprint(1)\n',
    "d.ipynb": '{\n "cells": []\n}',
    "e": "{ int x; }\n",
    "f.txt": "Look:\n" + '{"text": "one"}\n' * 20,
    "g.txt": '{"quoted", says he}\n',
}


@pytest.mark.parametrize("name", PROSE)
def test_text_that_begins_like_json_stays_text(tmp_path: Path, name: str):
    (tmp_path / name).write_text(PROSE[name])
    assert read(tmp_path / name) == ([PROSE[name]], [])


@pytest.mark.parametrize("coding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_utf16_and_utf32_are_refused_and_named(tmp_path: Path, name: str, coding: str):
    rows = [{"text": f"价格 {number} ok"} for number in range(9)]
    text = "id,text\n1,plain words\n" if name == "a.csv" else lines(rows, ensure_ascii=False).decode()
    (tmp_path / name).write_bytes(packed(name, text.encode(coding)))
    texts, [(_, _, reason)] = read(tmp_path / name)
    assert (texts, reason) == ([], "not text")
    assert detail(tmp_path / name).startswith("UTF-16 text" if "16" in coding else "UTF-32 text")


def test_a_utf16_line_is_not_guessed(tmp_path: Path):
    """json.loads would take it for UTF-16, and the next line's high bytes for its own."""
    (tmp_path / "a.jsonl").write_bytes(LINES + '{"text": "no"}'.encode("utf-16-le") + b"\n")
    texts, refused = read(tmp_path / "a.jsonl")
    assert (texts, refused) == (TEXTS, [("a.jsonl", "line 6", "malformed JSON")])


def test_an_old_tar_archive_is_refused(tmp_path: Path):
    header = bytearray(512)
    header[:5], header[100:107], header[124:135], header[148:156] = b"a.txt", b"0000644", b"00000000005", b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "a.txt").write_bytes(bytes(header) + b"hello".ljust(512, b"\0"))
    assert read(tmp_path / "a.txt") == ([], [("a.txt", "", "not text")])
    assert detail(tmp_path / "a.txt") == "a tar archive"


def test_content_overrides_the_extension_of_a_compressed_file(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(LINES)
    (tmp_path / "b.jsonl.bz2").write_bytes(zstandard.compress(LINES))
    for name in ("c.parquet", "f.csv", "g.tsv"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    for name in ("d.parquet.zst", "e.jsonl"):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / name)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == (TEXTS, []), path.name


def test_double_compression_is_reported(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(gzip.compress(LINES)))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(gzip.compress(b"a text")))
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == ([], [(path.name, "", "not text")])
        assert detail(path) == "compressed twice; decompress it once"


SEPARATED = {
    "commas": b"".join(line + b",\n" for line in LINES.splitlines()),
    "marks": b"".join(b"\x1e" + line + b"\n" for line in LINES.splitlines()),
    "byte-order marks": b"\xef\xbb\xbf" + lines(ROWS[:2]) + b"\xef\xbb\xbf" + lines(ROWS[2:]),
    "arrays": json.dumps(ROWS[:2]).encode() + b"\xef\xbb\xbf\n" + json.dumps(ROWS[2:]).encode(),
    "first over one line": lines(ROWS[:2]) + lines(ROWS[2:], indent=1),
    "an array of lines": b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n",
    "NUL": LINES[:-1] + b"\0" * 9,
    "a long number": b'{"text": "' + b"a" * 9 + b'", "n": 1' + b"0" * 5000 + b"}\n",
}


@pytest.mark.parametrize("case", SEPARATED)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_separators_between_records(tmp_path: Path, name: str, case: str):
    (tmp_path / name).write_bytes(SEPARATED[case])
    assert read(tmp_path / name) == (["a" * 9] if "number" in case else TEXTS, [])


def test_a_duplicate_key_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one", "text": "two"}\n{"a": 1, "a": 2, "text": "b"}\n{"text": "\\"text\\"", "m": {"text": "no"}}\n'
    )
    assert read(tmp_path / "a.jsonl") == (["b", '"text"'], [("a.jsonl", "line 1", "ambiguous key")])


def test_the_intended_key_is_suggested(tmp_path: Path):
    (tmp_path / "a.csv").write_text("id,Text\n1,a\n")
    assert detail(tmp_path / "a.csv") == "no 'text' among id, Text; did you mean --text-key Text?"


def test_small_things(tmp_path: Path):
    """A byte-order mark is no token, blank lines no data; an exact length is not cut; nulls in a list are skipped."""
    files = {
        "a.txt": ("\ufeffhello\n", ["hello\n"], []),
        "b.jsonl": ("  \n\n", [], ["empty file"]),
        "c.txt": ("line\n" * 52428 + "abcd", ["line\n" * 52428 + "abcd"], []),
        "d.jsonl": ('{"text": [["d"], [], null]}\n{"text": []}\n{"text": [null]}\n', ["d"], ["not text"] * 2),
        "e.txt": ("\ufeff", [], ["empty file"]),
    }
    for name, (data, texts, reasons) in files.items():
        (tmp_path / name).write_text(data)
        found, refused = read(tmp_path / name)
        assert (found, [reason for _, _, reason in refused]) == (texts, reasons), name


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (b"\x04\x22\x4d\x18", "LZ4"), (b"ORC\n\x02text", "an ORC file"), (b"FEA1\0\0\0\0", "a Feather file"),
        (b"\x80\x04\x95", "a Python pickle"), (b"{\\rtf1\\ansi", "an RTF document"),
    ],
)  # fmt: skip
def test_files_that_are_not_text_are_named(tmp_path: Path, magic: bytes, what: str):
    (tmp_path / "a.txt").write_bytes(magic + b" plain text" * 100)
    assert read(tmp_path / "a.txt") == ([], [("a.txt", "", "not text")])
    assert detail(tmp_path / "a.txt").startswith(what)


class Thing:
    pass


@pytest.mark.parametrize(
    "value", [{"text": "a"}, ["a"], OrderedDict(text="a"), Thing()], ids=["dict", "list", "ordered", "object"]
)
def test_an_ascii_pickle_is_not_text(tmp_path: Path, value: object):
    (tmp_path / "a.txt").write_bytes(pickle.dumps(value, protocol=0))
    assert read(tmp_path / "a.txt") == ([], [("a.txt", "", "not text")])
    assert detail(tmp_path / "a.txt") == "a Python pickle"


def test_a_text_that_starts_with_orc_is_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ORCS are green.\n")
    assert read(tmp_path / "a.txt") == (["ORCS are green.\n"], [])


CSV = {
    "cr.csv": (b"id,text\r1,a\r2,b\r", ["a", "b"], 0),
    "quoted.csv": (b'id,text\n1,"a\rb"\n2,c\n', ["a\rb", "c"], 0),
    "mixed.csv": (b"id,text\r\n1,a\n2,b\r3,c\n", ["a", "b", "c"], 0),
    "semicolons.csv": (b"id;text\r1;a\r", ["a"], 0),
    "torn.csv": (b'text\n"Hello" she said\nmore\nsecond line"\nok\n', ["ok"], 3),
    "one.csv": (b'text\n"Hello" she said\nok\n"more"\nlast\n', ["ok", "more", "last"], 1),
    "last.csv": (b'id,text\n1,"Hello" she said\n2,ok\n', ["ok"], 1),
    "unpaired.tsv": (b'id\ttext\n1\t"Hello\n2\tbye"\n3\tok\n', ['"Hello', 'bye"', "ok"], 0),
    "inch.tsv": (b'id\ttext\n1\t5" disk\n2\t"quoted" word\n3\t"last\n4\tok\n',
                 ['5" disk', '"quoted" word', '"last', "ok"], 0),
    "lines.tsv": (b'id\ttext\n1\t"a\nb"\n', ["a\nb"], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV)
def test_csv_as_other_tools_write_it(tmp_path: Path, name: str):
    data, texts, refusals = CSV[name]
    (tmp_path / name).write_bytes(data)
    found, refused = read(tmp_path / name)
    assert found == texts
    assert [reason for _, _, reason in refused] == ["malformed CSV"] * refusals


def test_lines_that_end_with_carriage_returns_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "RECORD_BYTES", 100)
    texts = [f"text {number} " + "a" * (number % 60) for number in range(300)]
    (tmp_path / "a.csv").write_bytes(b"\r".join([b"text", *map(str.encode, texts)]))
    assert read(tmp_path / "a.csv") == (texts, [])


def test_the_point_where_reading_json_stopped_is_reported(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS).encode() + b" no JSON " + b"x" * 2 * len(json.dumps(ROWS)))
    assert read(tmp_path / "a.json") == (TEXTS, [("a.json", "after value 5", "malformed JSON")])
    assert detail(tmp_path / "a.json").endswith("; nothing after it was read (67% of the file)")
