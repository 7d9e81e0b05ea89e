"""A tokenizer's files: which token ends a document, what is kept with the data, one encoding of every text."""

import json

import odd_tokenizers as odd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from configs import ConfigError
from configs.sections.data import DataConfig, PrepareConfig, Source
from trainer.data.manifest import read_manifest, read_manifests
from trainer.data.prepare.prepare import prepare
from trainer.data.tokenizer.make import changed
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.data.tokenizer.tokenizer_files import MORE_TEMPLATES, MOST_TEMPLATES, beside

TEXTS = ["some words of a text, in English\n", "def f(x):\n    return x\n", "Über größe, ein café\n"] * 20


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path / "raw.jsonl"


def go(raw, name, tokenizer):
    config = PrepareConfig(tokenizer=str(tokenizer), held_out=0.0)
    return prepare([raw], raw.parent / name, config, workers=1, progress=False).tokenizer


def settle(folder, **changes):
    """Change the settings of a tokenizer; a value of ... removes the key."""
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


@pytest.mark.slow
def test_the_settings_name_the_end_of_text(tmp_path, raw):
    made = odd.chat(tmp_path / "t", TEXTS)
    assert go(raw, "a", made).eos_token == "<|im_end|>"
    settle(made, eos_token={"__type": "AddedToken", "content": "<|im_start|>", "special": True})
    assert go(raw, "b", made).eos_token == "<|im_start|>"
    settle(made, eos_token=None)
    assert go(raw, "c", made).eos_token == "<|endoftext|>"
    (made / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert go(raw, "d", made / "tokenizer.json").eos_token == "<|im_end|>"
    settle(made, eos_token="<|nothing|>")
    with pytest.raises(ConfigError, match=r"no token '<\|nothing\|>', which the tokenizer_config\.json beside it"):
        go(raw, "e", made)
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_prepared_data_are_a_tokenizer_with_the_end_that_they_have(tmp_path, raw):
    made = odd.chat(tmp_path / "t", TEXTS)
    go(raw, "a", made)
    (tmp_path / "a" / "tokenizer_config.json").unlink()  # as data were that an older version prepared
    info = go(raw, "b", tmp_path / "a" / "tokenizer.json")
    assert info.eos_token == "<|im_end|>"
    assert info.is_as(read_manifest(tmp_path / "a").tokenizer)
    (tmp_path / "t" / "manifest.json").write_text('{"name": "of a web page"}')
    assert go(raw, "c", made).eos_token == "<|im_end|>"


def test_a_manifest_speaks_of_its_own_tokenizer_only(tmp_path, raw):
    go(raw, "a", odd.chat(tmp_path / "t", TEXTS))
    odd.llama(tmp_path / "a", TEXTS)
    assert go(raw, "b", tmp_path / "a").eos_token == "</s>"


@pytest.mark.slow
def test_sources_with_different_ends_are_not_mixed(tmp_path, raw):
    made = odd.chat(tmp_path / "t", TEXTS)
    go(raw, "a", made)
    settle(made, eos_token="<|endoftext|>")
    go(raw, "b", made)
    both = DataConfig(path=(Source(path=str(tmp_path / "a")), Source(path=str(tmp_path / "b"))))
    with pytest.raises(
        ConfigError, match=r"different end-of-text tokens \(<\|im_end\|> and <\|endoftext\|>\)"
    ) as refused:
        read_manifests(both)
    command = str(refused.value).splitlines()[1]
    go(raw, "c", command.rpartition("--tokenizer ")[2].strip("`"))
    read_manifests(both.model_copy(update={"path": (both.path[0], Source(path=str(tmp_path / "c")))}))


def test_other_settings_are_another_preparation(tmp_path, raw):
    made = odd.chat(tmp_path / "t", TEXTS)
    go(raw, "a", made)
    go(raw, "a", made)
    settle(made, pad_token="<|im_end|>")
    with pytest.raises(ConfigError, match=r"already prepared from other inputs or settings .*tokenizer"):
        go(raw, "a", made)


def test_named_chat_templates_are_kept(tmp_path, raw):
    made = odd.chat(tmp_path / "t", TEXTS)
    (made / MORE_TEMPLATES).mkdir()
    (made / MORE_TEMPLATES / "tools.jinja").write_text("{{ tools }}\r\n", newline="")
    go(raw, "a", made)
    assert (tmp_path / "a" / MORE_TEMPLATES / "tools.jinja").read_bytes() == b"{{ tools }}\r\n"
    assert set(beside(tmp_path / "a" / "tokenizer.json")) == {
        "tokenizer_config.json", "chat_template.jinja", f"{MORE_TEMPLATES}/tools.jinja",
    }  # fmt: skip
    for number in range(MOST_TEMPLATES):
        (made / MORE_TEMPLATES / f"{number}.jinja").touch()
    with pytest.raises(ConfigError, match="has over 32 files"):
        go(raw, "b", made)


def test_files_beside_it_that_are_too_large_are_refused(tmp_path, raw):
    made = odd.chat(tmp_path / "t", TEXTS)
    with (made / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja cannot be read"):
        go(raw, "a", made)


@pytest.fixture(scope="module", params=["llama", "llama3", "metaspace"])
def process(request, tmp_path_factory):
    """Tokenizers that put a blank, or a beginning of text, before what they encode."""
    with TokenizerProcess(odd.ALL[request.param](tmp_path_factory.mktemp("t"), TEXTS)) as process:
        yield process


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([" ", "  ", "\n", "some", "words", "(x):", "größe"]), max_size=12), st.integers(0, 12))
def test_a_continuation_keeps_its_spaces(process, parts, cut):
    prompt, text = "".join(parts[:cut]), "".join(parts)
    before, tokens = process.encode(prompt), process.encode(text)
    assert process.token_to_id("<s>") not in tokens
    if tokens[: len(before)] == before:  # else no model that was given the prompt adds what makes the text
        found = process.continued(prompt, before, tokens[len(before) :])
        assert found.lstrip(" ") == text.lstrip(" ")  # the first of a text is not for every tokenizer to tell


