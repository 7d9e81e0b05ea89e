"""Upcycling: a MoE that begins as the dense model it came from, and what noise and dropped units change."""

import pytest
import torch
from tiny_models import batch, config, model
from torch import nn

from configs import ConfigError, ModelConfig
from configs.sections.train import UpcycleConfig
from models.families import build
from models.moe.upcycle import block_of, upcycle

WIDTH = 48
DENSE = config(num_experts=0, intermediate_size=WIDTH)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return model(DENSE).eval()


def upcycled(dense: nn.Module, moe: ModelConfig, how: UpcycleConfig | None = None, seed: int = 0) -> nn.Module:
    module, weights = build(moe), dense.state_dict()
    for name, parameter in module.named_parameters():
        if block_of(name):
            upcycle(parameter, name, weights.__getitem__, WIDTH, moe, how or UpcycleConfig(), seed)
        else:
            parameter.data.copy_(weights[name])
    return module.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 4},
        {"top_k": 2},  # copies: it does not matter which are chosen
        {"router": "sigmoid", "router_scale": 2.5, "router_bias_rate": 0.0, "top_k": 4},
        {"router": "hash"},
        {"shared_expert_size": 16, "shared_expert_gate": True},
        {"expert_size": WIDTH // 2, "num_experts": 6, "top_k": 6},
        {"expert_size": WIDTH // 3, "num_experts": 12, "top_k": 6},  # whole groups of three
        {"expert_size": WIDTH // 2, "num_experts": 8, "expert_groups": 2, "router": "sigmoid"},
        {"expert_size": WIDTH // 2, "num_experts": 6, "router": "hash", "router_scale": 0.5},
    ],
)
def test_it_begins_as_the_dense_model(dense, changes):
    moe = upcycled(dense, config(**{"expert_size": WIDTH, **changes}))
    with torch.no_grad():
        torch.testing.assert_close(moe.logits(batch()), dense.logits(batch()), rtol=0, atol=1e-5)


def test_routers_begin_at_random(dense):
    moe = config(expert_size=WIDTH)
    fresh = build(moe)
    fresh.init_weights(3)
    for layer, random in zip(upcycled(dense, moe, seed=3).model.layers, fresh.model.layers, strict=True):
        assert torch.equal(layer.mlp.gate.weight, random.mlp.gate.weight)


def rows(module: nn.Module) -> torch.Tensor:
    """[E, WIDTH, 3 H]: gate, up and down weights of each hidden unit of the first layer's experts."""
    experts = module.model.layers[0].mlp.experts
    return torch.cat([*experts.gate_up_proj.chunk(2, dim=1), experts.down_proj.transpose(1, 2)], dim=-1).detach()


def test_dropped_units_are_drawn_anew_and_others_in_each_expert(dense):
    moe = config(expert_size=WIDTH)
    plain, found = rows(upcycled(dense, moe)), rows(upcycled(dense, moe, UpcycleConfig(drop_ratio=0.25)))
    new = found != plain
    assert torch.equal(new.any(-1), new.all(-1)), "a unit is dropped with its gate, up and down weights, or not at all"
    new = new.all(-1)
    assert new.sum(1).tolist() == [WIDTH // 4] * 4
    assert len({tuple(row.tolist()) for row in new}) == 4
    for old, drawn in zip(plain[new].chunk(3, dim=-1), found[new].chunk(3, dim=-1), strict=True):
        assert drawn.std().item() == pytest.approx(old.std().item(), rel=0.1)
        assert not torch.equal(drawn[:12], drawn[12:24])
    assert (rows(upcycled(dense, moe, UpcycleConfig(drop_ratio=1.0))) != plain).all()


def test_drawn_units_have_the_mean_of_the_dropped(dense):
    shifted = build(DENSE)
    shifted.load_state_dict({k: v + 5.0 if ".mlp." in k else v for k, v in dense.state_dict().items()})
    found = rows(upcycled(shifted, config(expert_size=WIDTH), UpcycleConfig(drop_ratio=1.0)))
    assert found.mean().item() == pytest.approx(5.0, abs=0.05)


def test_noise_is_in_deviations_of_each_matrix(dense):
    wide = build(DENSE)
    wide.load_state_dict({k: v * 10 if ".up_proj." in k else v for k, v in dense.state_dict().items()})
    moe = config(expert_size=WIDTH)
    plain = rows(upcycled(wide, moe))
    noise = (rows(upcycled(wide, moe, UpcycleConfig(noise=0.01))) - plain).chunk(3, dim=-1)
    for part, weight in zip(noise, plain.chunk(3, dim=-1), strict=True):
        assert part.std().item() == pytest.approx(0.01 * weight.std().item(), rel=0.05)
        assert not torch.equal(part[0], part[1])


def test_draws_depend_on_seed_name_and_expert_only(dense):
    how = UpcycleConfig(noise=0.1, drop_ratio=0.5)
    four, eight = config(expert_size=WIDTH), config(expert_size=WIDTH, num_experts=8)
    torch.manual_seed(1)
    first = rows(upcycled(dense, four, how))
    torch.manual_seed(2)
    assert torch.equal(first, rows(upcycled(dense, eight, how))[:4])
    assert not torch.equal(first, rows(upcycled(dense, four, how, seed=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_size": 64}, "width 48, .* model.expert_size is 64: set it to 48"),
        ({"expert_size": 20}, "model.expert_size is 20"),
        ({"expert_size": 16, "num_experts": 8, "top_k": 3}, r"3 slices.* model.num_experts / .* \(8\)"),
        ({"expert_size": 16, "num_experts": 6, "top_k": 2}, r"model.top_k \(2\)"),
        ({"expert_size": 24, "num_experts": 6, "expert_groups": 2}, r"model.expert_groups \(3\)"),
    ],
)
def test_widths_that_cannot_be_sliced_are_refused(dense, changes, message):
    with pytest.raises(ConfigError, match=message):
        upcycled(dense, config(**changes))
