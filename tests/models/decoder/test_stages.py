"""Stages of a decoder, one after the other in one process, against the whole decoder."""

import copy

import pytest
import torch
from engines import batch_of
from support import TINY_MODEL, resolved

from models.decoder.stages import Stage, Stages
from models.families import build
from models.moe.balance import RouterTap

KINDS = {
    "dense": {"num_experts": 0, "dropout": 0.1},
    "moe": {"aux_loss_weight": 0.5, "z_loss_weight": 0.5},
    "half moe": {"aux_loss_weight": 0.5, "z_loss_weight": 0.5, "first_dense_layers": 3},
}


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_whole_model(kind, stages):
    """Router losses too, which stages before the last put into the gradient only."""
    config = resolved(model=TINY_MODEL | {"num_layers": 5} | KINDS[kind])
    whole = build(config.model)
    whole.init_weights(0)
    batch = batch_of(config, [3, 4])
    tap = RouterTap(whole, config.model)
    out = whole(batch)
    loss = out.loss_sum / 7
    if router := tap.collect():
        loss = loss + config.model.aux_loss_weight * router.aux_loss + config.model.z_loss_weight * router.z_loss
    loss.backward()

    with torch.device("meta"):
        plain = build(config.model)
    parts = [Stage(copy.deepcopy(plain), i, stages).to_empty(device="cpu") for i in range(stages)]
    x = batch.input_ids
    for part in parts:
        part.init_weights(0)
        part.set_activation_checkpointing(2)
        part.feed([batch], loss_factor=1 / 7)
        x = part(x)
    x.backward()

    found = list(Stages(parts).named_parameters())
    assert sorted(name for name, _ in found) == sorted(name for name, _ in whole.named_parameters())
    expected = dict(whole.named_parameters())
    for name, parameter in found:
        assert torch.equal(parameter, expected[name]), name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7, msg=name)
    measured = [part.measured[0] for part in parts]
    assert [m.loss and m.loss.tokens for m in measured] == [None] * (stages - 1) + [out.tokens]
    torch.testing.assert_close(measured[-1].loss.loss_sum, out.loss_sum.detach())
    if router:
        torch.testing.assert_close(torch.cat([m.router.load for m in measured if m.router]), router.load)
