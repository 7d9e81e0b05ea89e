"""The moving average of the weights against torch's own AveragedModel over a bare loop, skipped steps included; other
things that are done to weights and gradients around a step, against a bare loop that does them."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from support import resolved
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.sections.optim import OptimConfig
from models.noise import normal_of_elements
from trainer.engine.ema import Ema, ema_decay
from trainer.engine.engine import Engine
from trainer.engine.optim import build_optimizer, parameter_groups
from trainer.engine.slots import Slot
from trainer.engine.start import start_processes

STEPS = 12
DECAY = 0.5
"""Reached at step 8: (1 + 8) / (10 + 8)."""
OPTIM = OptimConfig(name="adamw", lr=1e-2, ema_decay=DECAY)


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


def network() -> nn.Module:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    found[0].bias.requires_grad_(False)
    return found


def examples(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=random), torch.randn(6, 3, generator=random)


def bare(steps: int) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(network, its average) after each step."""
    net = network()
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    optimizer = build_optimizer(parameter_groups(net, OPTIM), OPTIM)
    for step in range(1, steps + 1):
        given, wanted = examples(step)
        F.mse_loss(net(given), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.multi_avg_fn = get_ema_multi_avg_fn(min(DECAY, (1 + step) / (10 + step)))
        averaged.update_parameters(net)
        yield net, averaged.module


def engine(stage: int, precision: str = "fp32", optim: OptimConfig = OPTIM) -> Engine:
    config = resolved(
        train={"micro_batch": 1, "global_batch": 1, "precision": precision, "grad_clip": 0.0},
        parallel={"zero_stage": stage},
    )
    return Engine(network(), config, optim)


def take(engine: Engine, step: int, factor: float = 1.0) -> None:
    given, wanted = examples(step)
    engine.set_step(step)
    made = engine(given.to(torch.bfloat16) if engine.deepspeed.bfloat16_enabled() or engine._copies else given)
    engine.backward(F.mse_loss(made.float(), wanted) * factor)
    engine.step()


def averages(engine: Engine) -> dict[str, torch.Tensor]:
    """This process's share of every average, by parameter name."""
    found = {slot.name: slot.view(engine.ema.of(slot.owner)).clone() for slot in engine.slots()
             if engine.ema and engine.ema.of(slot.owner) is not None}  # fmt: skip
    assert found
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_average_equals_a_bare_loops(stage):
    trained = engine(stage)
    for step, (_, average) in enumerate(bare(STEPS), 1):
        take(trained, step)
        wanted = {name: each.detach().flatten() for name, each in average.named_parameters() if each.requires_grad}
        found = averages(trained)
        assert found.keys() == wanted.keys()
        assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-6
    (net, average), (given, _) = list(bare(STEPS))[-1], examples(0)
    with torch.no_grad():
        assert torch.allclose(trained(given), net(given), atol=1e-5)
        with trained.averaged():
            assert torch.allclose(trained(given), average(given), atol=1e-5)
        assert torch.allclose(trained(given), net(given), atol=1e-5)
        assert not torch.allclose(net(given), average(given), atol=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_from_a_step_on_it_is_the_plain_mean(stage):
    """Stochastic weight averaging, as torch's AveragedModel does it unless told otherwise."""
    first, trained = 5, engine(stage, optim=OPTIM.model_copy(update={"ema_decay": None, "swa_from": 5}))
    wanted: AveragedModel | None = None
    for step, (net, _) in enumerate(bare(STEPS), 1):
        take(trained, step)
        if wanted is None or step <= first:
            wanted = AveragedModel(net)
        wanted.update_parameters(net)
        named = {name: each.detach().flatten() for name, each in wanted.module.named_parameters()}
        found = averages(trained)
        assert max((value - named[name]).abs().max() for name, value in found.items()) < 1e-6


def test_it_counts_the_steps_that_change_its_weights():
    """Of a phase that every third step trains: those of step 6, 9 and 12, from step 5 on."""
    ema = Ema(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), [], None, 5)
    ema.every, shares = 3, []
    for ema.step in (3, 6, 9, 12):
        shares.append(ema.share)
    assert shares == [1, 1, 1 / 2, 1 / 3]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_by_value_is_torchs(stage):
    limit = 1e-3
    config = resolved(
        train={"micro_batch": 1, "global_batch": 1, "precision": "fp32", "grad_clip": 0.05, "clip_value": limit},
        parallel={"zero_stage": stage},
    )
    optim = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    trained, net = Engine(network(), config, optim), network()
    for step in (1, 2):
        given, wanted = examples(step)
        before = {name: each.detach().clone() for name, each in net.named_parameters()}
        net.zero_grad()
        F.mse_loss(net(given), wanted).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        nn.utils.clip_grad_value_(net.parameters(), limit)
        torch.optim.SGD(net.parameters(), lr=1.0).step()
        moved = torch.cat([(each - before[name]).flatten().abs() for name, each in net.named_parameters()])
        assert float(moved.max()) == pytest.approx(limit, rel=1e-3)
        assert float((moved < 0.9 * limit).float().mean()) > 0.1
        take(trained, step)
    for slot in trained.slots():
        if slot.parameter.requires_grad:
            assert torch.allclose(slot.view(slot.owner), net.get_parameter(slot.name).flatten(), atol=1e-6)


PLAIN = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)


