"""Routers: choices and weights against rules written out, and what jitter, bias, groups and capacity do to them."""

import pytest
import tiny_models as tiny
import torch

from models.decoder.layers import dropout_keys, jitter, salt
from models.moe.router import Chooser, Router, Routing, choosers, hash_choice, within_capacity


def routed(tokens: int = 40, training: bool = False, **changes) -> tuple[Routing, torch.Tensor, Chooser]:
    """(routing, logits [S, E], chooser) of random tokens through a random gate of 8 experts."""
    config = tiny.config(num_experts=8, **changes)
    torch.manual_seed(0)
    chooser, gate, x = Chooser(config, 0), Router(32, 8, bias=False), torch.randn(tokens, 32)
    chooser.prepare(
        torch.arange(tokens)[None], dropout_keys(0, torch.arange(1), tokens) if training else None, training
    )
    return chooser(gate, x), gate(x), chooser


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_weights_are_the_chosen_scores(router, normalise, top_k):
    found, logits, _ = routed(router=router, norm_topk_prob=normalise, top_k=top_k, router_scale=2.5)
    scores = logits.softmax(-1) if router == "softmax" else logits.sigmoid()
    best, choice = scores.topk(top_k, dim=-1)
    assert torch.equal(found.choice.sort().values, choice.sort().values)
    expected = 2.5 * (best / best.sum(-1, keepdim=True) if normalise else best)
    torch.testing.assert_close(found.weight.sort().values, expected.sort().values)


def test_bias_moves_choices_and_no_weights():
    plain, logits, chooser = routed(router="sigmoid", router_bias_rate=0.1, norm_topk_prob=False)
    bias = torch.tensor([10.0, 0, 0, 0, 0, 0, 0, -10.0])
    chooser.bias = bias
    torch.manual_seed(0)
    gate, x = Router(32, 8, bias=False), torch.randn(40, 32)
    found = chooser(gate, x)
    assert (found.choice == 0).any(-1).all()
    assert not (found.choice == 7).any()
    torch.testing.assert_close(found.weight, logits.sigmoid().gather(1, found.choice))
    assert (plain.choice == 7).any()


@pytest.mark.parametrize(("router", "best"), [("softmax", 1), ("sigmoid", 2)])
def test_groups_limit_the_choice(router, best):
    found, logits, _ = routed(router=router, expert_groups=4, top_groups=2, top_k=3)
    scores = logits.softmax(-1) if router == "softmax" else logits.sigmoid()
    for token, choice in zip(scores, found.choice, strict=True):
        rating = {group: sum(sorted(token[2 * group : 2 * group + 2].tolist())[-best:]) for group in range(4)}
        used = sorted(rating, key=lambda group: -rating[group])[:2]
        allowed = [2 * group + i for group in used for i in (0, 1)]
        assert set(choice.tolist()) == set(sorted(allowed, key=lambda e: -token[e])[:3])


def test_jitter_is_a_function_of_sequence_and_place():
    keys = dropout_keys(5, torch.tensor([3, 4]), 16)
    x = torch.ones(2, 16, 64)
    noisy = jitter(x, keys, 0.1)
    assert 0.9 <= noisy.min() < 0.91
    assert 1.09 < noisy.max() <= 1.1
    assert abs(float(noisy.mean()) - 1) < 0.01
    assert torch.equal(jitter(x[1:], keys[1:], 0.1), noisy[1:])
    assert not torch.equal(noisy[0], noisy[1])
    assert not torch.equal(routed(training=True, router_jitter=0.5)[0].choice, routed(router_jitter=0.5)[0].choice)


def test_capacity_takes_the_first_in_token_order():
    choice = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    kept = within_capacity(choice, 4, 2)
    assert kept.tolist() == [[True, True], [True, True], [True, False], [False, False]]
    found, _, _ = routed(training=True, capacity_factor=1.0)
    assert found.kept is not None
    assert torch.bincount(found.choice[found.kept], minlength=8).max() <= 10
    assert (found.weight[~found.kept] == 0).all()
    assert 0 < (~found.kept).sum() < 40
    assert routed(capacity_factor=1.0)[0].kept is None, "dropped at evaluation"


def test_hash_spreads_evenly_and_has_no_gate():
    choice = hash_choice(torch.arange(8000), 8, 2, salt(1))
    assert torch.bincount(choice[:, 0]).float().std() < 3 * 1000**0.5
    assert (choice[:, 0] != choice[:, 1]).all()
    assert not torch.equal(choice, hash_choice(torch.arange(8000), 8, 2, salt(2)))
    module = tiny.model(tiny.config(router="hash"))
    assert not [name for name, _ in module.named_parameters() if ".gate." in name]
    assert torch.isfinite(module(tiny.batch()).loss_sum)


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "sigmoid", "expert_groups": 2, "top_groups": 1, "router_bias_rate": 0.01, "router_scale": 2.0},
        {"router_jitter": 0.1, "capacity_factor": 1.0},
        {"capacity_factor": 0.75, "pad_to_capacity": True, "shared_expert_size": 8, "shared_expert_gate": True},
    ],
    ids=["deepseek", "switch", "padded"],
)
def test_checkpointing_and_a_later_pass_change_nothing(changes):
    """A layer that is computed again routes as it did, even when another batch went through in between."""
    config = tiny.config(**changes)
    results = []
    for every in (0, 1):
        module = tiny.model(config).train()
        module.set_activation_checkpointing(every)
        assert [chooser.layer for chooser in choosers(module)] == [0, 1]
        loss = module(tiny.batch(seed=0)).loss_sum + module(tiny.batch(seed=1)).loss_sum
        results.append(tiny.gradients(module, loss))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_padding_computes_what_dropping_does():
    results = []
    for pad in (False, True):
        module = tiny.model(tiny.config(capacity_factor=0.75, pad_to_capacity=pad)).train()
        loss = module(tiny.batch()).loss_sum
        results.append({"loss": loss, **tiny.gradients(module, loss)})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-5)
