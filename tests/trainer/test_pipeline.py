"""Pipeline parallelism against a bare PyTorch loop in one process."""

import math
from functools import cache

import pytest
import torch
from engines import bare_losses, batch_of, tokens_of
from pipelines import pipeline_evaluation, pipeline_losses, pipeline_skips
from support import TINY_MODEL, resolved
from teams import in_team

from configs import Config
from configs.parallel import ParallelConfig
from models.balance import RouterTap
from models.families import build
from trainer.fragments import parse_key, runs, whole

# The router losses weigh much, so that a stage that lost theirs would be seen.
MOE = {"num_layers": 4, "aux_loss_weight": 0.1, "z_loss_weight": 0.1}
DENSE = {"num_layers": 4, "num_experts": 0}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "adamw", "lr": 1e-3, "eps": 1e-6}


def config(model: dict, optim: dict, pp: int = 2, dp: int = 1, ep: int = 1, **train) -> Config:
    """SGD without clipping, or AdamW with a limit below every norm."""
    settings = resolved(
        model=TINY_MODEL | model,
        train={"micro_batch": 1, "global_batch": 4, "grad_clip": 0.0 if optim is SGD else 0.3} | train,
        optim={"warmup": 2} | optim,
        parallel={"zero_stage": 1},
    )
    parallel = settings.parallel.model_copy(update={"pp": pp, "dp": dp, "ep": ep})
    return settings.model_copy(update={"parallel": parallel})


def assembled(fragments: list[dict], weights: dict) -> dict[str, torch.Tensor]:
    """Whole weights from the fragments of all processes, NaN where there are none."""
    found = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    for process in fragments:
        for key, stretch in process.items():
            state, name, start, box = parse_key(key)
            if state == "weight":
                for at, part in runs(box or whole(weights[name].shape), start, start + stretch.numel()):
                    view = found[name][tuple(slice(low, high) for low, high in part)]
                    view.copy_(stretch[at - start : at - start + view.numel()].view(view.shape))
    return found


@cache
def alone(settings: str, steps: int) -> tuple[list, dict]:
    """What one process makes of a config, given as JSON, whose topology is of no account to it."""
    return bare_losses(Config.model_validate_json(settings), steps)


def check(configs: list[Config], processes: list, steps: int, rel: float = 1e-5, norm_rel: float = 1e-5) -> None:
    """`processes`: of each, what `pipeline_losses` made of the configs."""
    for i, settings in enumerate(configs):
        plain = settings.model_copy(update={"parallel": ParallelConfig(zero_stage=1)})
        expected, weights = alone(plain.model_dump_json(), steps)
        made = processes[0][i][0]
        assert all(process[i][0] == made for process in processes), "not the same outcome on all processes"
        limit = settings.train.grad_clip
        assert not limit or all(norm > limit for _, norm, _ in expected), "clipping was not active"
        for out, (loss, norm, _) in zip(made, expected, strict=True):
            assert not out.skipped
            assert out.loss == pytest.approx(loss, rel=rel)
            assert out.grad_norm == pytest.approx(norm, rel=norm_rel)
        if rel <= 1e-5:
            found = assembled([process[i][1] for process in processes], weights)
            for name, weight in weights.items():
                assert (found[name] - weight).norm() <= rel * weight.norm(), name
        check_router(settings, made[0])


def check_router(settings: Config, first) -> None:
    """What the routers measured in the first step, against the plain model."""
    module = build(settings.model)
    module.init_weights(0)
    tap, size, stats = RouterTap(module, settings.model), settings.train.micro_batch, []
    for start in range(0, settings.train.global_batch, size):
        module(batch_of(settings, list(range(start, start + size))))
        stats.append(tap.collect())
    if not settings.model.is_moe:
        assert (first.aux_loss, first.z_loss, first.load) == (0.0, 0.0, [])
        return
    noise = 1e-5 if settings.train.precision == "fp32" else 1e-2
    assert first.aux_loss == pytest.approx(sum(s.aux_loss.item() for s in stats) / len(stats), rel=noise)
    assert first.z_loss == pytest.approx(sum(s.z_loss.item() for s in stats) / len(stats), rel=noise)
    torch.testing.assert_close(torch.tensor(first.load), sum(s.load for s in stats) / len(stats), rtol=0, atol=noise)


def test_two_stages_equal_bare_loop(pair):
    """Of 20 steps with 4, 2 and 1 micro-batches."""
    configs = [
        config(DENSE | {"dropout": 0.1}, SGD),
        config(MOE | {"first_dense_layers": 2}, SGD, activation_checkpointing="full", micro_batch=2),
        config(MOE, ADAMW, micro_batch=4),
    ]
    check(configs, pair(pipeline_losses, configs, 20), 20)


@pytest.mark.slow
def test_four_stages_equal_bare_loop():
    configs = [config(DENSE, ADAMW, pp=4), config(MOE, SGD, pp=4, micro_batch=2), config(MOE, ADAMW, pp=4)]
    check(configs, in_team(4, pipeline_losses, configs, 20), 20)


@pytest.mark.slow
def test_two_stages_of_two_data_parallel_ranks_equal_bare_loop():
    """With experts parallel over the data-parallel ranks too."""
    configs = [config(DENSE, ADAMW, dp=2), config(MOE, SGD, dp=2, micro_batch=2)]
    configs += [config(MOE, SGD, dp=2, ep=2, micro_batch=2), config(MOE, ADAMW, dp=2, ep=2)]
    check(configs, in_team(4, pipeline_losses, configs, 20), 20)


@pytest.mark.slow
def test_bf16_is_within_its_noise(pair):
    configs = [config(MOE, SGD, precision="bf16"), config(MOE, ADAMW, precision="bf16")]
    check(configs, pair(pipeline_losses, configs, 8), 8, rel=2e-3, norm_rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_stage_is_skipped_on_all(pair, where, precision):
    results = pair(pipeline_skips, config(MOE, ADAMW, precision=precision), where)
    for before, bad, after, later in results:
        assert bad.skipped
        assert math.isfinite(bad.loss) == (where == "gradient")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step changed the state"
        assert not later.skipped
        assert math.isfinite(later.loss)


def test_evaluation_leaves_training_alone(pair):
    settings = config(MOE | {"dropout": 0.1}, ADAMW, micro_batch=2)
    expected, _ = bare_losses(settings, 4)
    module = build(settings.model)
    module.init_weights(0)
    out = module.eval()(batch_of(settings, list(range(8))))
    for (loss, tokens), before, after, outcomes in pair(pipeline_evaluation, settings):
        assert loss == pytest.approx(out.loss_sum.item(), rel=1e-5)
        assert tokens == out.tokens.item() == tokens_of(settings, 1) + tokens_of(settings, 2)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [made.loss for made in outcomes] == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)