def same_weights(trained: Engine, net: nn.Module) -> bool:
    return all(
        torch.allclose(slot.view(slot.owner), net.get_parameter(slot.name).flatten(), atol=1e-6)
        for slot in trained.slots()
    )


def stepped(net: nn.Module, step: int, changed: Callable[[nn.Module], None] = lambda net: None) -> None:
    """One step of plain SGD, whose gradients are changed before it."""
    given, wanted = examples(step)
    net.zero_grad()
    F.mse_loss(net(given), wanted).backward()
    changed(net)
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=PLAIN.lr).step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lookahead_is_algorithm_1(stage):
    optim = PLAIN.model_copy(update={"lookahead_every": 3, "lookahead_share": 0.4})
    trained, net, slow = engine(stage, optim=optim), network(), network()
    for step in range(1, 9):
        stepped(net, step)
        if step % 3 == 0:
            with torch.no_grad():
                for fast, behind in zip(net.parameters(), slow.parameters(), strict=True):
                    behind += 0.4 * (fast - behind)
                    fast.copy_(behind)
        take(trained, step)
        assert same_weights(trained, net)
    for slot in trained.slots():
        if slot.parameter.requires_grad:
            followed = slot.view(trained.lookahead.of(slot.owner))
            assert torch.allclose(followed, slow.get_parameter(slot.name).flatten(), atol=1e-6)


def test_lookahead_waits_for_a_step_that_is_not_skipped():
    trained = engine(0, optim=PLAIN.model_copy(update={"lookahead_every": 2}))
    take(trained, 1)
    before = [slot.view(slot.owner).clone() for slot in trained.slots()]
    take(trained, 2, torch.inf)
    assert all(map(torch.equal, before, [slot.view(slot.owner) for slot in trained.slots()]))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_noise_on_gradients_is_annealed_and_belongs_to_seed_step_and_weight(stage):
    eta, drawn = 0.3, []

    def noisy(net: nn.Module) -> None:
        for name, p in net.named_parameters():
            if p.grad is not None:
                noise = normal_of_elements(0, f"gradient {step} of {name}", torch.arange(p.numel())).view(p.shape)
                p.grad += (eta / step**0.55) ** 0.5 * noise
                drawn.append(noise)

    trained, net = engine(stage, optim=PLAIN.model_copy(update={"gradient_noise": eta})), network()
    for step in range(1, 5):
        stepped(net, step, noisy)
        take(trained, step)
        assert same_weights(trained, net)
    every = torch.cat([each.flatten() for each in drawn])
    assert every.unique().numel() == every.numel()


