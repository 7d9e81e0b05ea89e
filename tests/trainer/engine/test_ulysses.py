"""Sequence parallelism (Ulysses) against one process and a bare PyTorch loop, with documents kept apart."""

from itertools import product
from typing import Any

import engines
import pytest
from engines import assemble, bare_losses
from sequences import PROMPTS, batch_of, train_all
from support import resolved
from teams import in_team

from configs import Config
from models.decoder.generate import generate
from models.families import build

DENSE = {"num_experts": 0}
SPARSE = {"block": 4, "local_blocks": 2, "global_blocks": 1, "stride": 5}


def config(dp: int, sp: int, stage: int, optim: str, model: dict[str, Any] | None = None, **train: Any) -> Config:
    settings = resolved(
        train={"micro_batch": 1, "global_batch": 4, "grad_clip": 0.5 if optim == "adamw" else 0.0} | train,
        model=model or {},
        optim={"name": optim, "lr": {"adamw": 1e-3, "sgd": 0.1}[optim], "warmup": 2, "momentum": 0.9, "eps": 1e-6},
        parallel={"zero_stage": stage, "dp": dp},
    )
    return settings.model_copy(update={"parallel": settings.parallel.model_copy(update={"sp": sp})})


def check(configs: list[Config], steps: int, monkeypatch, rel: float = 1e-5, timeout_s: float = 120) -> None:
    monkeypatch.setattr(engines, "batch_of", batch_of)
    teams = in_team(configs[0].parallel.world_size, train_all, configs, steps, timeout_s=timeout_s)
    for settings, *made in zip(configs, *teams, strict=True):
        expected, weights = bare_losses(settings, steps)
        for out, (loss, norm, _) in zip(made[0]["outcomes"], expected, strict=True):
            assert not out.skipped
            assert out.loss == pytest.approx(loss, rel=rel)
            assert out.grad_norm == pytest.approx(norm, rel=max(rel, 1e-5))
        whole = assemble([process["weights"] for process in made], weights)
        for name, weight in weights.items():
            assert (whole[name] - weight).norm() <= rel * weight.norm(), name
        module = build(settings.model)
        module.load_state_dict(whole)
        module.eval()
        held_out = module(batch_of(settings, [1000, 1001])).loss_sum.item()
        texts = generate(module, PROMPTS, max_new_tokens=8, temperature=0)
        for process in made:
            assert process["held_out"] == pytest.approx(held_out, rel=rel)
            assert process["texts"] == texts


@pytest.mark.slow
def test_two_processes_equal_bare_loop(monkeypatch):
    """Also with dropout, a window, sparse blocks and as many key heads as query heads."""
    check(
        [
            config(1, 2, 0, "sgd", DENSE | {"dropout": 0.1, "tie_embeddings": True}),
            config(1, 2, 1, "adamw", DENSE | {"sliding_window": 9, "num_kv_heads": 4}),
            config(1, 2, 1, "sgd", DENSE | {"block_sparse": SPARSE}),
            config(1, 2, 2, "sgd", {"dropout": 0.1}, activation_checkpointing="full"),
            config(1, 2, 3, "adamw"),
        ],
        6,
        monkeypatch,
    )


@pytest.mark.slow
def test_four_processes_equal_bare_loop(monkeypatch):
    """With fewer key heads than processes, and beside data parallelism."""
    check([config(1, 4, 3, "sgd"), config(2, 2, 1, "sgd"), config(2, 2, 2, "adamw", DENSE)], 6, monkeypatch)


@pytest.mark.slow
def test_long_sequences_with_documents(monkeypatch):
    """Longer than attention builds an explicit mask for."""
    check(
        [
            config(1, 2, 1, "sgd", model, seq_len=1024, global_batch=2, micro_batch=2)
            for model in ({"sliding_window": 100}, {"block_sparse": {"block": 64, "local_blocks": 2, "stride": 3}})
        ],
        2,
        monkeypatch,
    )


@pytest.mark.slow
def test_bf16_stays_within_its_rounding_noise(monkeypatch):
    monkeypatch.setattr(engines, "batch_of", batch_of)
    settings = config(1, 2, 2, "sgd", precision="bf16")
    outcomes = in_team(2, train_all, [settings], 6)[0][0]["outcomes"]
    for out, (loss, norm, _) in zip(outcomes, bare_losses(settings, 6)[0], strict=True):
        assert out.loss == pytest.approx(loss, rel=1e-3)
        assert out.grad_norm == pytest.approx(norm, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("dp", "sp"), [(2, 2)])
def test_every_stage_and_optimizer(monkeypatch, dp, sp):
    cases = product(range(4), ("sgd", "adamw"), (DENSE, {}))
    check([config(dp, sp, *case) for case in cases], 20, monkeypatch, timeout_s=600)
