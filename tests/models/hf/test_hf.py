"""Logits equal transformers' own, in both directions; what no architecture computes is refused by name."""

import json

import pytest
import tiny_models as tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs import BlockSparse, ConfigError, RopeScaling
from models.families import build
from models.hf.config_json import from_hf_config
from models.hf.folder import export_hf, import_hf
from models.hf.names import ARCHITECTURES, bias_name
from models.moe.router import choosers

# transformers says so of the empty shared expert of a GLM-4.5 that has none
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_positions=16, high_freq_factor=3.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_positions=16)
LINEAR = RopeScaling(kind="linear", factor=3.0)
DEEPSEEK = {
    "router": "sigmoid", "router_bias_rate": 0.0, "router_scale": 2.5, "num_experts": 8, "expert_groups": 4,
    "top_groups": 2, "shared_expert_size": 32, "num_layers": 3, "first_dense_layers": 1,
}  # fmt: skip
PLAIN_SIGMOID = {"router": "sigmoid", "router_bias_rate": 0.0, "num_experts": 8, "norm_topk_prob": False}
QWEN2 = {"qk_norm": False, "shared_expert_size": 24, "shared_expert_gate": True}
CASES = {
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3-moe tied mha": ("Qwen3MoeForCausalLM", {"tie_embeddings": True, "num_kv_heads": 4, "norm_topk_prob": False}),
    "qwen3-moe dense first": ("Qwen3MoeForCausalLM", {"num_layers": 5, "first_dense_layers": 2, "moe_every": 2}),
    "qwen3-moe window": ("Qwen3MoeForCausalLM", {"sliding_window": 7}),
    "qwen3": ("Qwen3ForCausalLM", {"num_experts": 0}),
    "qwen3 tied window": ("Qwen3ForCausalLM", {"num_experts": 0, "tie_embeddings": True, "sliding_window": 7}),
    "qwen3 yarn": ("Qwen3ForCausalLM", {"num_experts": 0, "rope_scaling": YARN}),
    "llama": ("LlamaForCausalLM", {"num_experts": 0, "qk_norm": False, "num_kv_heads": 4}),
    "llama tied llama3": (
        "LlamaForCausalLM", {"num_experts": 0, "qk_norm": False, "tie_embeddings": True, "rope_scaling": LLAMA3},
    ),
    "mistral": ("MistralForCausalLM", {"num_experts": 0, "qk_norm": False, "sliding_window": 7, "head_dim": 16}),
    "mistral tied yarn": (
        "MistralForCausalLM",
        {"num_experts": 0, "qk_norm": False, "sliding_window": 7, "tie_embeddings": True, "rope_scaling": YARN},
    ),
    "qwen2": ("Qwen2ForCausalLM", {"num_experts": 0, "qk_norm": False, "qkv_bias": True}),
    "qwen2 tied window": (
        "Qwen2ForCausalLM",
        {"num_experts": 0, "qk_norm": False, "qkv_bias": True, "tie_embeddings": True, "sliding_window": 7,
         "rope_scaling": YARN},
    ),
    "qwen2-moe bias": ("Qwen2MoeForCausalLM", {**QWEN2, "qkv_bias": True}),
    "llama linear": ("LlamaForCausalLM", {"num_experts": 0, "qk_norm": False, "rope_scaling": LINEAR}),
    "mixtral": ("MixtralForCausalLM", {"qk_norm": False, "rope_theta": 5e4}),
    "mixtral window": ("MixtralForCausalLM", {"qk_norm": False, "sliding_window": 7, "norm_eps": 1e-4}),
    "qwen3-moe all groups": ("Qwen3MoeForCausalLM", {"expert_groups": 2, "top_groups": 2, "capacity_factor": 0.5}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**QWEN2, "norm_topk_prob": False, "head_dim": 16}),
    "qwen2-moe tied dense first": (
        "Qwen2MoeForCausalLM", {**QWEN2, "tie_embeddings": True, "num_layers": 3, "first_dense_layers": 2},
    ),
    "qwen2-moe every second": ("Qwen2MoeForCausalLM", {**QWEN2, "moe_every": 2}),
    "glm": ("Glm4MoeForCausalLM", DEEPSEEK),
    "glm tied yarn": (
        "Glm4MoeForCausalLM",
        {**DEEPSEEK, "qk_norm": False, "tie_embeddings": True, "rope_scaling": YARN, "head_dim": 16},
    ),
    "glm one group, nothing shared": ("Glm4MoeForCausalLM", PLAIN_SIGMOID),
    "dots1": ("Dots1ForCausalLM", {**DEEPSEEK, "sliding_window": 7, "tie_embeddings": True}),
    "dots1 one group, nothing shared": ("Dots1ForCausalLM", {**PLAIN_SIGMOID, "sliding_window": 7}),
}  # fmt: skip


