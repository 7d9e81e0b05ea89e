"""train.init_from: weights, and only weights, of a run, a checkpoint or a Hugging Face folder, copied or upcycled."""

import json
import shutil

import pytest
import torch
from engines import batch_of
from support import TINY_MODEL, resolved, tiny, train_in_process

from cluster.server.submit import needs
from configs import Config, ConfigError, ModelConfig, from_dict, load
from models.decoder.stages import Stage
from models.families import FAMILIES, build
from models.hf.folder import export_hf
from models.moe.router import choosers
from models.tasks.language_modelling import BIAS
from trainer.checkpoint import store
from trainer.checkpoint.export import export, load_module
from trainer.checkpoint.init_from import OF_TRAINING, SHOWN_BY_NAMES_AND_SHAPES, check_source, load_weights
from trainer.checkpoint.manifest import committed, folder, read_manifest
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run, read_config
from trainer.run.resolved import refuse_early


def settings(root, data, name, model=None, **train):
    return tiny(
        run={"name": name, "root": str(root)},
        model=TINY_MODEL | (model or {}),
        data={"path": str(data)},
        train={"steps": 2, "eval_sequences": 4} | train,
        optim={"lr": 1e-9, "weight_decay": 0.0},
    )


def warm(source, model=None, upcycle=None) -> Config:
    return resolved(model=TINY_MODEL | (model or {}), train={"init_from": str(source), "upcycle": upcycle})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    root = tmp_path_factory.mktemp("warm")
    run_dir = prepare_run(settings(root, tiny_data, "first", steps=3))
    assert train_in_process(run_dir) == 0
    export(run_dir, root / "hf")
    return run_dir


def test_all_three_kinds_give_the_same_weights(trained):
    module, config, step = load_module(trained)
    assert step == 3
    for source in (trained, folder(trained, 3), trained.parent / "hf"):
        other = build(config.model)
        assert load_weights(other, warm(source)) == {}
        for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_run_starts_from_the_weights_and_resumes_without_them(trained, tiny_data):
    run_dir = prepare_run(settings(trained.parent, tiny_data, "second", init_from=str(trained.parent / "hf")))
    assert train_in_process(run_dir) == 0
    [first] = [m["eval_loss"] for m in read_metrics(trained) if "eval_loss" in m]
    [second] = [m["eval_loss"] for m in read_metrics(run_dir) if "eval_loss" in m]
    assert second == pytest.approx(first, rel=1e-5)
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2]


def test_a_run_can_also_take_its_model_config_from_the_folder(trained, tiny_data):
    [first] = [m["eval_loss"] for m in read_metrics(trained) if "eval_loss" in m]
    for name, source in (("as-hf", trained.parent / "hf"), ("as-run", trained)):
        config = settings(trained.parent, tiny_data, name, init_from=str(source))
        tree = config.model_dump() | {"model": {"from": str(source), "dropout": 0.25}}
        run_dir = prepare_run(from_dict(tree))
        assert not [event for event in read_events(run_dir) if event["event"] == "init_from"]
        found = read_config(run_dir).model
        assert found == read_config(trained).model.model_copy(
            update={"dropout": 0.25, "intermediate_size": found.intermediate_size}
        )
    assert train_in_process(trained.parent / "as-hf") == 0
    [second] = [m["eval_loss"] for m in read_metrics(trained.parent / "as-hf") if "eval_loss" in m]
    assert second == pytest.approx(first, rel=1e-5)


def test_a_run_with_a_checkpoint_no_longer_needs_the_folder_it_started_from(trained, tiny_data, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(trained.parent / "hf", source)
    tree = settings(tmp_path, tiny_data, "begun", init_from=str(source)).model_dump()
    run_dir = prepare_run(from_dict(tree | {"model": {"from": str(source)}}))
    assert needs(read_config(run_dir))["train.init_from"] == [str(source)]
    source.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"train\.init_from=.*no such folder"):
        refuse_early(load(run_dir / "config.yaml"))
    (tmp_path / "moved").rename(source)
    assert train_in_process(run_dir) == 0
    shutil.rmtree(source)
    assert needs(read_config(run_dir))["train.init_from"] == []
    again = load(run_dir / "config.yaml", ["train.steps=3"])
    refuse_early(again)
    assert train_in_process(prepare_run(again)) == 0
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"model.from=.*hf\S*: no such folder.\n.*`muster train .*begun/config.yaml`"):
        from_dict(tree | {"model": {"from": str(source)}})


def test_mistakes_name_the_key(trained, tiny_data):
    with pytest.raises(ConfigError, match=r"train\.init_from=.*no such folder"):
        prepare_run(settings(trained.parent, tiny_data, "third", init_from="nowhere"))
    with pytest.raises(ConfigError, match=r"train\.init_from=.*a file: give its folder"):
        prepare_run(settings(trained.parent, tiny_data, "third", init_from=str(trained / "config.yaml")))
    with pytest.raises(ConfigError, match=r"neither a run with checkpoints.*of llama, mistral, qwen2, "):
        load_weights(torch.nn.Linear(1, 1), warm(trained.parent))
    wider = warm(trained, {"hidden_size": 64})
    with pytest.raises(
        ConfigError, match=r"has shape \[320, 32\], the model's is \[320, 64\]: set model.hidden_size=32"
    ):
        load_weights(build(wider.model), wider)


