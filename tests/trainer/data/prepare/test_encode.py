"""Encoding with existing tokenizers: a long document stays one text, only we end it, and lost text is reported."""

import json

import odd_tokenizers as odd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from configs import ConfigError
from configs.sections.data import PrepareConfig
from trainer.data.manifest import TokenizerInfo
from trainer.data.prepare.encode import Encoder, EncodeSpec, cut_inside
from trainer.data.prepare.prepare import prepare, summary
from trainer.data.prepare.splitting import Splitting
from trainer.data.show import inspect
from trainer.data.sources import read
from trainer.data.sources.read import Record
from trainer.data.tokenizer.hf_tokenizer import hf_tokenizer
from trainer.data.tokenizer.tokenizer_process import encode, load

TEXTS = ["some words of a text, in English </s>\n", "def f(x):\n    return x\n", "Über größe, ein café\n"] * 20
PARTS = [" ", "  ", "\n", "some", "words", "(x):", "größe", "in", "</s>", "café"]


def encoder(folder) -> Encoder:
    tokenizer = load(folder / "tokenizer.json")
    end = odd.ENDS[folder.name]
    spec = EncodeSpec(
        tokenizer=str(folder / "tokenizer.json"), byte_level=False, eos_id=tokenizer.token_to_id(end), eos_token=end,
        vocab_size=1000, dtype="uint16", text_key="text", splitting=Splitting(0.0, 0), memory=1 << 27, seconds=1,
        foreign=True,
    )  # fmt: skip
    return Encoder(spec)


@pytest.fixture(scope="module", params=["llama", "chat", "llama3", "metaspace"])
def one(request, tmp_path_factory):
    return encoder(odd.ALL[request.param](tmp_path_factory.mktemp("t") / request.param, TEXTS))


def tokens_of(encoder: Encoder, text: str) -> list[int]:
    pieces, characters = encoder.encode(text.encode())
    assert characters == len(text)
    return [int(token) for piece in pieces for token in piece]


def back(encoder: Encoder, text: str) -> str:
    return encoder.tokenizer.decode(tokens_of(encoder, text), skip_special_tokens=False)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PARTS), max_size=40).map(lambda parts: "some" + "".join(parts)), st.integers(8, 40))
def test_a_document_that_is_cut_is_one_text(one, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "DOCUMENT_BYTES", size)
        assert back(one, text).removeprefix(" ") == text.removeprefix(" ")
        assert one.spec.eos_id not in tokens_of(one, text)


def test_a_long_document_is_one_text(one):
    for text in ("some words " * 30_000, "größe\n" * 50_000, "some" * 80_000):
        assert len(list(read.cut(text.encode()))) > 1
        assert back(one, text).removeprefix(" ") == text


def test_a_short_text_is_encoded_as_by_the_tokenizer(one):
    for text in ("some words", " in\n", "def f(x):\n    return x\n"):
        assert tokens_of(one, text) == encode(one.tokenizer, text)


def test_cut_inside():
    assert cut_inside("a</s>b</s></s>", "</s>") == ["a<", "/s>b<", "/s><", "/s>"]
    assert cut_inside("abc", "</s>") == ["abc"]


