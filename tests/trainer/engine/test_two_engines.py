"""Two networks in one process, each with an engine and an optimizer of its own, equal a bare loop over both."""

import pytest
import torch
from support import resolved
from torch import nn

from configs.sections.optim import OptimConfig
from models.tasks.task import trained_only
from trainer.engine.engine import Engine
from trainer.engine.optim import build_optimizer, parameter_groups
from trainer.engine.start import start_processes

STEPS = 4
OPTIM = {"generator": OptimConfig(name="adam", lr=1e-2), "critic": OptimConfig(name="sgd", lr=1e-1, momentum=0.5)}


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


def networks():
    torch.manual_seed(0)
    return {
        "generator": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        "critic": nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)),
    }


def examples(step):
    random = torch.Generator().manual_seed(step)
    return torch.randn(2, 4, generator=random), torch.randn(2, 3, generator=random)


def bare():
    nets = networks()
    optimizers = {name: build_optimizer(parameter_groups(nets[name], OPTIM[name]), OPTIM[name]) for name in nets}
    losses = []
    for step in range(STEPS):
        latent, real = examples(step)
        loss = (nets["critic"](nets["generator"](latent).detach()) - nets["critic"](real)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets["critic"].parameters(), 1.0)
        optimizers["critic"].step()
        second = -nets["critic"](nets["generator"](latent)).mean()
        for network in nets.values():
            network.zero_grad()
        second.backward()
        torch.nn.utils.clip_grad_norm_(nets["generator"].parameters(), 1.0)
        optimizers["generator"].step()
        for network in nets.values():
            network.zero_grad()
        losses.append((loss.item(), second.item()))
    return losses


@pytest.mark.few(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_engines_equal_bare_loop(stage):
    config = resolved(train={"micro_batch": 1, "global_batch": 1, "precision": "fp32"}, parallel={"zero_stage": stage})
    nets = networks()
    engines = {name: Engine(nets[name], config, OPTIM[name], prefix=f"{name}.") for name in nets}
    g, c = engines["generator"], engines["critic"]
    losses = []
    for step in range(STEPS):
        latent, real = examples(step)
        with torch.no_grad():
            fake = g(latent)
        loss = c(torch.cat([fake, real])).view(2, 2)
        loss = (loss[0] - loss[1]).mean()
        c.backward(loss)
        c.step()
        c.module.requires_grad_(False)
        second = -c.module(g(latent)).mean()
        g.backward(second)
        c.module.requires_grad_(True)
        g.step()
        losses.append((loss.item(), second.item()))
    assert torch.tensor(losses).allclose(torch.tensor(bare()), atol=1e-6), (losses, bare())
    names = [slot.name for engine in engines.values() for slot in engine.slots()]
    assert names == [f"{name}.{key}" for name in nets for key, _ in networks()[name].named_parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_one_network_leaves_no_gradient_in_the_other(precision):
    config = resolved(train={"micro_batch": 1, "global_batch": 1, "precision": precision}, parallel={"zero_stage": 0})
    nets = networks()
    engines = {name: Engine(nets[name], config, OPTIM[name], prefix=f"{name}.") for name in nets}
    latent, _ = examples(0)
    latent = latent.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with trained_only(engines, "generator"):
        engines["generator"].backward(engines["critic"].module(engines["generator"](latent)).mean())
    assert [p.grad for p in engines["critic"].module.parameters()] == [None] * 4
    assert all(p.grad.any() for p in engines["generator"].module.parameters())
    with trained_only(engines, "critic"):
        engines["critic"].backward(engines["critic"](engines["generator"].module(latent).detach()).mean())
    assert all(p.grad is not None for p in engines["critic"].module.parameters())
