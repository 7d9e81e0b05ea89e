"""Balancing losses and loads, against formulas written out and against extreme routings."""

import pytest
import tiny_models as tiny
import torch

from models.balance import RouterTap, router_stats


def test_formulas_written_out():
    logits = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    stats = router_stats(logits, top_k=2)
    aux, z = [], []
    for layer in range(3):
        p = logits[layer].softmax(-1)
        count = torch.bincount(p.topk(2).indices.flatten(), minlength=8)
        share = count / count.sum()
        torch.testing.assert_close(stats.load[layer], share)
        torch.testing.assert_close(stats.max_violation[layer], share.max() * 8 - 1)
        aux.append(8 * (share * p.mean(0)).sum())
        z.append(torch.logsumexp(logits[layer], -1).square().mean())
    for found, terms in ((stats.aux_loss, aux), (stats.z_loss, z)):
        expected = sum(terms) / 3
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, logits, retain_graph=True), torch.autograd.grad(expected, logits)
        )


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_under_perfect_balance_for_any_k(top_k):
    tokens = torch.arange(64)
    logits = torch.full((1, 64, 8), -20.0)
    for i in range(top_k):
        logits[0, tokens, (tokens + i) % 8] = 0.0
    stats = router_stats(logits, top_k)
    torch.testing.assert_close(stats.aux_loss, torch.tensor(1.0))
    torch.testing.assert_close(stats.max_violation, torch.zeros(1))


def test_collapse_costs_the_number_of_experts():
    logits = torch.full((1, 64, 8), -50.0)
    logits[..., 5] = 0.0
    torch.testing.assert_close(router_stats(logits, 1).aux_loss, torch.tensor(8.0))


def test_tap_sees_what_the_model_routes():
    config = tiny.config(num_layers=4, moe_every=2)
    module = tiny.model(config)
    tap = RouterTap(module, config)
    logits = {}
    for name, part in module.named_modules():
        if name.endswith("mlp.gate"):
            part.register_forward_hook(lambda m, a, out, name=name: logits.__setitem__(name, out))
    module(tiny.batch())
    stats = tap.collect()
    assert len(logits) == 2
    expected = router_stats(torch.stack([*logits.values()]), config.top_k)
    for found, value in zip(stats, expected, strict=True):
        torch.testing.assert_close(found, value)
    assert tap.collect() is None


def test_parts_together_have_the_losses_and_loads_of_the_whole():
    logits = torch.randn(3, 60, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    means: list[torch.Tensor] = []
    parts = logits.chunk(4, dim=1)
    for part in parts:
        router_stats(part, 2, lambda mean: means.append(mean) or mean)
    for part in parts:
        stats = router_stats(part, 2, lambda mean: torch.stack(means).mean(0))
        whole = router_stats(logits, 2)
        for found, expected in zip(stats, whole, strict=True):
            torch.testing.assert_close(found, expected)
        for found, expected in zip(stats[:2], whole[:2], strict=True):
            torch.testing.assert_close(
                torch.autograd.grad(found, logits, retain_graph=True),
                torch.autograd.grad(expected, logits, retain_graph=True),
            )