def theirs(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def biased(config):
    """A model whose biases, if it has any, are large enough to show: of q, k and v, and those that balance experts."""
    module = tiny.model(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_(0.0, 0.5, generator=generator)
    for chooser in choosers(module):
        if chooser.bias is not None:
            generator = torch.Generator().manual_seed(chooser.layer)
            chooser.bias = torch.randn(config.num_experts, generator=generator)
    return module


def load(module, weights):
    """Strictly: every tensor is a parameter or the bias of a chooser."""
    weights = dict(weights)
    for chooser in choosers(module):
        if chooser.bias is not None:
            chooser.bias = weights.pop(bias_name(chooser.layer))
    module.load_state_dict(weights)


@pytest.mark.parametrize(("name", "changes"), CASES.values(), ids=CASES.keys())
def test_both_directions(tmp_path, name, changes):
    config = tiny.config(**changes)
    module, batch = biased(config).eval(), tiny.batch()
    export_hf(module, config, tmp_path / "ours")
    peer = theirs(tmp_path / "ours")
    assert type(peer).__name__ == name
    with torch.no_grad():
        expected = module.logits(batch)
        assert (peer(batch.input_ids).logits - expected).abs().max() < 1e-5
    peer.save_pretrained(tmp_path / "theirs")
    found, weights = import_hf(tmp_path / "theirs")
    skipped = {"intermediate_size", "loss_chunk", "expert_size", "top_k", "capacity_factor"}
    if config.top_groups == config.expert_groups:  # then groups mean nothing
        skipped |= {"top_groups", "expert_groups"}
    for key in config.model_dump().keys() - skipped:
        assert getattr(found, key) == getattr(config, key), key
    again = build(found).eval()
    load(again, weights)
    with torch.no_grad():
        assert (again.logits(batch) - expected).abs().max() < 1e-5


def test_tensor_names_are_those_of_save_pretrained(tmp_path):
    for number, changes in enumerate(({}, {"qk_norm": False}, QWEN2, DEEPSEEK, PLAIN_SIGMOID)):
        config = tiny.config(**changes)
        export_hf(biased(config), config, tmp_path / f"ours{number}")
        theirs(tmp_path / f"ours{number}").save_pretrained(tmp_path / f"theirs{number}")
        mine, other = (load_file(tmp_path / f"{who}{number}" / "model.safetensors") for who in ("ours", "theirs"))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_shards_special_tokens_and_dtype(tmp_path):
    config, batch = tiny.config(), tiny.batch()
    module = tiny.model(config)
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    export_hf(module, config, tmp_path / "out", special, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        assert (theirs(tmp_path / "out")(batch.input_ids).logits - module.logits(batch)).abs().max() < 1e-5
    loaded = theirs(tmp_path / "out")
    for each in (loaded.config, loaded.generation_config):
        assert {key: getattr(each, key) for key in special} == special
    export_hf(module, config, tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_the_bias_changes_choices_and_stays_fp32(tmp_path):
    config, batch = tiny.config(**DEEPSEEK), tiny.batch()
    module = biased(config)
    assert len(list(choosers(module))) == 2
    with torch.no_grad():
        logits = module.logits(batch)
        export_hf(module, config, tmp_path / "half", dtype=torch.bfloat16)
        before = [chooser.bias for chooser in choosers(module)]
        for chooser in choosers(module):
            chooser.bias = None
        assert (module.logits(batch) - logits).abs().max() > 0.1
    _, weights = import_hf(tmp_path / "half")
    assert all(torch.equal(weights[bias_name(1 + i)], bias) for i, bias in enumerate(before))
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert written["model.layers.1.mlp.shared_experts.up_proj.weight"].dtype == torch.bfloat16


def test_a_router_without_bias_is_one_whose_bias_is_zero(tmp_path):
    config = tiny.config(**{**DEEPSEEK, "router_bias_rate": None})
    module, batch = tiny.model(config), tiny.batch()
    export_hf(module, config, tmp_path)
    found, weights = import_hf(tmp_path)
    assert found.router_bias_rate == 0.0
    assert not weights[bias_name(2)].any()
    with torch.no_grad():
        assert (theirs(tmp_path)(batch.input_ids).logits - module.logits(batch)).abs().max() < 1e-5


def test_dots1_without_a_window(tmp_path):
    config, batch = tiny.config(**DEEPSEEK, sliding_window=7), tiny.batch()
    export_hf(biased(config), config, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"sliding_window": None}))
    found, weights = import_hf(tmp_path)
    assert found == config.model_copy(update={"sliding_window": None})
    module = build(found)
    load(module, weights)
    with torch.no_grad():
        assert (theirs(tmp_path)(batch.input_ids).logits - module.logits(batch)).abs().max() < 1e-5


def test_stacked_experts_are_read_too(tmp_path):
    config = tiny.config()
    module = tiny.model(config)
    export_hf(module, config, tmp_path)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    _, weights = import_hf(tmp_path)
    assert all(torch.equal(weights[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_expert_size": 8}, r"shared_expert_size=8 .*Qwen2-MoE.*GLM-4\.5"),
        ({"shared_expert_size": 8, "shared_expert_gate": True}, "shared_expert_gate=true with model.qk_norm=true"),
        ({**QWEN2, "sliding_window": 5}, "shared_expert_gate=true with model.sliding_window=5"),
        ({"qk_norm": False, "norm_topk_prob": False}, "norm_topk_prob"),
        ({"qk_norm": False, "first_dense_layers": 1}, "first_dense_layers=1"),
        ({"router": "hash"}, "router=hash"),
        ({"router_scale": 2.5}, "router_scale=2.5 with model.router=softmax"),
        ({"router_bias_rate": 0.0}, "router_bias_rate=0.0 with model.router=softmax"),
        ({"expert_groups": 4, "top_groups": 2}, "expert_groups=4 model.top_groups=2 with model.router=softmax"),
        ({"router": "sigmoid", "num_layers": 3, "moe_every": 2}, "moe_every=2"),
        ({"router": "sigmoid", "shared_expert_size": 40}, r"shared_expert_size=40 .*\(16\): 32 or 48"),
        ({"router": "sigmoid", "shared_expert_size": 16, "shared_expert_gate": True}, "shared_expert_gate=true"),
        ({"router": "sigmoid", "sliding_window": 5, "qk_norm": False}, "sliding_window=5 model.qk_norm=false"),
        ({"router": "sigmoid", "num_experts": 1, "top_k": 1}, "num_experts=1"),
        ({"num_experts": 0, "qkv_bias": True}, "qkv_bias=true with model.qk_norm=true"),
        ({"qk_norm": False, "qkv_bias": True}, "qkv_bias=true with model.qk_norm=false model.num_experts=4"),
        ({"block_sparse": BlockSparse()}, "block_sparse"),
    ],
)
def test_export_refuses(tmp_path, changes, message):
    config = tiny.config(**changes)
    with pytest.raises(ConfigError, match=message):
        export_hf(tiny.model(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_refuses(tmp_path):
    config = tiny.config()
    export_hf(tiny.model(config), config, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"model_type": "gpt2"}, "gpt2.* is not supported: should be one of llama, mistral, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias=true is not supported.*read from qwen2"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "unknown"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree | changes))
        with pytest.raises(ConfigError, match=message):
            import_hf(tmp_path)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        import_hf(tmp_path / "nowhere")


def test_import_refuses_what_deepseek_style_models_have_beside_their_experts(tmp_path):
    config = tiny.config(**DEEPSEEK)
    export_hf(biased(config), config, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    for changes, message in (
        (transformers.DeepseekV3Config().to_dict(), '"deepseek_v3" has multi-head latent attention .kv_lora_rank=512'),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"first_k_dense_replace": 0}, "missing"),
        ({"n_shared_experts": 0}, "6 unknown"),
        ({"n_group": 3}, "expert_groups=3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree | changes))
        with pytest.raises(ConfigError, match=message):
            import_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if k != "partial_rotary_factor"}))
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.5"):  # transformers' own default
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tree))
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 missing .*layers\.1\.mlp\.gate\.e_score_correction_bias"):
        import_hf(tmp_path)


