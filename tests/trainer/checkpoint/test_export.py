"""A run is self-contained: its tokenizer and end-of-text token, in its folder and as transformers loads them."""

import json
import shutil
import tempfile
from pathlib import Path

import odd_tokenizers as odd
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import tiny, train_in_process

from configs import ConfigError
from configs.sections.data import PrepareConfig
from models.hf.names import ARCHITECTURES
from trainer.checkpoint.export import NOT_QWEN2S, export
from trainer.checkpoint.manifest import folder as checkpoint
from trainer.checkpoint.store import Reader
from trainer.data.manifest import read_manifest
from trainer.data.prepare.prepare import prepare
from trainer.data.tokenizer.hf_tokenizer import hf_tokenizer, is_qwen2s
from trainer.data.tokenizer.kept import tokenizer_of
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.data.tokenizer.tokenizer_files import FOLDER
from trainer.data.tokenizer.tokenizer_process import encode, load
from trainer.record.lines import read_metrics
from trainer.run.folder import prepare_run, read_config

WORDS = ["red", "green", "blue", "Über", "fox", "dog"]
TEXTS = [" ".join(WORDS[i // 6**k % 6] for k in range(1 + i % 5)) + " ." for i in range(240)]
"""Words and a full stop, after which each ends."""
ASKED = ["red green", "  Über\n\tdog 7.", "数据 🙂", "", "red " * 40]
DENSE = {"num_layers": 1, "num_experts": 0, "intermediate_size": 64, "vocab_size": 448}


def data(folder, kind):
    """Data prepared with one kind of tokenizer."""
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    made = odd.ALL[kind](folder / "tokenizer", TEXTS)
    config = PrepareConfig(tokenizer=str(made), held_out=0.2)
    prepare([raw], folder / "data", config, workers=1, progress=False)
    return folder / "data"


def settings(root, name, path, **train):
    return tiny(
        run={"name": name, "root": str(root)},
        model=DENSE,
        data={"path": str(path), "document_mask": True},
        train={"steps": 60, "global_batch": 16, "sample_tokens": 8, "sample_prompts": ["red .", ""], "eval_every": 60}
        | train,
        optim={"lr": 2e-2, "warmup": 5, "ema_decay": 0.9},
        checkpoint={"every": 0},
    )


@pytest.fixture(scope="module", params=["llama", "chat"])
def run(request, tmp_path_factory):
    """(kind of tokenizer, a run that has learned where documents end, and whose data have been deleted)."""
    root = tmp_path_factory.mktemp(request.param)
    prepared = data(root, request.param)
    run_dir = prepare_run(settings(root, "run", prepared))
    assert train_in_process(run_dir) == 0
    prepared.rename(root / "elsewhere")
    return request.param, run_dir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    kind, run_dir = run
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(run_dir, folder)
    return kind, folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.few(1)
def test_exported_configs_agree(exported):
    kind, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end, pad = odd.ENDS[kind], {"chat": "<|endoftext|>"}.get(kind)
    expected = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(end),
        "pad_token_id": pad and tokenizer.convert_tokens_to_ids(pad),
    }
    assert read(folder / "generation_config.json") == expected
    assert {key: read(folder / "config.json")[key] for key in expected} == expected
    named = read(folder / "tokenizer_config.json")
    assert [named.get(f"{name}_token") for name in ("bos", "eos", "pad")] == [None, end, pad]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for each in (tokenizer, model.config, model.generation_config):
        assert {key: getattr(each, key) for key in expected} == expected


@pytest.mark.few(1)
def test_transformers_stops_where_training_did(exported):
    _, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(**tokenizer("red green .", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert made[0].tolist() == [*tokenizer("red green .").input_ids, tokenizer.eos_token_id]


def test_exported_tokenizer_keeps_its_original_settings(run, exported):
    kind, folder = exported
    given = run[1].parent / "tokenizer"
    for kept in (run[1].parent / "elsewhere", run[1] / FOLDER):
        for file in given.iterdir():
            assert (kept / file.name).read_bytes() == file.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind == "llama":
        assert tokenizer.unk_token == "<unk>"
        return
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n"
    )
    assert tokenizer.mask_token is None
    assert len(tokenizer) == read_manifest(given.parent / "elsewhere").tokenizer.vocab_size


def test_commands_do_not_need_the_data(run, muster):
    _, run_dir = run
    arguments = [str(run_dir), "--prompt", "red green .", "--max-tokens", "20", "--temperature", "0"]
    assert muster("generate", *arguments) == (0, "red green .\n", "")
    assert (run_dir / "samples" / "step-00000060.txt").read_text().startswith("red .\n---")
    code, _, err = muster("export", str(run_dir), "--out", str(run_dir.parent / "out"))
    assert (code, err) == (0, "")
    code, out, err = muster("eval", str(run_dir), "--data", str(run_dir.parent / "elsewhere"), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["loss"] > 0


def test_commands_can_use_the_ema_weights(run, muster, tmp_path):
    """After 60 steps at a decay of 0.9 the average too has learned that no text follows a full stop."""
    _, run_dir = run
    reader = Reader(checkpoint(run_dir, 60))
    code, out, err = muster("export", str(run_dir), "--out", str(tmp_path / "hf"), "--ema")
    assert (code, err) == (0, "")
    assert out.startswith("EMA weights of the checkpoint of step 60 exported to ")
    held = load_file(tmp_path / "hf" / "model.safetensors")
    for name in reader.manifest.shapes["weight"]:
        assert torch.equal(held[name], reader.weight(name, averaged=True))
        assert not torch.equal(held[name], reader.weight(name))
    arguments = [str(run_dir), "--prompt", "red green .", "--max-tokens", "20", "--temperature", "0", "--ema"]
    assert muster("generate", *arguments) == (0, "red green .\n", "")
    [recorded] = [m for m in read_metrics(run_dir) if "eval_loss" in m]
    data = str(run_dir.parent / "elsewhere")
    losses = {
        flag: json.loads(muster("eval", str(run_dir), "--data", data, "--json", "--sequences", "4", *flag)[1])["loss"]
        for flag in ((), ("--ema",))
    }
    assert losses == {
        (): pytest.approx(recorded["eval_loss"], rel=1e-5),
        ("--ema",): pytest.approx(recorded["eval_loss_ema"], rel=1e-5),
    }
    assert abs(recorded["eval_loss"] - recorded["eval_loss_ema"]) > 0.001


def test_a_runs_tokenizer_prepares_more_data(run, tmp_path):
    _, run_dir = run
    (tmp_path / "more.txt").write_text("red green .\n" * 10)
    made = PrepareConfig(tokenizer=str(run_dir), held_out=0.0)
    info = prepare([tmp_path / "more.txt"], tmp_path / "more", made, workers=1, progress=False).tokenizer
    assert info.is_as(read_manifest(run_dir.parent / "elsewhere").tokenizer)


def test_an_older_run_uses_its_datas_tokenizer(run, tmp_path):
    kind, run_dir = run
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns(FOLDER))
    config = read_config(run_dir).data
    with pytest.raises(ConfigError, match=r"has no copy of its tokenizer .* data cannot be read: data\.path="):
        export(tmp_path / "run", tmp_path / "hf")
    elsewhere = run_dir.parent / "elsewhere"
    folder, info = tokenizer_of(tmp_path / "run", config.model_copy(update={"path": str(elsewhere)}))
    assert (folder, info.eos_token) == (elsewhere, odd.ENDS[kind])
    prepare_run(settings(tmp_path, "run", elsewhere))  # started again, it keeps it
    export(tmp_path / "run", tmp_path / "hf")


def test_a_changed_tokenizer_is_refused_and_restored(run, tmp_path):
    _, run_dir = run
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / FOLDER / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not the tokenizer that the run was trained with"):
        export(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "run" / FOLDER / "info.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"info\.json cannot be read \([^[\n]*\): fix or delete it"):
        export(tmp_path / "run", tmp_path / "hf")
    prepare_run(settings(tmp_path, "run", run_dir.parent / "elsewhere"))
    export(tmp_path / "run", tmp_path / "hf")


def tokens(folder, texts):
    with TokenizerProcess(folder) as tokenizer:
        return [tokenizer.encode(text) for text in texts]


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", odd.ALL)
def test_an_exported_tokenizer_encodes_like_the_data(tmp_path, kind):
    prepared = data(tmp_path, kind)
    expected, info = tokens(prepared, ASKED), read_manifest(prepared).tokenizer
    assert info.eos_token == odd.ENDS[kind]
    with TokenizerProcess(prepared) as tokenizer:
        files, ids = hf_tokenizer(prepared, info, tokenizer.token_to_id, 64)
    for model_type in ARCHITECTURES if kind == "llama" else ["qwen3"]:
        folder = tmp_path / model_type
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, **ids}))
        # transformers uses Qwen2's tokenizer for every model of that type, whatever the files say: export warns of it.
        auto = transformers.PreTrainedTokenizerFast if model_type == "qwen2" else transformers.AutoTokenizer
        tokenizer = auto.from_pretrained(folder)
        assert [tokenizer(text).input_ids for text in ASKED] == expected, model_type
        assert tokenizer.eos_token_id == info.eos_id
        assert tokenizer.bos_token is None


def test_an_export_for_qwen2_warns_in_the_folder_about_auto_tokenizer(tmp_path, capsys):
    own = json.loads(transformers.Qwen2Tokenizer().backend_tokenizer.to_str())
    assert is_qwen2s(json.dumps(own).encode())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert not is_qwen2s(json.dumps(own | {part: None}).encode()), part
    config = settings(tmp_path, "run", data(tmp_path, "chat"), steps=5, eval_every=0)
    model = config.model.model_copy(update={"qk_norm": False, "qkv_bias": True})
    run_dir = prepare_run(config.model_copy(update={"model": model}))
    assert train_in_process(run_dir) == 0
    capsys.readouterr()
    export(run_dir, tmp_path / "hf")
    assert read(tmp_path / "hf" / "config.json")["model_type"] == "qwen2"
    assert NOT_QWEN2S in capsys.readouterr().err
    assert (tmp_path / "hf" / "README.md").read_text() == f"{NOT_QWEN2S}.\n"


NAMES = [
    "eos_token", "bos_token", "pad_token", "mask_token", "additional_special_tokens", "extra_special_tokens",
    "chat_template", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "tokenizer_class", "auto_map",
    "add_bos_token", "added_tokens_decoder", "model_max_length", "add_prefix_space", "vocab_file", "backend",
]  # fmt: skip
TOKEN = st.sampled_from(["</s>", "<s>", "<unk>", "<new>", {"content": "<s>", "lstrip": True}, {"content": 3}])
ODD = st.one_of(st.sampled_from([None, [], {}, 0, -1, True, "", "right", "{{ x }}", "LlamaTokenizer"]), TOKEN)
VALUES = st.one_of(ODD, st.lists(TOKEN, max_size=2), st.dictionaries(st.sampled_from(["image_token", "7"]), TOKEN))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return data(tmp_path_factory.mktemp("plain"), "llama")


@settings_(max_examples=60, deadline=None, derandomize=True, database=None)
@given(given_=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5))
def test_exported_tokenizer_encodes_like_the_data_whatever_its_settings(plain, given_):
    info, expected = read_manifest(plain).tokenizer, load(plain / "tokenizer.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(plain / "tokenizer.json", folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(given_))
        files, ids = hf_tokenizer(folder, info, expected.token_to_id, 64)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **ids}))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.bos_token) == (info.eos_id, None)
    assert (tokenizer.pad_token_id, len(tokenizer)) == (ids["pad_token_id"], info.vocab_size)
    assert [tokenizer(text).input_ids for text in ASKED] == [encode(expected, text) for text in ASKED]
