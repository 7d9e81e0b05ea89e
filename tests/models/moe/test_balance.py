"""Balancing losses and loads, against formulas written out and against extreme routings."""

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from configs import ModelConfig
from models.moe.balance import RouterTap, router_stats
from models.moe.router import Heard, heard


def config(experts: int = 8, top_k: int = 2, **changes) -> ModelConfig:
    return tiny.config(num_experts=experts, top_k=top_k, **changes)


def listen(logits: Tensor, config: ModelConfig, sequences: int = 1) -> Heard:
    """The statistics of a router that chooses by its scores alone."""
    scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
    return heard(config, sequences, logits, scores, scores.topk(config.top_k, dim=-1).indices, None)


def stats(logits: Tensor, config: ModelConfig, sequences: int = 1, mean=None, loads=()):
    """Of logits [L, S, E]."""
    return router_stats([listen(layer, config, sequences) for layer in logits], list(loads), mean)


def random_logits(tokens: int = 60) -> Tensor:
    return torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("sequences", [1, 4])
def test_formulas_written_out(router, sequences):
    logits = random_logits()
    settings = config(router=router, aux_loss_over="sequence" if sequences > 1 else "micro_batch")
    found = stats(logits, settings, sequences)
    aux, z = [], []
    for layer in range(3):
        scores = logits[layer].softmax(-1) if router == "softmax" else logits[layer].sigmoid()
        p = scores / scores.sum(-1, keepdim=True)
        count = torch.bincount(p.topk(2).indices.flatten(), minlength=8)
        torch.testing.assert_close(found.load[layer], count / count.sum())
        for part in p.chunk(sequences):
            share = torch.bincount(part.topk(2).indices.flatten(), minlength=8) / (2 * len(part))
            aux.append(8 * (share * part.mean(0)).sum())
        z.append(torch.logsumexp(logits[layer], -1).square().mean())
        torch.testing.assert_close(found.entropy[layer], -(p * p.log()).sum(-1).mean())
        torch.testing.assert_close(found.confidence[layer], p.max(-1).values.mean())
    for value, terms in ((found.aux_loss, aux), (found.z_loss, z)):
        expected = sum(terms) / len(terms)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, logits, retain_graph=True),
            torch.autograd.grad(expected, logits, retain_graph=True),
        )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_under_perfect_balance_for_any_k(top_k):
    tokens = torch.arange(64)
    logits = torch.full((1, 64, 8), -20.0)
    for i in range(top_k):
        logits[0, tokens, (tokens + i) % 8] = 0.0
    found = stats(logits, config(top_k=top_k))
    torch.testing.assert_close(found.aux_loss, torch.tensor(1.0))
    torch.testing.assert_close(found.load, torch.full((1, 8), 1 / 8))


def test_collapse_costs_the_number_of_experts():
    logits = torch.full((1, 64, 8), -50.0)
    logits[..., 5] = 0.0
    torch.testing.assert_close(stats(logits, config(top_k=1)).aux_loss, torch.tensor(8.0))


def test_global_loads_take_the_place_of_the_micro_batchs_own():
    logits, settings = random_logits(), config(aux_loss_over="global_batch")
    loads = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).softmax(-1)
    found = stats(logits, settings, loads=loads)
    expected = (8 * loads * logits.softmax(-1).mean(1)).sum(-1).mean()
    torch.testing.assert_close(found.aux_loss, expected)
    torch.testing.assert_close(found.load, stats(logits, config()).load)


def test_tap_sees_what_the_model_routes():
    settings = tiny.config(num_layers=4, moe_every=2)
    module = tiny.model(settings)
    tap = RouterTap(module, settings)
    logits = {}
    for name, part in module.named_modules():
        if name.endswith("mlp.gate"):
            part.register_forward_hook(lambda m, a, out, name=name: logits.__setitem__(name, out))
    module(tiny.batch())
    assert len(logits) == 2
    expected = stats(torch.stack([*logits.values()]), settings)
    for found, value in zip(tap.collect(), expected, strict=True):
        torch.testing.assert_close(found, value)
    assert tap.collect() is None
    module(tiny.batch())
    for choice, layer in zip(tap.choices(), logits.values(), strict=True):
        assert torch.equal(choice, layer.topk(settings.top_k).indices)
    assert tap.collect() is None


@pytest.mark.parametrize("over", ["micro_batch", "sequence"])
def test_parts_together_have_the_losses_and_loads_of_the_whole(over):
    """Four parts of each of three sequences, as sequence parallelism has them."""
    logits, settings = random_logits(60), config(aux_loss_over=over)
    parts = [part.flatten(1, 2) for part in logits.unflatten(1, (3, 20)).chunk(4, dim=2)]
    means: list[Tensor] = []
    for part in parts:
        stats(part, settings, 3, lambda mean: means.append(mean) or mean)
    whole = stats(logits, settings, 3)
    for part in parts:
        found = stats(part, settings, 3, lambda mean: torch.stack(means).mean(0))
        for value, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(value, expected)
        for value, expected in zip(found[:2], whole[:2], strict=True):
            torch.testing.assert_close(
                torch.autograd.grad(value, logits, retain_graph=True),
                torch.autograd.grad(expected, logits, retain_graph=True),
            )