def test_differences_that_no_shape_shows_are_reported(trained):
    assert check_source(warm(trained)) == {}
    other = check_source(warm(trained, {"rope_theta": 5e5, "router": "sigmoid"}))
    assert other == {"model.rope_theta": [1e4, 5e5], "model.router": ["softmax", "sigmoid"]}


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_every_key_that_changes_the_output_is_reported(trained, kind):
    """All keys of the model, so that a new one must be reported or listed among those that need not be."""
    source = trained if kind == "run" else trained.parent / "hf"
    others = {
        "rope_theta": 5e5, "rope_scaling": {"kind": "linear", "factor": 4.0}, "max_positions": 64, "norm_eps": 1e-5,
        "sliding_window": 16, "block_sparse": {"block": 8}, "top_k": 3, "router": "sigmoid", "norm_topk_prob": False,
        "router_scale": 2.0, "expert_groups": 2, "top_groups": 2, "family": "other",
    }  # fmt: skip
    # The same number of heads of another size: this model's q and k norms get other shapes.
    assert others.keys() | {"num_heads"} == set(ModelConfig.model_fields) - SHOWN_BY_NAMES_AND_SHAPES - OF_TRAINING
    for key, value in others.items():
        more = {"expert_groups": 2} if key == "top_groups" else {}
        config = warm(source, {key: value} | more if key != "family" else {})
        if key == "family":
            FAMILIES["other"] = FAMILIES["decoder"]
            config = config.model_copy(update={"model": config.model.model_copy(update={"family": "other"})})
        try:
            found = check_source(config)
        finally:
            FAMILIES.pop("other", None)
        assert found.keys() == {f"model.{each}" for each in (key, *more)}
        json.dumps(found)
    # Training only, or fewer positions: the same weights give the same output.
    assert check_source(warm(source, {"dropout": 0.1, "aux_loss_weight": 0.0, "max_positions": 32})) == {}


def test_longer_contexts_are_allowed_and_reported(trained, tiny_data, capsys):
    for name, model in (
        ("yarn", {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 32}}),
        ("sparse", {"block_sparse": {"block": 16, "local_blocks": 2}}),
        ("theta", {"rope_theta": 5e5}),
    ):
        key = f"model.{next(iter(model))}"
        run_dir = prepare_run(settings(trained.parent, tiny_data, name, model, init_from=str(trained), seq_len=128))
        told = capsys.readouterr().err
        assert "muster: warning: the weights of train.init_from=" in told
        assert f"{key} " in told
        assert "model.max_positions was 32, is now 128" in told
        assert "..." not in told
        [event] = [event for event in read_events(run_dir) if event["event"] == "init_from"]
        assert event["differs"].keys() == {key, "model.max_positions"}
    assert train_in_process(trained.parent / "yarn") == 0
    for source in (trained, trained.parent / "hf"):
        prepare_run(settings(trained.parent, tiny_data, f"same-{source.name}", init_from=str(source)))
        assert "warning" not in capsys.readouterr().err


def test_another_tokenizer_is_reported(trained, tiny_data, tmp_path, capsys):
    source = tmp_path / "hf"
    shutil.copytree(trained.parent / "hf", source)
    (source / "tokenizer.json").write_text("{}")
    run_dir = prepare_run(settings(tmp_path, tiny_data, "other", init_from=str(source)))
    told = capsys.readouterr().err
    assert f"tokenized with a different tokenizer than the model's (train.init_from={source})" in told
    assert "behave differently" not in told
    [event] = [event for event in read_events(run_dir) if event["event"] == "init_from"]
    assert event["differs"].keys() == {"tokenizer"}


EXPERTS = {"num_experts": 4, "top_k": 4, "expert_size": 128}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_data):
    root = tmp_path_factory.mktemp("dense")
    run_dir = prepare_run(settings(root, tiny_data, "dense", {"num_experts": 0, "intermediate_size": 128}))
    assert train_in_process(run_dir) == 0
    export(run_dir, root / "hf")
    return run_dir


def filled(config: Config) -> torch.nn.Module:
    module = build(config.model)
    load_weights(module, config)
    return module.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_size": 32, "num_experts": 8, "shared_expert_size": 32},
        {"moe_every": 2, "intermediate_size": 128},
    ],
)
def test_an_upcycled_model_starts_with_the_dense_models_output(dense, changes):
    plain, _, _ = load_module(dense)
    batch = batch_of(warm(dense), [0, 1, 2])
    for source in (folder(dense, 2), dense.parent / "hf"):
        config = warm(source, EXPERTS | changes, {})
        check_source(config)
        with torch.no_grad():
            torch.testing.assert_close(filled(config).logits(batch), plain.logits(batch), rtol=0, atol=1e-5)