def test_multi_token_prediction_layers_are_left_out(tmp_path):
    """As transformers leaves them out, for the layer that GLM-4.5 has: its key alone is no reason to refuse."""
    config, batch = tiny.config(**DEEPSEEK), tiny.batch()
    module = biased(config)
    export_hf(module, config, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    tensors = load_file(tmp_path / "model.safetensors")
    more = {"model.layers.3.eh_proj.weight": torch.zeros(2), "model.layers.3.shared_head.norm.weight": torch.zeros(2)}
    for beyond in ({}, more):
        save_file(tensors | beyond, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found, weights = import_hf(tmp_path)
        again = build(found)
        load(again, weights)
        with torch.no_grad():
            assert torch.equal(again.logits(batch), module.logits(batch))
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 unknown .*layers\.4\.eh_proj"):
        import_hf(tmp_path)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_missing_head_counts_are_those_of_transformers(model_type):
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 2, "vocab_size": 99}
    if model_type == "glm4_moe":
        sizes["partial_rotary_factor"] = 1.0
    experts = {"num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    tree = {"intermediate_size": 64, "moe_intermediate_size": 64, **sizes, **experts}
    for more in ({}, {"num_key_value_heads": 2, "head_dim": 64}):
        theirs = transformers.AutoConfig.for_model(model_type, **sizes, **more)
        ours, _ = from_hf_config({"model_type": model_type, **tree, **more})
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2048 // 32)


@pytest.mark.parametrize("kind", ["Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe"])
def test_missing_keys_of_config_json_have_the_defaults_of_transformers(tmp_path, kind):
    """The window of a model that slides, the base of its positions and the eps of its norms have defaults there."""
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "use_sliding_window": True,
        "max_window_layers": 2 if kind == "Qwen2Moe" else 0, "layer_types": None,
    }  # fmt: skip
    theirs = getattr(transformers, f"{kind}Config")
    tree = {"model_type": theirs.model_type, **sizes}
    if kind == "Qwen2Moe":
        tree |= {"num_hidden_layers": 1}
    expected = theirs(**tree)
    found, _ = from_hf_config(tree)
    assert found.sliding_window == expected.sliding_window
    assert found.norm_eps == expected.rms_norm_eps
    assert found.rope_theta == expected.rope_parameters["rope_theta"]
    assert found.max_positions == expected.max_position_embeddings
    assert found.tie_embeddings == expected.tie_word_embeddings


def test_old_and_new_rope_keys_that_say_the_same(tmp_path):
    """rope_theta stands at the top in transformers 4, in rope_parameters in 5; defaults may be written out."""
    config = tiny.config(num_experts=0, rope_scaling={"kind": "linear", "factor": 4.0}, rope_theta=5e5)
    module, batch = tiny.model(config), tiny.batch()
    export_hf(module, config, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    old, new = {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    for more in ({"rope_scaling": old}, {"rope_scaling": new, "rope_theta": None}, {"rope_scaling": old | new}):
        given = tree | {"rope_parameters": new} | more
        found, _ = from_hf_config({key: value for key, value in given.items() if value is not None})
        assert (found.rope_scaling, found.rope_theta) == (config.rope_scaling, 5e5)
    (tmp_path / "config.json").write_text(json.dumps(tree | {"rope_parameters": new, "rope_scaling": old}))
    with torch.no_grad():
        assert (theirs(tmp_path)(batch.input_ids).logits - module.logits(batch)).abs().max() < 1e-5
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    found, _ = from_hf_config(
        tree | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": yarn | {"beta_fast": 32.0}}
    )
    assert found.rope_scaling.original_max_positions == tree["max_position_embeddings"] == 64
    for key, value in (("rope_theta", 1e4), ("factor", 2.0), ("rope_type", "default")):
        with pytest.raises(ConfigError, match="differ: keep one"):
            from_hf_config(tree | {"rope_scaling": old, "rope_parameters": new | {key: value}})


def test_the_original_length_may_stand_beside_the_scaling(tmp_path):
    config, batch = tiny.config(num_experts=0, rope_scaling=YARN), tiny.batch()
    module = tiny.model(config)
    export_hf(module, config, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["rope_scaling"]["original_max_position_embeddings"] = 32
    (tmp_path / "config.json").write_text(json.dumps(tree | {"original_max_position_embeddings": 16}))
    assert import_hf(tmp_path)[0].rope_scaling == YARN
    with torch.no_grad():
        assert (theirs(tmp_path)(batch.input_ids).logits - module.logits(batch)).abs().max() < 1e-5


def test_a_yarn_export_names_the_versions_that_read_it(tmp_path, capsys):
    config = tiny.config(num_experts=0, rope_scaling=YARN)
    export_hf(tiny.model(config), config, tmp_path / "yarn")
    assert "has YaRN positions, which transformers computes as trained from version 4.57" in capsys.readouterr().err
    assert json.loads((tmp_path / "yarn" / "config.json").read_text())["transformers_version"] == "4.57.0"
    config = tiny.config(num_experts=0, rope_scaling=LINEAR)
    export_hf(tiny.model(config), config, tmp_path / "linear")
    assert capsys.readouterr().err == ""
