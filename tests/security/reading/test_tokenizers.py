"""A tokenizer.json from a stranger is used within bounds, or refused in one message, wherever it is used."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_data import MIB, muster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import ConfigError, from_dict
from configs.sections.data import LimitsConfig, PrepareConfig
from trainer.data.default import ensure_prepared
from trainer.data.manifest import MANIFEST, TOKENIZER, read_manifest
from trainer.data.prepare.encode import Encoder, EncodeSpec
from trainer.data.prepare.pool import encode_all
from trainer.data.prepare.prepare import prepare
from trainer.data.prepare.splitting import Splitting
from trainer.data.sources.read import Record
from trainer.data.tokenizer.tokenizer import TokenizerProcess, byte_tokenizer, train_bpe

DOUBLED = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40


def split(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


HOSTILE = {
    "hangs": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("a*a*a*a*(?!.)")] * 200}},
    "panics": {"pre_tokenizer": split("(a+)+$")},
    "grows": {"normalizer": {"type": "Sequence", "normalizers": DOUBLED}},
    "decodes": {"decoder": {"type": "Sequence", "decoders": DOUBLED}},
    "aborts": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "prepends": {"normalizer": {"type": "Prepend", "prepend": "x" * (8 * MIB)}},
    "sparse": {"added_tokens": [{"id": 257, "content": "<|endoftext|>", "special": True}], "large": 10**9},
    "unknown": {"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "?"}},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / TOKENIZER
    byte_tokenizer().save(str(path))
    return path


def write(path: Path, plain: Path, parts: dict) -> Path:
    tree = json.loads(plain.read_text()) | {key: value for key, value in parts.items() if key != "large"}
    if "large" in parts:
        tree["model"]["vocab"]["large"] = parts["large"]
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "x.txt").write_text("some text\n" * 20)
    return tmp_path / "x.txt"


def go(text: Path, out: Path, tokenizer: Path, **options):
    return prepare(
        [text], out, PrepareConfig(tokenizer=str(tokenizer), held_out=0.0), workers=1, progress=False, **options
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", HOSTILE)
def test_it_is_refused_before_anything_is_prepared(tmp_path, plain, text, kind):
    path = write(tmp_path / "t.json", plain, HOSTILE[kind])
    with pytest.raises(ConfigError, match=r"tokenizer .*t\.json") as refused:
        go(text, tmp_path / "out", path)
    assert len(str(refused.value).splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_the_command_takes_little_for_it_and_says_one_thing(tmp_path, plain, text):
    path = write(tmp_path / "t.json", plain, HOSTILE["grows"])
    ended = muster("data", "prepare", text, "--out", tmp_path / "out", "--tokenizer", path)
    assert (ended.code, len(ended.said.strip().splitlines())) == (2, 2), ended.said
    assert "--limit" in ended.said
    assert ended.peak < 500


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"[" * 10**6,
        b'{"a":' * 10**6,
        b"\xff\xfe\x00",
        b"\0" * 100,
        b"1e999",
        b'{"model": {}}',
    ],
)
def test_what_is_no_tokenizer(tmp_path, data):
    (tmp_path / TOKENIZER).write_bytes(data)
    with pytest.raises(ConfigError, match=r"give a Hugging Face tokenizer\.json"):
        TokenizerProcess(tmp_path)


def test_what_is_no_file(tmp_path, monkeypatch, plain):
    (tmp_path / TOKENIZER).symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "none.json", "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="tokenizer"):
            TokenizerProcess(path)
    monkeypatch.setattr("trainer.data.tokenizer.tokenizer_files.TOKENIZER_BYTES", 100)
    with pytest.raises(ConfigError, match="over 100"):
        TokenizerProcess(plain)


@pytest.mark.parametrize(
    "settings_",
    [b"{", b"\xff", b"[" * 10**5, b'{"eos_token": "' + b"a" * (5 * MIB) + b'"}'],
    ids=["cut", "bytes", "deep", "large"],
)
def test_settings_beside_it_that_cannot_be_read(tmp_path, plain, text, settings_):
    shutil.copy(plain, tmp_path / TOKENIZER)
    (tmp_path / "tokenizer_config.json").write_bytes(settings_)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read"):
        go(text, tmp_path / "out", tmp_path / TOKENIZER)


@pytest.mark.few(2)
@pytest.mark.parametrize("settings_", ["[]", "null", '{"eos_token": 3}', '{"eos_token": {"content": []}}', "{}"])
def test_settings_that_name_no_end_leave_the_usual_one(tmp_path, plain, text, settings_):
    shutil.copy(plain, tmp_path / TOKENIZER)
    (tmp_path / "tokenizer_config.json").write_text(settings_)
    assert go(text, tmp_path / "out", tmp_path / TOKENIZER).tokenizer.eos_id == 256


@pytest.fixture(scope="module")
def process(plain):
    with TokenizerProcess(plain) as process:
        yield process


def test_it_is_the_same_as_in_this_process(tmp_path):
    own = train_bpe(iter(["some text and some more of the same text\n" * 10]), 300)
    own.save(str(tmp_path / TOKENIZER))
    with TokenizerProcess(tmp_path) as process:
        assert process.vocab_size == max(own.get_vocab().values()) + 1
        for said in ("", "some text", "für 数据 🙂\0\n", "<|endoftext|>"):
            ids = own.encode(said, add_special_tokens=False).ids
            assert process.encode(said) == ids
            for skip in (True, False):
                assert process.decode([*ids, 0], skip_special_tokens=skip) == own.decode(
                    [*ids, 0], skip_special_tokens=skip
                )
        assert [process.id_to_token(i) for i in (0, 299, 10**6)] == [own.id_to_token(i) for i in (0, 299, 10**6)]
        assert [process.token_to_id(t) for t in ("<|endoftext|>", "no")] == [0, None]


def test_a_failure_over_one_text_leaves_it_usable(plain, tmp_path):
    with TokenizerProcess(write(tmp_path / TOKENIZER, plain, HOSTILE["panics"])) as process:
        with pytest.raises(ConfigError, match="retry-limit"):
            process.encode("a" * 40 + "b")
        assert process.encode("b") == [ord("b")]


def test_limits_are_raised_by_keys(plain, tmp_path):
    path = write(tmp_path / TOKENIZER, plain, {"normalizer": {"type": "Sequence", "normalizers": DOUBLED[:17]}})
    with TokenizerProcess(path) as process, pytest.raises(ConfigError, match="takes too much memory"):
        process.encode("a" * 100)
    with TokenizerProcess(path, LimitsConfig(memory=8000, seconds=100)) as process:
        assert len(process.encode("a")) == 1 << 17


PARTS = ["normalizer", "pre_tokenizer", "decoder", "model", "added_tokens", "post_processor"]
KINDS = ["BPE", "Unigram", "WordPiece", "WordLevel", "Split", "Replace", "Sequence", "ByteLevel", "Metaspace"]
NAMES = [
    "pattern",
    "content",
    "vocab",
    "merges",
    "unk_token",
    "unk_id",
    "behavior",
    "decoders",
    "normalizers",
    "prepend",
]
ODD = st.sampled_from([None, [], {}, 0, -1, 2**40, "", "a", "(" * 50, "(a*)*b", [["a", "b"]], [["", 0.0]], True, 1e300])


@pytest.mark.slow
@settings(
    max_examples=20, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_any_change_to_a_tokenizer_is_used_or_refused(plain, tmp_path, data):
    tree = json.loads(plain.read_text())
    tree["model"]["vocab"] = dict(list(tree["model"]["vocab"].items())[-20:])
    part = data.draw(st.sampled_from(PARTS))
    change = data.draw(st.dictionaries(st.sampled_from(NAMES), ODD, max_size=4))
    tree[part] = data.draw(st.one_of(ODD, st.sampled_from(KINDS).map(lambda kind: {"type": kind} | change)))
    (tmp_path / TOKENIZER).write_text(json.dumps(tree))
    message = refusal(tmp_path)
    assert len(message.splitlines()) <= 3


def refusal(folder: Path) -> str:
    try:
        with TokenizerProcess(folder) as process:
            process.trial()
    except ConfigError as error:
        return str(error)
    return ""


# Preparation.


def spec_of(path: Path, **parts) -> EncodeSpec:
    given = {"byte_level": False, "eos_id": 256, "vocab_size": 257, "dtype": "uint16", "text_key": "text"}
    given |= {"splitting": Splitting(0.0, 0), "memory": 128 * MIB, "seconds": 1}
    return EncodeSpec(tokenizer=str(path), **given | parts)


def records(*texts: str) -> list:
    return [Record("x.txt", f"line {i}", "text", said.encode()) for i, said in enumerate(texts)]


@pytest.mark.few(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_record_that_ends_its_worker_is_refused_and_the_rest_goes_on(plain, tmp_path, workers):
    grows = {"normalizer": {"type": "Sequence", "normalizers": DOUBLED}}
    path = write(tmp_path / TOKENIZER, plain, grows)
    batches = [records("one", "two"), records("three", "bad" + "a" * 10, "four"), records("five")]
    found = list(encode_all(iter(batches), spec_of(path), workers))
    assert [batch.splits["train"].documents for batch in found] == [2, 2, 1]
    assert found[2].splits["train"].tokens.tolist() == [*b"five", 256]
    [refused] = [refusal for batch in found for refusal in batch.refused]
    assert (refused.where, refused.reason) == ("line 1", "cannot be tokenized")
    assert "memory" in refused.detail


@pytest.mark.slow
def test_a_tokenizer_that_fails_over_every_record_is_refused(plain, tmp_path):
    grows = {"normalizer": {"type": "Sequence", "normalizers": DOUBLED}}
    path = write(tmp_path / TOKENIZER, plain, grows)
    with pytest.raises(ConfigError, match=r"failed on 3 records, the last one in x\.txt"):
        list(encode_all(iter([records(*["a"] * 10)]), spec_of(path), 1))


def test_a_panic_and_a_token_out_of_the_vocabulary_are_refusals(plain, tmp_path):
    encoder = Encoder(spec_of(write(tmp_path / TOKENIZER, plain, HOSTILE["panics"])))
    batch = encoder(records("good", "a" * 40 + "b", "good"))
    assert batch.splits["train"].tokens.tolist() == [*b"good", 256] * 2
    assert [refusal.reason for refusal in batch.refused] == ["cannot be tokenized"]
    batch = Encoder(spec_of(plain, vocab_size=110))(records("good", "zz"))
    told = "it returns token {}, which is not in its vocabulary"
    assert [refusal.detail for refusal in batch.refused] == [told.format(111), told.format(122)]


# Prepared data.


@pytest.fixture
def prepared(tmp_path, text, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare([text], tmp_path / "out", PrepareConfig(tokenizer="bytes"), workers=1, progress=False)
    return tmp_path / "out"


def start(folder: Path) -> None:
    ensure_prepared(from_dict({"data": {"path": str(folder)}}))


def test_a_start_tries_it_once(prepared, monkeypatch):
    start(prepared)
    monkeypatch.setattr("trainer.data.default.TokenizerProcess", None)  # not used again
    start(prepared)


def test_a_start_refuses_another_tokenizer(prepared):
    tree = json.loads((prepared / TOKENIZER).read_text())
    (prepared / TOKENIZER).write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="is not the tokenizer that"):
        start(prepared)
    (prepared / TOKENIZER).unlink()
    with pytest.raises(ConfigError, match=r"tokenizer .*no tokenizer\.json"):
        start(prepared)


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("hangs", "grows", "decodes", "aborts")]


@pytest.mark.parametrize("kind", ["panics", *OTHERS])
def test_a_start_refuses_a_hostile_tokenizer_under_a_manifest_that_knows_it(prepared, plain, kind):
    write(prepared / TOKENIZER, plain, HOSTILE[kind])
    told = json.loads((prepared / MANIFEST).read_text())
    told["tokenizer"]["sha256"] = hashlib.sha256((prepared / TOKENIZER).read_bytes()).hexdigest()
    (prepared / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="cannot be used"):
        start(prepared)
    assert not (prepared.parent / "cache").exists()


def test_a_start_refuses_a_vocabulary_that_is_not_the_manifests(prepared):
    told = json.loads((prepared / MANIFEST).read_text())
    told["tokenizer"]["vocab_size"] = 300
    (prepared / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"has 257 tokens .* has 300 and 256"):
        start(prepared)
    assert read_manifest(prepared).tokenizer.vocab_size == 300


def test_a_signal_to_the_process_group_leaves_the_child_to_its_parent(tmp_path, plain):
    """As `timeout`, systemd and Ctrl-C signal it: a run that is drawing a sample still ends with a checkpoint."""
    script = """
import os, signal, sys
from trainer.data.tokenizer.tokenizer import TokenizerProcess
signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
for each in signals:
    signal.signal(each, lambda number, frame: None)
with TokenizerProcess(sys.argv[1]) as tokenizer:
    for each in signals:
        os.killpg(0, each)
    print(len(tokenizer.encode("text")))
"""
    command = [sys.executable, "-c", script, str(plain)]
    assert subprocess.run(command, start_new_session=True, capture_output=True, text=True, check=True).stdout == "4\n"