def test_a_run_starts_upcycled(dense, tiny_data):
    config = settings(dense.parent, tiny_data, "moe", EXPERTS, init_from=str(dense), upcycle={"noise": 0.0})
    run_dir = prepare_run(config)
    assert train_in_process(run_dir) == 0
    [before], [after] = ([m["eval_loss"] for m in read_metrics(run) if "eval_loss" in m] for run in (dense, run_dir))
    assert after == pytest.approx(before, rel=1e-5)


def test_a_stage_reads_its_own_names_and_gets_the_same_weights(dense, monkeypatch):
    config, read = warm(dense, EXPERTS, {"noise": 0.1, "drop_ratio": 0.5}), []
    whole = dict(filled(config).named_parameters())
    weight = store.Reader.weight
    monkeypatch.setattr(store.Reader, "weight", lambda self, name: read.append(name) or weight(self, name))
    with torch.device("meta"):
        stage = Stage(build(config.model), 1, 2)
    stage = stage.to_empty(device="cpu")
    load_weights(stage, config)
    assert all(torch.equal(parameter, whole[name]) for name, parameter in stage.named_parameters())
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"1"}
    assert {name for name in read if ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    assert len(read) == len(set(read))


def test_impossible_upcycling_names_the_keys(dense, trained, tiny_data):
    def mistake(match, model, **train):
        with pytest.raises(ConfigError, match=match):
            prepare_run(settings(dense.parent, tiny_data, "mistake", model, **train))
        assert not (dense.parent / "mistake").exists()

    mistake(r"is dense in model\.layers\.0\.mlp.* set train\.upcycle=", EXPERTS, init_from=str(dense))
    mistake(r"num_experts is 0: set it", {"num_experts": 0}, init_from=str(dense), upcycle={})
    mistake(r"already has experts: set train\.upcycle=null", {}, init_from=str(trained), upcycle={})
    mistake(
        r"width 128.*expert_size is 96: set it to 128", EXPERTS | {"expert_size": 96}, init_from=str(dense), upcycle={}
    )
    mistake(
        r"has no model\.layers\.2\..* has 2 layers, but model.num_layers is 3: set model.num_layers=2$",
        EXPERTS | {"num_layers": 3},
        init_from=str(dense),
        upcycle={},
    )
    mistake(
        r"layers\.1.* and 10 more parameters, which this model lacks: .* set model.num_layers=2$",
        EXPERTS | {"num_layers": 1},
        init_from=str(dense),
        upcycle={},
    )
    mistake(
        r"has no model\.layers\.0\.mlp\.gate_proj.*set .*model.num_experts=4",
        {"num_experts": 0},
        init_from=str(trained),
    )
    for key, value in (("vocab_size", 320), ("tie_embeddings", "false"), ("qk_norm", "true"), ("num_layers", 2)):
        other = {"vocab_size": 384, "tie_embeddings": True, "qk_norm": False, "num_layers": 3}[key]
        for source in (dense, dense.parent / "hf"):
            mistake(
                rf"set model\.{key}={value}$",
                {"num_experts": 0, "intermediate_size": 128, key: other},
                init_from=str(source),
            )
    with pytest.raises(ConfigError, match=r"train\.upcycle needs train\.init_from"):
        tiny(train={"upcycle": {}})


def test_routers_start_with_the_biases_of_the_source(trained, tiny_data):
    learning = {"router_bias_rate": 0.01, "moe_every": 2, "num_layers": 4}
    first = prepare_run(settings(trained.parent, tiny_data, "biased", learning))
    assert train_in_process(first) == 0
    bias = biases(first)
    assert [len(row) for row in bias] == [4, 4]
    assert any(map(any, bias))
    fixed = learning | {"router_bias_rate": 0.0}
    second = prepare_run(settings(trained.parent, tiny_data, "fixed", fixed, init_from=str(first)))
    assert train_in_process(second) == 0
    assert biases(second) == bias
    # The layers in between, which were dense, have no bias yet.
    config = warm(first, fixed | {"moe_every": 1, "top_k": 4}, {})
    check_source(config)
    assert load_weights(build(config.model), config) == {BIAS: [[0.0] * 4, bias[0], [0.0] * 4, bias[1]]}


def biases(run_dir):
    manifest = read_manifest(folder(run_dir, committed(run_dir)[-1]))
    return manifest.state.memory[BIAS]


def test_routers_start_with_the_biases_of_a_hugging_face_folder(tmp_path):
    # As in DeepSeek-V3: sigmoid scores, a shared expert, a dense first layer.
    shape = {"router": "sigmoid", "router_bias_rate": 0.0, "shared_expert_size": 32, "first_dense_layers": 1}
    source = resolved(model=TINY_MODEL | shape).model
    module = build(source)
    module.init_weights(0)
    [chooser] = choosers(module)
    chooser.bias = torch.tensor([0.5, -0.25, 0.0, 0.125])
    export_hf(module, source, tmp_path)
    config = warm(tmp_path, shape)
    check_source(config)
    assert load_weights(build(config.model), config) == {"router.bias": [chooser.bias.tolist()]}
    lost = warm(tmp_path, shape | {"router_bias_rate": None})
    assert check_source(lost) == {"model.router_bias_rate": [0.0, None]}
