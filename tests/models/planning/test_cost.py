"""Counts from the config alone equal the built module's and the products that torch executes."""

import pytest
import tiny_models as tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.batch import Batch
from models.families import build
from models.planning.cost import forward_flops_per_token, parameters, training_flops_per_token

CONFIGS = {
    "moe": {},
    "dense": {"num_experts": 0},
    "tied": {"tie_embeddings": True, "num_kv_heads": 4},
    "every second, shared": {"num_layers": 5, "moe_every": 2, "first_dense_layers": 2, "shared_expert_size": 24},
    "no qk-norm": {"qk_norm": False, "top_k": 1},
    "biases": {"qk_norm": False, "qkv_bias": True},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters(changes):
    config = tiny.config(**changes)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in build(config).named_parameters()}
    counts = parameters(config)
    part = lambda *keys: sum(n for name, n in sizes.items() if any(key in name for key in keys))  # noqa: E731
    assert counts.total == sum(sizes.values())
    assert counts.experts == part(".experts.")
    assert counts.router == part("mlp.gate.weight")
    assert counts.norms == part("norm", ".bias")
    assert counts.attention == part(*(f"{name}_proj.weight" for name in ("self_attn.q", "k", "v", "o")))
    assert counts.without_embeddings == counts.total - part("embed_tokens", "lm_head")
    unused = counts.experts * (config.num_experts - config.top_k) // config.num_experts if config.is_moe else 0
    assert counts.active == counts.total - unused


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_flops_equal_those_executed(changes):
    """On the meta device attention is the plain one, which multiplies whole T x T squares: its share is put right by
    hand to the T * (T + 1) / 2 pairs that are seen. The experts run as grouped products with all assignments."""
    config, rows, length = tiny.config(**changes), 2, 24
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = Batch(ids, ids, ids, None, torch.zeros(rows, dtype=torch.long))
    module = build(config)
    module.init_weights(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(batch)
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counted.items() if "attention" in op)
    matrices = sum(counted.values()) - attention
    pairs = length * (length + 1) / 2
    per_pair = 4 * config.num_layers * config.num_heads * config.head_dim
    assert forward_flops_per_token(config, length) * rows * length == matrices + rows * pairs * per_pair
    assert training_flops_per_token(config, length) == 3 * forward_flops_per_token(config, length)


def test_sliding_window_counts_the_keys_seen():
    full, windowed = tiny.config(), tiny.config(sliding_window=5)
    keys = sum(min(t + 1, 5) for t in range(24)) - sum(t + 1 for t in range(24))
    difference = forward_flops_per_token(windowed, 24) - forward_flops_per_token(full, 24)
    assert difference * 24 == pytest.approx(4 * keys * full.num_layers * full.num_heads * full.head_dim)
