"""`model.from`: the model's keys and the tokenizer of a folder, overridden by the keys beside it."""

import json
import subprocess
import sys

import pytest
import tiny_models as tiny

from configs import ConfigError, from_dict, load, resolve, to_yaml
from configs.load import model_source
from models.hf.folder import export_hf


@pytest.fixture
def folder(tmp_path):
    config = tiny.config(num_experts=0, qk_norm=False, qkv_bias=True)
    export_hf(tiny.model(config), config, tmp_path / "hf")
    return tmp_path / "hf"


def test_it_replaces_keys_of_the_base_but_not_those_beside_it(folder, tmp_path):
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
    # An empty one, as of a shell variable that is not set, is not another model.
    for empty in ("model.from=null", "model.from="):
        with pytest.raises(ConfigError, match=r"model\.from=null: should be the folder of a model"):
            load("quickstart", [empty])


YARN = {"kind": "yarn", "factor": 4.0, "original_max_positions": 16, "beta_fast": 16.0}


@pytest.fixture
def stretched(tmp_path):
    config = tiny.config(num_experts=0, qk_norm=False, rope_scaling=YARN, max_positions=64)
    export_hf(tiny.model(config), config, tmp_path / "stretched")
    return tmp_path / "stretched"


def test_sections_are_merged_key_by_key(stretched, tmp_path):
    def scaling(*overrides, folder=stretched):
        found = load("quickstart", [f"model.from={folder}", *overrides]).model.rope_scaling
        return found and found.model_dump()

    yarn = scaling()
    assert {key: yarn[key] for key in YARN} == YARN
    assert scaling("model.rope_scaling.factor=8") == yarn | {"factor": 8.0}
    assert scaling("model.rope_scaling={kind: yarn, factor: 8}") == yarn | {"factor": 8.0}
    assert scaling("model.rope_scaling.beta_slow=2") == yarn | {"beta_slow": 2.0}
    assert scaling("model.rope_scaling=null") is None
    # Keys of one kind say nothing of another.
    assert scaling("model.rope_scaling={kind: linear, factor: 2}")["beta_fast"] == 32.0
    for kind, told in (
        ("linear", "model.rope_scaling.factor is missing"),
        ("llama3", r"kind llama3 needs factor \(.*\) and original_max_positions \("),
        ("{kind: llama3, factor: 2}", "kind llama3 needs original_max_positions"),
    ):
        with pytest.raises(ConfigError, match=told):
            scaling(f"model.rope_scaling={kind}" if "{" in kind else f"model.rope_scaling.kind={kind}")
    (tmp_path / "mine.yaml").write_text(f"model: {{from: {stretched}, rope_scaling: {{factor: 8}}}}\n")
    assert load(tmp_path / "mine.yaml").model.rope_scaling.model_dump() == yarn | {"factor": 8.0}
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    sparse = {"block": 16, "local_blocks": 2, "global_blocks": 0, "stride": 3}
    (run_dir / "config.yaml").write_text(to_yaml(from_dict({"model": {"block_sparse": sparse}})))
    taken = from_dict({"model": {"from": str(run_dir), "block_sparse": {"block": 32}}}).model.block_sparse
    assert taken.model_dump() == sparse | {"block": 32}


def test_the_length_before_a_stretch_is_that_of_the_model_it_begins_from(folder, stretched):
    key, asked = "model.rope_scaling.original_max_positions", {"kind": "yarn", "factor": 4}
    short = {"seq_len": 16}
    for tree, said in (
        ({"model": {"from": str(folder)}}, f"64: model.max_positions of model.from={folder}"),
        ({"train": {"init_from": str(folder)}}, f"64: model.max_positions of train.init_from={folder}"),
        ({"train": {"init_from": str(stretched)}}, f"16: {key} of train.init_from={stretched}"),
    ):
        model, train = (tree.get("model", {}) | {"rope_scaling": asked}, tree.get("train", {}) | short)
        config = from_dict({"model": model, "train": train})
        assert config.model.rope_scaling.original_max_positions == int(said.partition(":")[0])
        assert f"{key}={said}" in resolve(config, vocab_size=64)[1]
    given = from_dict({"model": {"from": str(folder), "rope_scaling": asked | {"original_max_positions": 8}}})
    assert given.model.rope_scaling.original_max_positions == 8
    assert not given.defaults
    for start in ({}, {"train": {"init_from": "nowhere"}}, {"train": {"init_from": "a\0b"}}, {"train": 3}):
        for kind in ("yarn", "llama3"):
            with pytest.raises(ConfigError, match=f"kind {kind} needs original_max_positions"):
                from_dict(start | {"model": {"rope_scaling": asked | {"kind": kind}}})


def test_linear_positions_have_no_original_length(folder):
    """What was written while it had a default is the same run."""
    before = {"kind": "linear", "factor": 4.0, "original_max_positions": 8192}
    assert from_dict({"model": {"rope_scaling": before}}) == from_dict({"model": {"rope_scaling": {"factor": 4.0}}})


def test_it_is_read_in_a_process_that_imports_configs_alone(folder):
    code = f"from configs import load; print(load('quickstart', ['model.from={folder}']).model.num_layers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


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
        (None, "model.from=null: should be the folder"),
        ("a\0b", "a path cannot contain control characters"),
        ("~nobody-at-all/x", "there is no user nobody-at-all"),
        ("nowhere", r"model.from=\"nowhere\": no such folder$"),
        ("/", r"it has no config.json; supported are llama, mistral, qwen2, .*dots1"),
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
def test_a_file_that_is_not_a_config_is_explained(tree):
    with pytest.raises(ConfigError, match="config: "):
        from_dict(tree)


@pytest.mark.parametrize("data", [None, [], "stdlib", {"prepare": None}, {"prepare": "bpe"}])
def test_a_data_section_that_is_not_one_is_explained(folder, data):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="config: data"):
        from_dict({"model": {"from": str(folder)}, "data": data})


def test_a_file_in_place_of_its_folder_is_refused(folder):
    with pytest.raises(ConfigError, match=r'model.from=".*config.json" is a file: give its folder'):
        load("quickstart", [f"model.from={folder / 'config.json'}"])


def test_an_unsupported_model_is_named_with_the_supported_ones(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"model_type": "gpt2"}))
    with pytest.raises(
        ConfigError, match=r'model.from=.*model_type "gpt2" is not supported: should be one of llama, mistral, qwen2'
    ):
        load("quickstart", [f"model.from={folder}"])