def test_text_that_becomes_the_end_of_text_is_refused(tmp_path):
    tokenizer = odd.byte_level(TEXTS, ["</s>"])
    tokenizer.normalizer = normalizers.Replace("END", "</s>")
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = []
    tree["model"]["vocab"]["</s>"] = 320
    tree["model"] |= {"type": "WordLevel", "unk_token": "a"}
    for key in ("merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"):
        tree["model"].pop(key, None)
    tree["model"].pop("ignore_merges", None)
    tree["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(tree))
    made = encoder(tmp_path / "llama")
    records = [Record("x", f"line {i}", "text", text.encode()) for i, text in enumerate(("a b", "a END b", "a </s> b"))]
    batch = made(records)
    [refused] = batch.refused
    assert (refused.where, refused.detail) == ("line 1", "it returns the end-of-text token inside a text")
    assert batch.splits["train"].tokens.tolist().count(320) == batch.splits["train"].documents == 2


def prepared(folder, tokenizer, texts):
    folder.mkdir(exist_ok=True)
    (folder / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(tokenizer=str(tokenizer), held_out=0.0)
    return prepare([folder / "raw.jsonl"], folder / "data", config, workers=1, progress=False)


def test_a_tokenizer_that_loses_text_is_told_of(tmp_path, muster):
    texts = ["all of this is lower case"] * 30 + ["Ein Café und noch mehr"]
    manifest = prepared(tmp_path, odd.uncased(tmp_path / "t", texts), texts)
    general, here = manifest.doubts
    assert general == "the tokenizer changes text: 'Hello World' becomes 'hello world'"
    assert "'Ein Café und noch mehr' becomes 'ein cafe und noch mehr'" in here
    assert "raw.jsonl; so are 1 of 31 documents" in here
    assert summary(manifest).splitlines()[0].endswith("'[SEP]' ends a document")
    assert summary(manifest).splitlines()[-2:] == [general, here]
    assert inspect(tmp_path / "data")["doubts"] == manifest.doubts
    code, out, _ = muster("data", "inspect", str(tmp_path / "data"))
    assert (code, out.count("the tokenizer changes text")) == (0, 2)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["llama", "chat", "llama3"])
def test_a_tokenizer_that_loses_nothing_is_not(tmp_path, kind):
    assert prepared(tmp_path, odd.ALL[kind](tmp_path / "t", TEXTS), [*TEXTS, "\n\n  x\t数据 🙂\r\n"]).doubts == []


LATE = ["hello world " * 60 + "emoji 🙂 tail" + " hello" * 20 * number for number in range(12)]


def test_text_that_is_lost_late_in_a_document_is_told(tmp_path):
    folder = odd.with_a_small_alphabet(tmp_path / "t", ["hello world emoji tail"] * 20, None)
    [told] = [doubt for doubt in prepared(tmp_path, folder, LATE).doubts if "raw.jsonl" in doubt]
    assert "🙂" in told


def test_every_unknown_token_is_counted(tmp_path):
    folder = odd.with_a_small_alphabet(tmp_path / "t", ["hello world emoji tail"] * 20, "<unk>")
    manifest = prepared(tmp_path, folder, ["hello 🙂 " * 100_000, "hello"])
    total = sum(split.tokens for split in manifest.splits.values())
    assert manifest.doubts[-1].startswith(f"100,000 of {total:,} tokens are '<unk>': ")


@pytest.mark.slow
def test_dropout_is_switched_off(tmp_path):
    (tmp_path / "two").mkdir()
    folder = odd.dropping(tmp_path / "t", TEXTS)
    first, second = prepared(tmp_path, folder, TEXTS), prepared(tmp_path / "two", folder, TEXTS)
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    assert first.doubts == ["the tokenizer's BPE dropout of 0.5 is disabled: a text must have one encoding"]
    kept = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    assert len({tuple(kept.encode(TEXTS[0]).ids) for _ in range(20)}) == 1
    again = prepared(tmp_path / "two" / "again", tmp_path / "data", TEXTS)
    assert (again.doubts, again.shards) == ([], first.shards)


def test_an_exported_tokenizer_has_no_dropout(tmp_path):
    folder = odd.dropping(tmp_path / "t", TEXTS)
    info = TokenizerInfo(kind="file", sha256="0" * 64, vocab_size=321, eos_id=320, eos_token="</s>")
    files, _ = hf_tokenizer(folder, info, load(folder / "tokenizer.json").token_to_id, None)
    assert Tokenizer.from_buffer(files["tokenizer.json"]).model.dropout is None


@pytest.mark.slow
def test_a_tokenizer_of_half_a_million_merges_is_exported(tmp_path):
    merges = "[" + '["a", "b"],' * 500_000 + '["a", "b"]]'
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"type": "BPE", "dropout": 0.1, "merges": {merges}}}}}')
    info = TokenizerInfo(kind="file", sha256="0" * 64, vocab_size=3, eos_id=2, eos_token="</s>")
    files, _ = hf_tokenizer(tmp_path, info, {"</s>": 2}.get, None)
    model = json.loads(files["tokenizer.json"])["model"]
    assert (model["dropout"], len(model["merges"])) == (None, 500_001)


@pytest.mark.parametrize("between", ["\n", " "])
@pytest.mark.parametrize("kind", ["uncased", "llama", "chat", "metaspace"])
def test_a_cut_changes_no_token(tmp_path, kind, between):
    made = encoder(odd.ALL[kind](tmp_path / kind, TEXTS))
    text = between.join(["some words of a text"] * 14_000)
    assert len(list(read.cut(text.encode()))) == 2
    assert tokens_of(made, text) == encode(made.tokenizer, text)


def test_an_empty_tokenizer_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(odd.chat(tmp_path / "here", TEXTS))
    with pytest.raises(ConfigError, match="the tokenizer's name is empty"):
        prepared(tmp_path, "", TEXTS)
