"""Optimizers against torch's own and hand-written ones, and which parameters get weight decay or Muon."""

from itertools import chain

import pytest
import torch
from support import resolved
from torch import nn

from configs.sections.optim import OptimConfig
from models.families import build
from trainer.engine.guard import guard
from trainer.engine.optim import Muon, build_optimizer, newton_schulz, parameter_groups

STEPS = 5


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def both(ours, theirs, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights after the same steps by two optimizers, each built by a function of the parameter."""
    gradients = [weights(*shape, seed=10 + i) for i in range(STEPS)]
    a, b = (nn.Parameter(weights(*shape)) for _ in range(2))
    return train(a, ours(a), gradients), train(b, theirs(b), gradients)


def built(parameter: nn.Parameter, use_muon: bool = True, **config) -> torch.optim.Optimizer:
    settings = OptimConfig(**({"lr": 0.02, "weight_decay": 0.1} | config))
    group = {"params": [parameter], "weight_decay": settings.weight_decay, "use_muon": use_muon}
    return build_optimizer([group], settings)


# Muon


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (1, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torchs(shape, nesterov):
    ours, theirs = both(
        lambda p: built(p, name="muon", momentum=0.95, nesterov=nesterov),
        lambda p: torch.optim.Muon(
            [p], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
        ),
        *shape,
    )
    # Both orthogonalise in bf16 but round in different places: 2^-8 of the distance the weights moved, and a margin.
    moved = (theirs - weights(*shape)).norm()
    assert (ours - theirs).norm() <= 0.02 * moved


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24)])
def test_muon_treats_each_expert_as_its_own_matrix(shape):
    gradients = [weights(*shape, seed=10 + i) for i in range(STEPS)]
    gradients[1][2] *= 1e-4  # one expert that saw few tokens: its update is as large as the others'
    stacked = nn.Parameter(weights(*shape))
    together = train(stacked, built(stacked, name="muon"), gradients)
    for expert in range(shape[0]):
        one = nn.Parameter(weights(*shape)[expert].clone())
        alone = train(one, built(one, name="muon"), [gradient[expert] for gradient in gradients])
        moved = (alone - weights(*shape)[expert]).norm()
        assert (together[expert] - alone).norm() <= 0.02 * moved


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (2, 16, 16)])
def test_newton_schulz_makes_singular_values_near_1(shape):
    values = torch.linalg.svdvals(newton_schulz(weights(*shape)).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_of_a_zero_gradient_only_decays():
    parameter = nn.Parameter(weights(4, 6))
    made = train(parameter, built(parameter, name="muon"), [torch.zeros(4, 6)])
    torch.testing.assert_close(made, weights(4, 6) * (1 - 0.02 * 0.1))


def test_muons_other_groups_use_adamw():
    ours, theirs = both(
        lambda p: built(p, use_muon=False, name="muon"),
        lambda p: torch.optim.AdamW([p], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
        24,
        40,
    )
    torch.testing.assert_close(ours, theirs)


# Lion, Adagrad, and those that are torch's


def test_lion_is_algorithm_2():
    """Chen et al., arXiv 2302.06675: c = b1 m + (1 - b1) g; w -= lr (sign(c) + wd w); m = b2 m + (1 - b2) g."""
    lr, decay, beta1, beta2 = 0.02, 0.1, 0.9, 0.95
    parameter = nn.Parameter(weights(8, 8))
    gradients = [weights(8, 8, seed=10 + i) for i in range(STEPS)]
    made = train(parameter, built(parameter, name="lion", lr=lr, weight_decay=decay), gradients)

    w, m = weights(8, 8).double(), torch.zeros(8, 8).double()
    for gradient in gradients:
        c = beta1 * m + (1 - beta1) * gradient
        w = w - lr * (c.sign() + decay * w)
        m = beta2 * m + (1 - beta2) * gradient
    torch.testing.assert_close(made, w.float(), rtol=1e-5, atol=1e-6)


THEIRS = {
    "adamw": lambda p: torch.optim.AdamW([p], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam([p], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD([p], lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad([p], lr=0.02, eps=1e-8, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop([p], lr=0.02, alpha=0.99, eps=1e-8, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor([p], lr=0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", THEIRS)
def test_optimizer_equals_torchs(name):
    """Whatever kernel it runs on: torch's plain loop over parameters is the oracle."""
    ours, theirs = both(lambda p: built(p, name=name), THEIRS[name], 8, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_sgd_without_momentum():
    """Nesterov is asked for by default, and torch refuses it without momentum."""
    ours, theirs = both(
        lambda p: built(p, name="sgd", momentum=0.0), lambda p: torch.optim.SGD([p], lr=0.02, weight_decay=0.1), 8, 8
    )
    torch.testing.assert_close(ours, theirs)


def test_adagrad_keeps_each_groups_own_decay_when_its_parameters_are_swapped():
    """As ZeRO does: by then torch's Adagrad has its state, and would be built again from its defaults."""
    groups = [{"params": [nn.Parameter(weights(4))], "weight_decay": decay, "use_muon": False} for decay in (0.1, 0.0)]
    optimizer = build_optimizer(groups, OptimConfig(name="adagrad"))
    swapped = [nn.Parameter(weights(4)) for _ in optimizer.param_groups]
    for group, parameter in zip(optimizer.param_groups, swapped, strict=True):
        group["params"] = [parameter]
        parameter.grad = torch.ones(4)
    for _ in range(2):  # the first step of Adagrad is lr in every direction, decay or not
        optimizer.step()
    assert len(optimizer.state) == 2
    assert not torch.equal(swapped[0], swapped[1])


@pytest.mark.parametrize("name", [*THEIRS, "lion", "muon"])
def test_no_gradient_no_change(name):
    trained, idle = nn.Parameter(weights(4, 4)), nn.Parameter(weights(4, 4))
    group = {"params": [trained, idle], "weight_decay": 0.1, "use_muon": True}
    train(trained, build_optimizer([group], OptimConfig(name=name)), [weights(4, 4)])
    assert torch.equal(idle, weights(4, 4))
    assert not torch.equal(trained, weights(4, 4))


# Groups


def groups_of(model: dict, **optim) -> dict[tuple[bool, bool], list[str]]:
    """{(muon, decays): names}, names in the order of the group."""
    with torch.device("meta"):
        module = build(resolved(model=model).model)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, OptimConfig(**optim))
    assert {group["weight_decay"] for group in groups} <= {0.0, 0.1}
    found = {(g["use_muon"], g["weight_decay"] > 0): [names[id(p)] for p in g["params"]] for g in groups}
    assert len(found) == len(groups), "two groups of a kind"
    order = list(names.values())
    assert sorted(chain(*found.values())) == sorted(order), "every parameter stands in one group"
    for members in found.values():
        assert members == [name for name in order if name in members], "the order is the module's"
    return found


MODEL = {"num_layers": 2, "shared_expert_size": 16, "first_dense_layers": 1}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_norms_and_embeddings_do_not_decay(name):
    groups = groups_of(MODEL, name=name)
    assert groups.keys() == {(False, True), (False, False)}
    kept = groups[False, False]
    assert "model.embed_tokens.weight" in kept
    assert all("norm" in each or "embed_tokens" in each for each in kept)
    decaying = groups[False, True]
    assert not [each for each in decaying if "norm" in each or "embed" in each]
    ends = {each.rpartition("model.layers.1.")[2] for each in decaying}
    assert {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight",
            "lm_head.weight", "mlp.shared_expert.gate_proj.weight"} <= ends  # fmt: skip


def test_decay_all():
    assert groups_of(MODEL, decay_all=True).keys() == {(False, True)}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_leaves_out_embeddings_head_and_vectors(tied):
    groups = groups_of(MODEL | {"tie_embeddings": tied}, name="muon")
    assert not [each for each in groups[True, True] if "embed" in each or "lm_head" in each or "norm" in each]
    assert groups.get((False, True), []) == ([] if tied else ["lm_head.weight"])
    assert "model.embed_tokens.weight" in groups[False, False]


def test_biases_do_not_decay_and_frozen_parameters_are_in_no_group():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[1].weight.requires_grad_(False)
    groups = parameter_groups(module, OptimConfig())
    found = [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
    assert found == [(0.1, [(4, 3)]), (0.0, [(4,), (2,)])]


def test_all_groups_of_muon_share_one_learning_rate():
    """`set_learning_rate` sets every group's rate: each must use it at its next step."""
    matrix, vector = nn.Parameter(weights(4, 4)), nn.Parameter(weights(4))
    optimizer = Muon(
        [{"params": [matrix]}, {"params": [vector], "use_muon": False}],
        lr=1.0, betas=(0.9, 0.95), eps=1e-8, momentum=0.9, nesterov=True,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(matrix, weights(4, 4))
    assert torch.equal(vector, weights(4))


# Skipped steps at ZeRO-0


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad", "rmsprop", "adafactor", "lion", "muon"])
def test_a_non_finite_gradient_leaves_weights_and_states_unchanged(name, use_muon):
    """The first one too, before there is any state."""
    gradients = [weights(6, 8, seed=10 + i) for i in range(STEPS)]
    spoiled = weights(6, 8)
    spoiled[3, 5] = torch.inf
    ends = []
    for given in (gradients, [spoiled, *gradients[:2], spoiled * torch.nan, *gradients[2:], spoiled]):
        parameter = nn.Parameter(weights(6, 8))
        optimizer = built(parameter, use_muon, name=name, momentum=0.9)
        guard(optimizer, 0.5)
        train(parameter, optimizer, given)
        ends.append({"weight": parameter.detach()} | optimizer.state[parameter])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
