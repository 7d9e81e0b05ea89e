"""Preparation: every document arrives whole and once; what is refused is counted and named; the commit is atomic."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_inputs import SMALL, make_text

from configs import ConfigError
from configs.sections.data import PrepareConfig
from trainer.data.manifest import MANIFEST, REFUSED, SPLITS, TOKENIZER, Manifest, Split, read_manifest
from trainer.data.prepare.prepare import prepare, summary
from trainer.data.prepare.splitting import Splitting
from trainer.data.sources import read
from trainer.data.sources.find import find_inputs
from trainer.data.sources.read import cut
from trainer.data.tokenizer.tokenizer import byte_tokenizer
from trainer.data.tokenizer.tokenizer_process import load


def tokens_of(folder: Path, split: Split) -> np.ndarray:
    manifest = read_manifest(folder)
    parts = [
        pq.read_table(folder / shard.file, page_checksum_verification=True)["tokens"].to_numpy()
        for shard in manifest.of(split)
    ]
    return np.concatenate(parts) if parts else np.empty(0, manifest.dtype)


def documents_of(folder: Path, split: Split) -> list[str]:
    """Decoded documents of a split, in order."""
    tokenizer, eos = load(folder / TOKENIZER), read_manifest(folder).tokenizer.eos_id
    tokens = tokens_of(folder, split)
    ends = np.flatnonzero(tokens == eos)
    starts = [0, *(ends[:-1] + 1)]
    assert len(ends) == 0 or ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def refused_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / REFUSED).read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def go(inputs, out: Path, config: PrepareConfig = SMALL, **options) -> Manifest:
    return prepare(inputs, out, config, **{"workers": 1, "progress": False} | options)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_comes_back(raw: Path, texts: dict[str, str], tmp_path: Path, tokenizer: str):
    config = SMALL.model_copy(update={"tokenizer": tokenizer, "vocab_size": 400})
    manifest = go([raw], tmp_path / "out", config)
    encoder = load(tmp_path / "out" / TOKENIZER)
    for split in SPLITS:
        expected = [text for text in texts.values() if Splitting(0.2, 0)(text.encode())[0][0] == split]
        assert documents_of(tmp_path / "out", split) == expected
        ids = [token for text in expected for token in (*encoder.encode(text).ids, manifest.tokenizer.eos_id)]
        tokens = tokens_of(tmp_path / "out", split)
        assert tokens.tolist() == ids
        stats = manifest.splits[split]
        assert (stats.documents, stats.tokens) == (len(expected), len(tokens))
        assert stats.characters == sum(map(len, expected))
        assert stats.bytes == sum(len(text.encode()) for text in expected)
        shares = [count / len(tokens) for count in Counter(tokens.tolist()).values()]
        assert stats.entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert len(documents_of(tmp_path / "out", "held_out")) > 3
    assert not manifest.refused


def test_result_does_not_depend_on_workers(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.prepare.prepare.BATCH_BYTES", 5000)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    config = SMALL.model_copy(update={"tokenizer": "bpe", "vocab_size": 300})
    for workers in (1, 3):
        go([raw, tmp_path / "bad.txt"], tmp_path / f"out{workers}", config, workers=workers)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out3")


def test_shards_hold_full_row_groups_and_their_digests(prepared: Path, manifest: Manifest):
    from trainer.data.show import inspect

    groups = []
    for shard in manifest.of("train"):
        metadata = pq.ParquetFile(prepared / shard.file).metadata
        groups += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert metadata.num_rows == shard.rows == shard.tokens
        assert (prepared / shard.file).stat().st_size == shard.bytes
    assert set(groups[:-1]) == {1000}
    assert 0 < groups[-1] <= 1000
    found = inspect(prepared, verify=True, examples=2, seq_len=64)
    assert found["problems"] == []
    assert found["splits"]["train"]["row_groups"] == len(groups)
    assert len(found["examples"]) == 2
    json.dumps(found)


def test_many_shards(raw: Path, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.prepare.shard_writer.GROUPS_PER_SHARD", 3)
    manifest = go([raw], tmp_path / "out")
    assert len(manifest.of("train")) > 3
    assert [shard.row_groups for shard in manifest.of("train")][:-1] == [3] * (len(manifest.of("train")) - 1)
    assert (tokens_of(tmp_path / "out", "train") == tokens_of(prepared, "train")).all()


def test_all_kinds_of_input_give_the_same_documents(texts: dict[str, str], raw: Path, tmp_path: Path):
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts.values())).encode()
    half = len(lines) // 2
    table = pa.table({"id": range(len(texts)), "body": list(texts.values())})
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    pq.write_table(
        table.set_column(1, "body", table["body"].dictionary_encode()), tmp_path / "e.parquet", row_group_size=13
    )
    nested = tmp_path / "f" / "deeper"
    nested.mkdir(parents=True)
    for name, text in texts.items():
        (nested / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    expected = [text for text in texts.values() if Splitting(0.2, 0)(text.encode())[0][0] == "train"]
    for given in ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.parquet", "f", "f/**/*.gz"]:
        manifest = go([str(tmp_path / given)], out := tmp_path / "out" / given.replace("/", "-"), text_key="body")
        assert documents_of(out, "train") == expected, given
        assert not manifest.refused, given


def test_inputs_are_found_once_and_in_order(tmp_path: Path):
    for name in ("b.txt", "a.txt", ".hidden", "sub/c.py", "sub/__pycache__/x.py", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [os.path.relpath(file.path, tmp_path) for file in find_inputs([tmp_path, tmp_path / "a.txt"])]
    assert names == ["a.txt", "b.txt", "sub/c.py"]
    names = [os.path.relpath(file.path, tmp_path) for file in find_inputs([f"{tmp_path}/**/*.py", f"{tmp_path}/*.txt"])]
    assert names == ["sub/__pycache__/x.py", "sub/c.py", "a.txt", "b.txt"]
    with pytest.raises(ConfigError, match="no-such"):
        find_inputs([tmp_path / "no-such-*"])


def test_stdlib_is_python_source_of_this_python_only():
    paths = [file.path for file in find_inputs(["stdlib"])]
    assert len(paths) > 500
    assert all(path.endswith(".py") for path in paths)
    assert any(path.endswith(os.sep + "argparse.py") for path in paths)
    assert not any(part in path for path in paths for part in ("site-packages", "dist-packages", "__pycache__"))


def write_bad_inputs(folder: Path) -> dict[str, tuple[str, str]]:
    """Files with every kind of damage; {name: (reason, where)}."""
    good = json.dumps({"text": "good line"}).encode() + b"\n"
    whole = gzip.compress(os.urandom(200_000).hex().encode() + b"\n")
    table = pa.table({"other": ["x"], "number": [1]})
    pq.write_table(table, folder / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "type.parquet")
    pq.write_table(pa.table({"text": ["good row", None]}), folder / "null.parquet")
    pq.write_table(pa.table({"text": ["cut"] * 100}), folder / "cut.parquet")
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-20])
    invalid = pa.StringArray.from_buffers(
        2, pa.array([0, 2, 6], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfegood")
    )
    pq.write_table(pa.table({"text": invalid}), folder / "utf8.parquet")
    (folder / "utf8.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (folder / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.txt.zst").write_bytes(zstandard.compress(os.urandom(5000).hex().encode())[:-50])
    (folder / "not.txt.gz").write_bytes(b"this is not gzip")
    (folder / "json.jsonl").write_bytes(good + b'{"text": \n' + good)
    (folder / "key.jsonl").write_bytes(good + b'{"body": "x"}\n')
    (folder / "list.jsonl").write_bytes(b'["text"]\n' + good)
    (folder / "value.jsonl").write_bytes(b'{"text": 3}\n\n' + good)
    (folder / "blank.jsonl").write_bytes(good + b'{"text": ""}\n')
    (folder / "utf8.jsonl").write_bytes(good + good + b'{"text": "\xff"}\n')
    (folder / "lone.jsonl").write_bytes(good + b'{"text": "\\ud800"}\n')
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    return {
        "column.parquet": ("missing column", ""),
        "type.parquet": ("not text", ""),
        "null.parquet": ("not text", "row 2"),
        "cut.parquet": ("damaged Parquet file", ""),
        "utf8.parquet": ("invalid UTF-8", "row 1"),
        "utf8.txt": ("invalid UTF-8", ""),
        "empty.txt": ("empty file", ""),
        "empty.txt.gz": ("empty file", ""),
        "cut.txt.gz": ("truncated compressed file", ""),
        "cut.txt.zst": ("truncated compressed file", ""),
        "not.txt.gz": ("damaged compressed file", ""),
        "json.jsonl": ("malformed JSON", "line 2"),
        "key.jsonl": ("missing key", "line 2"),
        "list.jsonl": ("not a JSON object", "line 1"),
        "value.jsonl": ("not text", "line 1"),
        "blank.jsonl": ("empty document", "line 2"),
        "utf8.jsonl": ("invalid UTF-8", "line 3"),
        "lone.jsonl": ("invalid UTF-8", "line 2"),
        "gone.txt": ("unreadable file", ""),
    }


def test_bad_inputs_are_counted_and_named(tmp_path: Path):
    folder = tmp_path / "raw"
    folder.mkdir()
    expected = write_bad_inputs(folder)
    manifest = go([folder], tmp_path / "out", SMALL.model_copy(update={"held_out": 0.0}))
    found = {Path(entry["path"]).name: (entry["reason"], entry["where"]) for entry in refused_of(tmp_path / "out")}
    # Two pieces of cut.txt.gz may stand before the damage; only that it is named, and where the damage begins.
    assert found.pop("cut.txt.gz")[0] == expected.pop("cut.txt.gz")[0]
    assert found == expected
    assert manifest.refused == Counter(entry["reason"] for entry in refused_of(tmp_path / "out"))
    assert documents_of(tmp_path / "out", "train").count("good line") == 9
    assert "good row" in documents_of(tmp_path / "out", "train")
    assert "invalid UTF-8" in summary(manifest)


def test_strict_names_the_first_bad_input(tmp_path: Path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in write_bad_inputs(folder):
        with pytest.raises(ConfigError, match=name):
            go([folder / name], tmp_path / "out", strict=True)
        assert not (tmp_path / "out").exists()


def test_damage_in_the_middle_keeps_what_comes_before(tmp_path: Path):
    lines = [json.dumps({"text": f"document {number} {os.urandom(30).hex()}"}) for number in range(20000)]
    blob = gzip.compress("\n".join(lines).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(blob[: len(blob) // 2])
    go([tmp_path / "cut.jsonl.gz"], tmp_path / "out", SMALL.model_copy(update={"held_out": 0.0}))
    kept = documents_of(tmp_path / "out", "train")
    assert 5000 < len(kept) < 15000
    assert kept == [json.loads(line)["text"] for line in lines[: len(kept)]]
    assert [entry["where"] for entry in refused_of(tmp_path / "out")] == [f"after line {len(kept)}"]


def test_nothing_usable_is_an_error(tmp_path: Path):
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match="empty file"):
        go([tmp_path / "empty.txt"], tmp_path / "out")


def test_a_summary_counts_in_plain_words(tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    (tmp_path / "good.txt").write_text("a text")
    said = summary(go([tmp_path], tmp_path / "out", SMALL.model_copy(update={"held_out": 0.0}))).splitlines()
    assert said[-1] == "rejected: 2 empty files (each is named in refused.jsonl)"
    assert not any(line.startswith("held_out:") for line in said)


def test_a_broken_tokenizer_asks_for_no_more_memory(tmp_path: Path):
    (tmp_path / TOKENIZER).write_text('{"version": "1.0", ')
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(ConfigError, match=r"give a Hugging Face tokenizer\.json$"):
        go([tmp_path / "a.txt"], tmp_path / "out", SMALL.model_copy(update={"tokenizer": str(tmp_path)}))


def test_long_documents_are_cut_between_lines_or_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read, "DOCUMENT_BYTES", 1000)
    text = make_text(1, 3000) + "数" * 1500
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    config = SMALL.model_copy(update={"held_out": 0.0})
    go([tmp_path / "long.txt"], tmp_path / "file", config)
    pieces = documents_of(tmp_path / "file", "train")
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 1000 for piece in pieces)
    assert pieces[0].endswith("\n")
    assert [piece.decode() for piece in cut(text.encode())] == pieces
    go([tmp_path / "long.jsonl"], tmp_path / "line", config)  # one record is one document however long
    assert documents_of(tmp_path / "line", "train") == [text]


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read, "RECORD_BYTES", 200)
    rows = [{"text": "a"}, {"text": "b" * 1000}, {"text": "c"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = go([tmp_path / "x.jsonl"], tmp_path / "out", SMALL.model_copy(update={"held_out": 0.0}))
    assert manifest.refused == {"record too long": 1}
    assert documents_of(tmp_path / "out", "train") == ["a", "c"]


def test_equal_documents_fall_into_one_split(tmp_path: Path):
    for number in range(200):
        (tmp_path / f"{number:03d}.txt").write_text(make_text(number % 50, 30))
    go([tmp_path], tmp_path / "out")
    train, held_out = (documents_of(tmp_path / "out", split) for split in SPLITS)
    assert len(train) + len(held_out) == 200
    assert held_out
    assert not set(train) & set(held_out)


def test_byte_tokenizer_is_the_bytes():
    tokenizer = byte_tokenizer()
    for text in ["", "plain", "für 数据 🙂\n\t\x00\x7f", "<|endoftext|>", "".join(map(chr, range(0x500)))]:
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 256


def test_a_text_cannot_end_a_document(tmp_path: Path):
    (tmp_path / "x.txt").write_text("before <|endoftext|> after " * 20)
    config = SMALL.model_copy(update={"tokenizer": "bpe", "vocab_size": 300, "held_out": 0.0})
    manifest = go([tmp_path / "x.txt"], tmp_path / "out", config)
    assert (tokens_of(tmp_path / "out", "train") == manifest.tokenizer.eos_id).sum() == 1


def test_an_existing_tokenizer_is_taken_as_it_is(raw: Path, tmp_path: Path):
    config = SMALL.model_copy(update={"tokenizer": "bpe", "vocab_size": 300})
    first = go([raw], tmp_path / "one", config)
    config = SMALL.model_copy(update={"tokenizer": str(tmp_path / "one" / TOKENIZER)})
    second = go([raw], tmp_path / "two", config)
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert (tokens_of(tmp_path / "one", "train") == tokens_of(tmp_path / "two", "train")).all()
    with pytest.raises(ConfigError, match="tokenizer"):
        go([raw], tmp_path / "three", SMALL.model_copy(update={"tokenizer": "nowhere.json"}))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken\.json"):
        go([raw], tmp_path / "three", SMALL.model_copy(update={"tokenizer": str(tmp_path / "broken.json")}))


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, raw: Path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(70_000)])
    tokenizer.save(str(tmp_path / TOKENIZER))
    manifest = go([raw], tmp_path / "out", SMALL.model_copy(update={"tokenizer": str(tmp_path / TOKENIZER)}))
    assert manifest.dtype == "uint32"
    assert tokens_of(tmp_path / "out", "train").dtype == np.uint32


def test_preparing_again(raw: Path, tmp_path: Path, texts: dict[str, str]):
    (tmp_path / "x.txt").write_text(make_text(5, 500))
    inputs = [raw, tmp_path / "x.txt"]
    first = go(inputs, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert go(inputs, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match=r"held_out 0\.2 -> 0\.3"):
        go(inputs, tmp_path / "out", SMALL.model_copy(update={"held_out": 0.3}))
    (tmp_path / "x.txt").write_text("changed")
    with pytest.raises(ConfigError, match="modified"):
        go(inputs, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match="new folder"):
        go(inputs, raw)


@pytest.mark.slow
def test_a_killed_preparation_never_looks_done(raw: Path, tmp_path: Path):
    big = tmp_path / "big.jsonl"
    with open(big, "w") as file:
        for number in range(3000):
            file.write(json.dumps({"text": make_text(number, 200)}) + "\n")
    code = (
        "import sys; from configs.sections.data import PrepareConfig\n"
        "from trainer.data.prepare.prepare import prepare\n"
        "prepare([sys.argv[1]], sys.argv[2], PrepareConfig(vocab_size=300, row_group_tokens=1000), workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(big), str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.part/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".out.part/*.parquet"))
    assert not (tmp_path / "out").exists()
    config = PrepareConfig(vocab_size=300, row_group_tokens=1000)
    go([big], tmp_path / "out", config, workers=2)
    assert (tmp_path / "out" / MANIFEST).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl", "out"]
    documents = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "held_out")
    assert sorted(documents) == sorted(make_text(number, 200) for number in range(3000))


def test_a_worker_that_dies_is_an_error(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="tokenizer process"):
        go([raw], tmp_path / "out", workers=2)
    assert not list(tmp_path.iterdir())


def test_inputs_that_match_nothing_leave_nothing_behind(tmp_path: Path):
    with pytest.raises(ConfigError, match="matches anything"):
        go([tmp_path / "nosuch"], tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
