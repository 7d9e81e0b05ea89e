"""Logits equal transformers' own, in both directions; what no architecture computes is refused by name."""

import json

import pytest
import tiny_models as tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs import BlockSparse, ConfigError, RopeScaling
from models.families import build
from models.hf import export_hf, import_hf

LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_positions=16, high_freq_factor=3.0)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_positions=16)
LINEAR = RopeScaling(kind="linear", factor=3.0)
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
    "llama linear": ("LlamaForCausalLM", {"num_experts": 0, "qk_norm": False, "rope_scaling": LINEAR}),
    "mixtral": ("MixtralForCausalLM", {"qk_norm": False, "rope_theta": 5e4}),
    "mixtral window": ("MixtralForCausalLM", {"qk_norm": False, "sliding_window": 7, "norm_eps": 1e-4}),
}  # fmt: skip


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "changes"), CASES.values(), ids=CASES.keys())
def test_both_directions(tmp_path, name, changes):
    config = tiny.config(**changes)
    module, batch = tiny.model(config), tiny.batch()
    export_hf(module, config, tmp_path / "ours")
    peer = theirs(tmp_path / "ours")
    assert type(peer).__name__ == name
    with torch.no_grad():
        expected = module.logits(batch)
        assert (peer(batch.input_ids).logits - expected).abs().max() < 1e-5
    peer.save_pretrained(tmp_path / "theirs")
    found, weights = import_hf(tmp_path / "theirs")
    skipped = {"intermediate_size", "loss_chunk", "expert_size", "top_k"}
    for key in config.model_dump().keys() - skipped:
        assert getattr(found, key) == getattr(config, key), key
    again = build(found)
    again.load_state_dict(dict(weights))
    with torch.no_grad():
        assert (again.logits(batch) - expected).abs().max() < 1e-5


def test_tensor_names_are_those_of_save_pretrained(tmp_path):
    for number, changes in enumerate(({}, {"qk_norm": False})):
        config = tiny.config(**changes)
        export_hf(tiny.model(config), config, tmp_path / f"ours{number}")
        theirs(tmp_path / f"ours{number}").save_pretrained(tmp_path / f"theirs{number}")
        mine, other = (load_file(tmp_path / f"{who}{number}" / "model.safetensors") for who in ("ours", "theirs"))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_shards_tokenizer_and_dtype(tmp_path):
    config, batch = tiny.config(), tiny.batch()
    module = tiny.model(config)
    tokenizer = tmp_path / "tokenizer.json"
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tokenizer))
    export_hf(module, config, tmp_path / "out", tokenizer=tokenizer, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        assert (theirs(tmp_path / "out")(batch.input_ids).logits - module.logits(batch)).abs().max() < 1e-5
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.eos_token_id == 1
    assert theirs(tmp_path / "out").config.eos_token_id == 1
    export_hf(module, config, tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


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
        ({"shared_expert_size": 8}, "shared_expert_size=8"),
        ({"qk_norm": False, "norm_topk_prob": False}, "norm_topk_prob"),
        ({"num_experts": 0, "qk_norm": False, "sliding_window": 5}, "sliding_window"),
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
        ({"model_type": "gpt2"}, "gpt2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "unknown"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree | changes))
        with pytest.raises(ConfigError, match=message):
            import_hf(tmp_path)
    with pytest.raises(ConfigError, match="no Hugging Face model folder"):
        import_hf(tmp_path / "nowhere")
