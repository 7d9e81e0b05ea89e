"""Training with fp8 matrix multiplication: close to bf16, the same at every ZeRO stage, and refused in one message."""

import importlib.util

import pytest
import torch
from engines import EngineRun
from support import resolved
from torch import nn

from configs import ConfigError
from models.families import build
from trainer.engine.precision import check_precision
from trainer.engine.start import start_processes

DENSE = {"num_experts": 0, "intermediate_size": 64, "hidden_size": 64}
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is optional")


def losses(precision: str, stage: int = 0, **train) -> list[float]:
    start_processes(60)
    config = resolved(
        model={"num_layers": 2} | DENSE, train={"precision": precision} | train, parallel={"zero_stage": stage},
        optim={"warmup": 0, "lr": 1e-2},
    )  # fmt: skip
    return [loss for loss, *_ in EngineRun(config).steps(1, 6)]


@needs_torchao
def test_losses_are_close_to_bf16():
    fp8, bf16 = losses("fp8"), losses("bf16")
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, rel=1e-2)


@pytest.mark.slow
@needs_torchao
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_the_same_at_every_zero_stage(stage):
    assert losses("fp8", stage) == pytest.approx(losses("fp8"), rel=2e-3)


@needs_torchao
def test_activation_checkpointing_changes_nothing():
    assert losses("fp8", activation_checkpointing="full") == losses("fp8")


@needs_torchao
def test_only_linear_layers_inside_the_blocks_use_fp8(monkeypatch):
    from torchao.float8.float8_linear import Float8Linear

    start_processes(60)
    config = resolved(model={"shared_expert_size": 32, "shared_expert_gate": True}, train={"precision": "fp8"})
    found = {name for name, part in EngineRun(config).engine.module.named_modules() if isinstance(part, Float8Linear)}
    layers = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    layers |= {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert found == {f"model.layers.{layer}.{name}" for layer in range(2) for name in layers}


def check(**model) -> None:
    config = resolved(model=model, train={"precision": "fp8"})
    with torch.device("meta"):
        check_precision(build(config.model), config)


def test_unsupported_configs_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs torchao"):
        check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check()
    with pytest.raises(ConfigError, match=r"multiples of 16, but model.layers.0.mlp.gate_proj is 40 x 64"):
        check(**DENSE | {"intermediate_size": 40})
    with pytest.raises(ConfigError, match="fp8 works with dp, ep and ZeRO only"):
        resolved(train={"precision": "fp8"}, parallel={"tp": 2})
    with pytest.raises(ConfigError, match="no linear layer"):
        check_precision(nn.Linear(16, 16), resolved(train={"precision": "fp8"}))