def test_the_leading_space(process):
    tokens = process.encode("some words")
    prompt = process.encode("some")
    assert tokens[: len(prompt)] == prompt
    assert process.continued("some", prompt, tokens[len(prompt) :]) == "some words"


def test_a_prompt_is_kept_before_bytes_that_are_not_text(tmp_path):
    with TokenizerProcess(odd.llama(tmp_path, TEXTS)) as process:
        stray = process.token_to_id("<0x80>")
        for prompt in ("数", "some 数", "数据 "):
            tokens = process.encode(prompt)
            assert process.continued(prompt, tokens, [stray]) == f"{prompt}\ufffd"
            assert process.continued(prompt, tokens, [stray, *process.encode("some words")]).startswith(
                prompt + "\ufffd"
            )
            assert process.continued(prompt, tokens, []) == prompt


def test_a_missing_leading_space_is_no_loss(tmp_path):
    tokenizer = odd.byte_level(TEXTS, ["</s>"])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with TokenizerProcess(odd.write(tmp_path, tokenizer, None)) as process:
        assert [process.lost(text) for text in ("a", " a", "  a  b ", " " * 9)] == [None] * 4
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 2, 0)])
    with TokenizerProcess(odd.write(tmp_path, tokenizer, None)) as process:
        assert process.lost("  a") == (" a", "a")


def test_a_change_that_no_screen_shows_is_told_in_escapes():
    assert changed("caf\u00e9", "cafe\u0301") == r"the tokenizer changes text: 'caf\xe9' becomes 'cafe\u0301'"
    assert changed("café", "cafe") == "the tokenizer changes text: 'café' becomes 'cafe'"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A Hugging Face cache with the tokenizer of `lab/small`, as its library lays it out, and no network."""

    def no_network(*_):
        raise AssertionError("the network was asked")

    made = odd.chat(tmp_path / "chat", TEXTS)
    repository = tmp_path / "hub" / "models--lab--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tokenizer_by_its_name_in_the_cache(cached, raw, muster):
    code, _, err = muster("data", "prepare", str(raw), "--out", "a", "--tokenizer", "lab/small", "--workers", "1")
    assert (code, err.strip()) == (
        0,
        "Few documents: the random split held none out, so one was set aside for evaluation",
    )
    assert read_manifest(cached / "a").tokenizer.eos_token == "<|im_end|>"
    assert (cached / "a" / "chat_template.jinja").read_text() == odd.TEMPLATE
    assert not any(path.is_symlink() for path in (cached / "a").iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lab/large", ["'lab/large'", "Nothing is fetched", "hf download lab/large tokenizer.json"]),
        ("../hub", ["no tokenizer.json in this folder"]),
        ("no/such/file.json", ["not `bytes`, `bpe` or an existing tokenizer.json"]),
        ("https://huggingface.co/lab/small", ["not `bytes`, `bpe` or an existing tokenizer.json"]),
        ("~nobody-here/x", ["no user"]),
        ("slow", ["it has tokenizer.model and vocab.json, but no tokenizer.json", "save_pretrained"]),
        ("empty", ["no tokenizer.json in this folder"]),
    ],
)
def test_names_of_no_tokenizer_are_refused(cached, raw, muster, given, words):
    for path in ("slow/tokenizer.model", "slow/vocab.json", "empty/README.md", "../hub/x"):
        (cached / path).parent.mkdir(exist_ok=True)
        (cached / path).touch()
    code, _, err = muster("data", "prepare", str(raw), "--out", "a", "--tokenizer", given)
    assert (code, len(err.splitlines()) <= 3) == (2, True), err
    assert all(word in err for word in words), err
    assert not (cached / "a").exists()


def test_a_local_folder_comes_before_the_cache(cached, raw):
    odd.llama(cached / "lab" / "small", TEXTS)
    assert go(raw, "a", "lab/small").eos_token == "</s>"


def test_a_folder_in_the_users_home(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    odd.llama(tmp_path / "mine", TEXTS)
    assert go(raw, "a", "~/mine").eos_token == "</s>"
