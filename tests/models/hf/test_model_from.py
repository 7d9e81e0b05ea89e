"""`model.from`: the model's keys and the tokenizer of a folder, under what the config says beside it."""

import json

import pytest
import tiny_models as tiny

from configs import ConfigError, from_dict, load, to_yaml
from configs.load import model_source
from models.hf.folder import export_hf


@pytest.fixture
def folder(tmp_path):
    config = tiny.config(num_experts=0, qk_norm=False, qkv_bias=True)
    export_hf(tiny.model(config), config, tmp_path / "hf")
    return tmp_path / "hf"


def test_it_takes_the_place_of_what_lies_below_and_not_of_what_stands_beside(folder, tmp_path):
    expected = {"qkv_bias": True, "qk_norm": False, "num_layers": 2, "hidden_size": 32, "num_experts": 0, "head_dim": 8}
    (tmp_path / "mine.yaml").write_text(f"base: quickstart\nmodel: {{from: {folder}, dropout: 0.1}}\n")
    (tmp_path / "over.yaml").write_text("base: mine.yaml\nmodel: {loss_chunk: 128}\n")
    told = {"dropout": 0.1, "loss_chunk": 128}
    for config in (
        load("quickstart", ["model.loss_chunk=128", f"model.from={folder}", "model.dropout=0.1"]),
        load(tmp_path / "over.yaml"),
        load(tmp_path / "mine.yaml", ["model.loss_chunk=128"]),
        load(
            tmp_path / "over.yaml", [f"model.from={folder}", *(f"model.{key}={value}" for key, value in told.items())]
        ),
    ):
        found = config.model.model_dump()
        assert {key: found[key] for key in (*expected, *told)} == expected | told
        assert config.train.steps == 400
        assert config.data.prepare.tokenizer == "bpe"
        (tmp_path / "resolved.yaml").write_text(to_yaml(config))
        assert load(tmp_path / "resolved.yaml") == config
    # All of it is the user's choice: nothing follows a preset's other keys, and a vocabulary does not grow.
    assert not [key for key in load("moe-8x7b", [f"model.from={folder}"]).defaults if key.startswith("model.")]
    # Taken back, what is left are the defaults.
    assert load(tmp_path / "mine.yaml", ["model.from=null"]).model.qkv_bias is False


def test_what_a_job_needs_on_the_cluster_is_the_folder(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\nmodel: {from: models/hf, dropout: 0.1}\n")
    assert model_source(tmp_path / "mine.yaml") == "models/hf"
    assert model_source(tmp_path / "mine.yaml", ["model.from=other", "train.steps=1"]) == "other"
    assert model_source(tmp_path / "mine.yaml", ["model.from=null"]) is None
    assert model_source("quickstart", ["model.dropout=0.1"]) is None


def test_a_run_of_ours_is_read_as_well(folder, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    asked = load("quickstart", ["model.num_layers=3"])
    (run_dir / "config.yaml").write_text(to_yaml(asked))
    assert load("dense-small", [f"model.from={run_dir}"]).model == asked.model
    (run_dir / "config.yaml").write_text(f"model: {{from: {run_dir}}}\n")  # no run's: it would lead back to itself
    with pytest.raises(ConfigError, match=r"unknown key model\.from"):
        load("quickstart", [f"model.from={run_dir}"])


def test_the_tokenizer_of_the_folder_is_that_of_data_prepared_for_it(folder):
    (folder / "tokenizer.json").write_text("{}")

    def prepared_with(**sections):
        return from_dict({"model": {"from": str(folder)}, **sections}).data.prepare.tokenizer

    assert prepared_with() == prepared_with(data={"path": "stdlib"}) == str(folder / "tokenizer.json")
    assert prepared_with(data={"prepare": {"held_out": 0.1}}) == str(folder / "tokenizer.json")
    assert prepared_with(data={"prepare": {"tokenizer": "bytes"}}) == "bytes"
    assert prepared_with(data={"path": "data/tokens"}) == "bpe"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (1, "model.from=1: should be the folder of a model"),
        ([], r"model.from=\[\]: should be the folder"),
        ("", 'model.from="": should be the folder'),
        ("a\0b", "a path has no control characters"),
        ("~nobody-at-all/x", "there is no user nobody-at-all"),
        ("nowhere", r"it has no file config.json; read are those of llama, mistral, qwen2, .*dots1"),
        ("x" * 5000, "a path has at most"),
    ],
)
def test_mistakes(source, told):
    with pytest.raises(ConfigError, match=told) as caught:
        from_dict({"model": {"from": source}})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "tree", [None, 0, "0", [], [["model", {}]], {"model": None}, {"model": "from"}, {"model": ["from"]}]
)
def test_what_is_no_config_is_explained_as_such(tree):
    with pytest.raises(ConfigError, match="config: "):
        from_dict(tree)


@pytest.mark.parametrize("data", [None, [], "stdlib", {"prepare": None}, {"prepare": "bpe"}])
def test_a_section_of_data_that_is_none_is_explained_as_such(folder, data):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="config: data"):
        from_dict({"model": {"from": str(folder)}, "data": data})


def test_a_model_that_is_not_read_is_named_with_those_that_are(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r'model.from=.*model_type "gpt2" is none of llama, mistral, qwen2'):
        load("quickstart", [f"model.from={folder}"])
