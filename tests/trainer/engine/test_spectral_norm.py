"""Spectral norms at every ZeRO stage equal a bare loop, with gradients summed over two micro-batches."""

import pytest
import torch
from support import resolved
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from configs.sections.optim import OptimConfig
from models.init import fill
from models.spectral_memory import SpectralTap, fill_vectors
from trainer.engine.engine import Engine
from trainer.engine.optim import build_optimizer, parameter_groups
from trainer.engine.start import start_processes

OPTIM = OptimConfig(name="sgd", lr=0.1, momentum=0.5)
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


def network() -> nn.Module:
    found = nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 3)))
    fill(found, 0)
    fill_vectors(found, 0)
    return found


def micro_batches(step: int) -> torch.Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(step))


def ended(tap: SpectralTap) -> list[float]:
    """The vectors after a step, given back for the next one to start from."""
    memory = tap.after_step({})
    tap.tell(memory)
    return torch.cat(list(memory.values())).tolist()


def bare() -> list[list[float]]:
    net = network()
    tap, found = SpectralTap({"": net}), []
    optimizer = build_optimizer(parameter_groups(net, OPTIM), OPTIM)
    for step in range(STEPS):
        for batch in micro_batches(step):
            (net(batch).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(ended(tap))
    return found


@pytest.mark.few(3)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_vectors_equal_a_bare_loops(stage, precision):
    train = {"micro_batch": 1, "global_batch": 2, "precision": precision, "grad_clip": 0.0}
    engine = Engine(network(), resolved(train=train, parallel={"zero_stage": stage}), OPTIM)
    tap, found = SpectralTap({"": engine.module}), []
    for step in range(STEPS):
        for batch in micro_batches(step):
            engine.backward(engine(batch if precision == "fp32" else batch.bfloat16()).float().square().mean())
            engine.step()
        found.append(ended(tap))
    wanted = torch.tensor(bare())
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-6 if precision == "fp32" else 0.02)
    assert not torch.allclose(wanted[0], wanted[2], atol=0.001)
    assert {slot.name for slot in engine.slots()} == {
        f"{layer}.{name}" for layer in (0, 2) for name in ("bias", "parametrizations.weight.original")
    }