@pytest.mark.parametrize("box", [((0, 4), (0, 6), (0, 3)), ((1, 3), (0, 6), (0, 3)), ((0, 4), (2, 5), (1, 2))])
def test_an_element_has_the_same_place_in_the_weight_however_it_is_cut(box):
    shape = (4, 6, 3)
    part = torch.arange(72).view(shape)[tuple(slice(*each) for each in box)].flatten()
    slot = Slot("w", shape, box, nn.Parameter(torch.empty(0)), True, 2, 7, torch.empty(9), 2, None)
    assert torch.equal(slot.elements(), part[2:9])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_l1_penalty_is_of_weights_that_decay(stage):
    def penalised(net: nn.Module) -> None:
        for p in net.parameters():
            if p.ndim > 1:
                p.grad += 0.05 * p.detach().sign()

    trained, net = engine(stage, optim=PLAIN.model_copy(update={"l1": 0.05})), network()
    for step in (1, 2, 3):
        stepped(net, step, penalised)
        take(trained, step)
    assert same_weights(trained, net)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sam_takes_the_gradient_up_the_slope(stage):
    trained, net = engine(stage, optim=PLAIN.model_copy(update={"sam": 0.5})), network()
    for step in (1, 2, 3):
        (given, wanted), up = examples(step), copy.deepcopy(net)
        up.zero_grad()
        F.mse_loss(up(given), wanted).backward()
        free = [p for p in up.parameters() if p.requires_grad]
        norm = torch.cat([p.grad.flatten() for p in free]).norm()
        with torch.no_grad():
            for p in free:
                p += 0.5 * p.grad / norm
        up.zero_grad()
        F.mse_loss(up(given), wanted).backward()
        with torch.no_grad():
            for p, there in zip(net.parameters(), up.parameters(), strict=True):
                if p.requires_grad:
                    p -= PLAIN.lr * there.grad
        trained.sam.add(F.mse_loss(trained.module(given), wanted))
        trained.sam.climb()
        trained.backward(F.mse_loss(trained(given), wanted))
        trained.sam.descend()
        trained.step()
    assert same_weights(trained, net)


@pytest.mark.parametrize(("stage", "optim"), [(0, "adamw"), (0, "muon"), (0, "rmsprop"), (1, "adamw"), (3, "adamw")])
def test_a_skipped_step_leaves_the_average_unchanged(stage, optim):
    trained = engine(stage, optim=OPTIM.model_copy(update={"name": optim}))
    for step in (1, 2):
        take(trained, step)
    before = averages(trained)
    take(trained, 3, torch.inf)
    assert all(torch.equal(before[name], now) for name, now in averages(trained).items())
    take(trained, 4)
    assert not any(torch.equal(before[name], now) for name, now in averages(trained).items())


@pytest.mark.few(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_average_is_of_the_fp32_weights_not_the_bf16_ones(stage):
    """Steps of 1e-6 are far below the resolution of a bf16 weight."""
    trained = engine(stage, "bf16", OPTIM.model_copy(update={"lr": 1e-6, "weight_decay": 0.0}))
    before = averages(trained)
    for step in range(1, 4):
        take(trained, step)
    moved = [(now - before[name]).abs().max().item() for name, now in averages(trained).items()]
    assert 1e-7 < min(moved) <= max(moved) < 5e-6


def test_exchanging_twice_restores_every_bit():
    trained = engine(1, "bf16")
    take(trained, 1)
    weights = copy.deepcopy([slot.view(slot.owner) for slot in trained.slots()])
    working = copy.deepcopy(list(trained.module.parameters()))
    with trained.averaged():
        assert not all(map(torch.equal, working, trained.module.parameters()))
    assert all(map(torch.equal, working, trained.module.parameters()))
    assert all(map(torch.equal, weights, [slot.view(slot.owner) for slot in trained.slots()]))


def test_the_decay_follows_byols_cosine():
    """1 - (1 - 0.9) (cos(pi k / K) + 1) / 2, from k = 0 on."""
    wanted = [0.9, 1 - 0.1 * (2**-0.5 + 1) / 2, 0.95, 1 - 0.1 * (1 - 2**-0.5) / 2, 1.0, 1.0]
    assert [ema_decay(0.9, step, 4) for step in range(1, 7)] == pytest.approx(wanted)
    ema = Ema(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), [], 0.9, None, 4)
    ema.step = 3
    assert ema.share == pytest.approx(0.05)


def test_the_decay_warms_up():
    assert [ema_decay(0.5, step) for step in (1, 2, 8, 9)] == [2 / 11, 3 / 12, 0.5, 0.5]
    assert ema_decay(0.9999, 90_000) == 0.9999
