"""The multilayer perceptron: what it computes, its initial values, and dropout that no split of a batch changes."""

import math

import pytest
import torch
from torch.nn import functional as F

from configs import from_dict
from configs.sections.families.mlp import Activation, Initialisation
from models.families import build
from models.init import fill, scale_outputs
from models.noise import dropout, dropout_keys_of


def network(seed=0, **keys):
    module = build(from_dict({"model": {"family": "mlp", "inputs": 6, "outputs": 3, "hidden": [8], **keys}}).model)
    fill(module, seed)
    return module


FUNCTIONS = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": F.relu, "leaky_relu": F.leaky_relu, "swish": F.silu,
    "gelu": F.gelu, "prelu": lambda x: torch.where(x > 0, x, 0.25 * x),
    "swiglu": lambda x: F.silu(x[:, :8]) * x[:, 8:],
}  # fmt: skip


@pytest.mark.parametrize("activation", Activation.__args__)
def test_it_is_its_formula(activation):
    module, x = network(activation=activation), torch.randn(5, 6)
    linear = module.layers[0][0]
    hidden = FUNCTIONS[activation](x @ linear.weight.T + linear.bias)
    assert torch.allclose(module(x), hidden @ module.head.weight.T + module.head.bias, atol=1e-6)


def test_without_hidden_layers_it_is_linear():
    module, x = network(hidden=[]), torch.randn(5, 6)
    assert torch.equal(module(x), F.linear(x, module.head.weight, module.head.bias))


@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
def test_normalisation_comes_before_the_activation(norm):
    module, x = network(norm=norm, activation="tanh"), torch.randn(50, 6)
    linear, layer, _ = module.layers[0]
    mean_of = 0 if norm == "batch" else 1
    before = layer(linear(x))
    moment = before.square().mean(1) - 1 if norm == "rms" else before.mean(mean_of)
    assert torch.allclose(moment, torch.zeros(()), atol=1e-2 if norm == "rms" else 1e-5)
    assert torch.allclose(module(x), module.head(torch.tanh(before)), atol=1e-6)


SPREAD = {
    "torch": 1 / math.sqrt(3 * 400), "xavier_uniform": math.sqrt(2 / 700), "xavier_normal": math.sqrt(2 / 700),
    "he_uniform": math.sqrt(2 / 400), "he_normal": math.sqrt(2 / 400), "orthogonal": 1 / math.sqrt(400),
    "truncated_normal": 0.02 * 0.880, "he_uniform_fan_out": math.sqrt(2 / 300),
    "he_normal_fan_out": math.sqrt(2 / 300), "lsuv": 1 / math.sqrt(400),  # before examples scale it
}  # fmt: skip


@pytest.mark.parametrize("way", Initialisation.__args__)
def test_initial_values_have_their_spread(way):
    module = network(inputs=400, hidden=[300, 2], init=way)
    weight, bias = module.layers[0][0].weight, module.layers[0][0].bias
    assert weight.std().item() == pytest.approx(SPREAD[way], rel=0.02)
    assert bool(bias.any()) == (way == "torch")
    if way == "orthogonal":
        assert torch.allclose(weight @ weight.T, torch.eye(300), atol=1e-4)
    again, other = (network(seed, inputs=400, hidden=[300, 2], init=way) for seed in (0, 1))
    assert torch.equal(again.layers[0][0].weight, weight)
    assert not torch.equal(other.layers[0][0].weight, weight)
    assert not torch.equal(weight.flatten()[:600], module.layers[1][0].weight.flatten())


@pytest.mark.parametrize("family", ["mlp", "convnet"])
def test_lsuv_gives_every_layers_outputs_a_variance_of_1(family):
    own = {"hidden": [40, 30, 20], "activation": "tanh"}
    stages = [{"width": 8, "pool": "max2"}, {"block": "basic", "width": 12, "depth": 2, "stride": 2}]
    convnet = {"family": "convnet", "channels": 1, "norm": "none", "stages": stages}
    module = network(init="lsuv", inputs=64, **own) if family == "mlp" else build(
        from_dict({"model": convnet | {"init": "lsuv"}, "data": {"path": "x"}}).model
    )  # fmt: skip
    fill(module, 0)
    x, found = 3 * torch.randn(64, 1, 8, 8) + 1, []
    layers = {part: part.weight.detach().clone() for part in module.modules()
              if isinstance(part, torch.nn.Linear | torch.nn.Conv2d)}  # fmt: skip
    scale_outputs(module, lambda: module(x))
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, out: found.append(out.std().item()))
    module(x)
    assert found == pytest.approx([1] * len(layers), abs=1e-4)
    for layer, before in layers.items():  # scaled, and nothing else
        ratio = (layer.weight / before).flatten()
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)


def test_dropped_weights_belong_to_the_example():
    module, x, ids = network(drop_connect=0.5, hidden=[64]), torch.randn(8, 6), torch.arange(8) + 100
    keys, linear = dropout_keys_of(3, ids), module.layers[0][0]
    whole = module(x, keys)
    parts = [module(x[i : i + 2], keys[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert torch.equal(module(x), network(hidden=[64])(x))
    many = linear(torch.ones(6000, 6), dropout_keys_of(0, torch.arange(6000)), 1, 0.25) - linear.bias
    weight = linear.weight
    assert torch.allclose(many.mean(0), weight.sum(1), atol=0.03)
    # Each weight is there or not by itself: the variances add up.
    assert torch.allclose(many.var(0), weight.square().sum(1) / 3, rtol=0.15)


def test_dropout_belongs_to_the_example():
    module, x, ids = network(dropout=0.5, hidden=[64, 64]), torch.randn(8, 6), torch.arange(8) + 100
    whole = module(x, dropout_keys_of(3, ids))
    parts = [module(x[i : i + 2], dropout_keys_of(3, ids[i : i + 2])) for i in range(0, 8, 2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert not torch.allclose(whole, module(x, dropout_keys_of(4, ids)), atol=1e-2)
    assert not torch.allclose(whole, module(x), atol=1e-2)


@pytest.mark.parametrize(("dims", "equal_over"), [(None, ()), (1, (2, 3)), (0, (1, 2, 3))])
def test_dropout_keeps_the_mean_and_drops_what_it_should(dims, equal_over):
    kept = dropout(torch.ones(4000, 4, 3, 3), dropout_keys_of(0, torch.arange(4000)), 1, 0.25, dims)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    for dim in (1, 2, 3):
        assert torch.equal(kept, kept.select(dim, 0).unsqueeze(dim).expand_as(kept)) == (dim in equal_over)
