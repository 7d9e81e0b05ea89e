"""Pipeline parallelism against a bare PyTorch loop in one process."""

import math
from collections import deque
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe.schedule import DualPipeVSchedule
from engines import bare_losses, batch_of, tokens_of
from pipelines import pipeline_evaluation, pipeline_losses, pipeline_skips
from ranks import run_ranks
from support import TINY_MODEL, resolved, tiny
from teams import in_team

from configs import Config, to_yaml
from configs.sections.parallel import ParallelConfig
from models.families import build
from models.moe.balance import RouterTap
from models.planning.plan import _bubble
from models.planning.shards import in_flight
from trainer.checkpoint.fragments import parse_key, runs, whole
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_metrics

# Router losses have large weights, so that a stage that lost theirs would show.
MOE = {"num_layers": 4, "aux_loss_weight": 0.1, "z_loss_weight": 0.1}
DENSE = {"num_layers": 4, "num_experts": 0}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "adamw", "lr": 1e-3, "eps": 1e-6}


def config(model: dict, optim: dict, pp: int = 2, dp: int = 1, ep: int = 1, schedule: str = "1f1b", **train) -> Config:
    """SGD without clipping, or AdamW with a limit below every norm."""
    settings = resolved(
        model=TINY_MODEL | model,
        train={"micro_batch": 1, "global_batch": 4, "grad_clip": 0.0 if optim is SGD else 0.3} | train,
        optim={"warmup": 2} | optim,
        parallel={"zero_stage": 1},
    )
    parallel = settings.parallel.model_copy(update={"pp": pp, "pp_schedule": schedule, "dp": dp, "ep": ep})
    return settings.model_copy(update={"parallel": parallel})


def assembled(fragments: list[dict], weights: dict) -> dict[str, torch.Tensor]:
    """Whole weights from the fragments of all processes, NaN where no process has any."""
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
    """Outcomes and weights of one process for a config, given as JSON; its topology is ignored."""
    return bare_losses(Config.model_validate_json(settings), steps)


def check(configs: list[Config], processes: list, steps: int, rel: float = 1e-5, norm_rel: float = 1e-5) -> None:
    """`processes`: for each process, the results of `pipeline_losses` for the configs."""
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
    """Compare what the routers measured in the first step with the plain model's."""
    module = build(settings.model)
    module.init_weights(0)
    tap, size, stats = RouterTap(module, settings.model), settings.train.micro_batch, []
    for start in range(0, settings.train.global_batch, size):
        module(batch_of(settings, list(range(start, start + size))))
        stats.append(tap.collect())
    if not settings.model.is_moe:
        assert first.extra == {}
        return
    noise = 1e-5 if settings.train.precision == "fp32" else 1e-2
    assert first.extra["aux_loss"] == pytest.approx(sum(s.aux_loss.item() for s in stats) / len(stats), rel=noise)
    assert first.extra["z_loss"] == pytest.approx(sum(s.z_loss.item() for s in stats) / len(stats), rel=noise)
    load = torch.tensor(first.extra["router"])[:, :-3]
    torch.testing.assert_close(load, sum(s.load for s in stats) / len(stats), rtol=0, atol=noise)


@pytest.mark.slow
def test_two_stages_equal_bare_loop(pair):
    """Over 20 steps with 4, 2 and 1 micro-batches."""
    configs = [
        config(DENSE | {"dropout": 0.1}, SGD),
        config(MOE | {"first_dense_layers": 2}, SGD, activation_checkpointing="full", micro_batch=2),
        config(MOE, ADAMW, micro_batch=4),
    ]
    check(configs, pair(pipeline_losses, configs, 20), 20)


@pytest.mark.slow
def test_four_stages_in_a_v_equal_bare_loop(pair):
    """The first rank holds the first stage and the last, here with dense layers and with experts."""
    configs = [
        config(DENSE | {"dropout": 0.1}, SGD, schedule="dualpipev"),
        config(MOE | {"first_dense_layers": 1}, SGD, schedule="dualpipev", activation_checkpointing="full"),
        config(MOE, ADAMW, schedule="dualpipev", global_batch=5),
    ]
    check(configs, pair(pipeline_losses, configs, 20), 20)


@pytest.mark.slow
def test_eight_stages_in_a_v_equal_bare_loop():
    both = {"pp": 4, "schedule": "dualpipev", "global_batch": 9}
    configs = [config(kind | {"num_layers": 9}, optim, **both) for kind, optim in ((DENSE, ADAMW), (MOE, SGD))]
    check(configs, in_team(4, pipeline_losses, configs, 20), 20)


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
def test_bf16_is_within_its_rounding_noise(pair):
    configs = [config(MOE, SGD, precision="bf16"), config(MOE, ADAMW, precision="bf16")]
    configs += [config(MOE, SGD, schedule="dualpipev", precision="bf16")]
    check(configs, pair(pipeline_losses, configs, 8), 8, rel=2e-3, norm_rel=2e-2)


IN_TURN = [("loss", "bf16", "1f1b"), ("gradient", "fp32", "dualpipev")]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("where", "precision", "schedule"),
    [
        pytest.param(*case, marks=[] if case in IN_TURN else pytest.mark.slow)
        for case in product(("loss", "gradient"), ("fp32", "bf16"), ("1f1b", "dualpipev"))
    ],
)
def test_a_non_finite_loss_or_gradient_on_one_stage_skips_the_step_on_all(pair, where, precision, schedule):
    results = pair(pipeline_skips, config(MOE, ADAMW, precision=precision, schedule=schedule), where)
    for before, bad, after, later in results:
        assert bad.skipped
        assert math.isfinite(bad.loss) == (where == "gradient")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step changed the state"
        assert not later.skipped
        assert math.isfinite(later.loss)


@pytest.mark.few(1)
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_evaluation_does_not_change_training(pair, schedule):
    size = {"1f1b": 2, "dualpipev": 1}[schedule]
    settings = config(MOE | {"dropout": 0.1}, ADAMW, schedule=schedule, micro_batch=size)
    expected, _ = bare_losses(settings, 4)
    module = build(settings.model)
    module.init_weights(0)
    out = module.eval()(batch_of(settings, list(range(8))))
    for (loss, tokens), before, after, outcomes in pair(pipeline_evaluation, settings):
        assert loss == pytest.approx(out.loss_sum.item(), rel=1e-5)
        assert tokens == out.tokens.item() == tokens_of(settings, 1) + tokens_of(settings, 2)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [made.loss for made in outcomes] == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)


@pytest.mark.slow
def test_a_run_changes_to_a_v_and_back(tmp_path, tiny_data):
    """Losses, evaluations and the last checkpoint stay the same, each attempt resuming from the previous one's."""
    sections = {
        "data": {"path": str(tiny_data)},
        "model": TINY_MODEL | MOE | {"router_bias_rate": 0.02},
        "train": {"global_batch": 5, "micro_batch": 1, "eval_every": 2, "eval_sequences": 7},
        "optim": {"schedule": "constant", "eps": 1e-6},
        "checkpoint": {"every": 2},
    }
    v = {"pp": 2, "pp_schedule": "dualpipev", "zero_stage": 1}
    for name, attempts in {"alone": [(6, {})], "changing": [(2, {}), (4, v), (6, {"pp": 2, "zero_stage": 1})]}.items():
        for last, parallel in attempts:
            asked = tiny(run={"name": name, "root": "runs"}, parallel=parallel, **sections)
            (tmp_path / f"{name}.yaml").write_text(to_yaml(asked))
            count = asked.parallel.world_size
            for code, err in run_ranks(tmp_path, [f"{name}.yaml", f"train.steps={last}"], count):
                assert code == 0, err
    alone, changing = (read_metrics(tmp_path / "runs" / name) for name in ("alone", "changing"))
    for key in ("loss", "eval_loss", "grad_norm", "aux_loss", "expert_maxvio"):
        expected, found = ([m[key] for m in metrics if key in m] for metrics in (alone, changing))
        assert len(expected) in (3, 6)
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-5), key
    last, states = (Reader(folder(tmp_path / "runs" / name, 6)) for name in ("changing", "alone"))
    assert last.manifest.state.memory == states.manifest.state.memory
    for state, names in states.manifest.shapes.items():
        for name in names:
            torch.testing.assert_close(last.read(state, name), states.read(state, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_planner_predicts_the_bubble_and_activations_of_a_v(ranks):
    """Against DeepSpeed's own instructions, simulated with a clock for each rank: forward takes 1, backward 2."""
    count = 2 * ranks + 3
    model = {"num_layers": 2 * ranks}
    settings = config(model, SGD, pp=ranks, schedule="dualpipev", global_batch=count)
    clocks, kept = follow(ranks, count)
    assert _bubble(settings) == pytest.approx(1 - 6 * count / max(clocks))
    for rank in range(ranks):
        (_, first), (_, second) = in_flight(settings, rank)
        assert first + second == max(map(sum, kept[rank]))
        assert [first, second] in kept[rank]


def follow(ranks: int, count: int) -> tuple[list[int], list[list[list[int]]]]:
    """(each rank's clock at the end, and the micro-batches its two stages hold after each of its forward passes)."""
    programs = [
        deque(order for step in DualPipeVSchedule(count, ranks, rank).steps() for order in step)
        for rank in range(ranks)
    ]
    clocks, held, kept = [0] * ranks, [[0, 0] for _ in range(ranks)], [[] for _ in range(ranks)]
    sent: dict[tuple, int] = {}
    awaited: list[set[tuple]] = [set() for _ in range(ranks)]
    while any(programs):
        for rank, program in enumerate(programs):
            while program and not (program[0].name == "CommitP2P" and awaited[rank] - sent.keys()):
                order = program.popleft()
                phase, number, what = order.kwargs.get("phase"), order.kwargs.get("buffer_id"), order.name[-4:]
                if order.name == "CommitP2P":
                    clocks[rank] = max([clocks[rank], *(sent[message] for message in awaited[rank])])
                    awaited[rank] = set()
                elif order.name.startswith("Recv"):
                    awaited[rank].add((rank, what, number))
                elif order.name.startswith("Send"):
                    sent[rank + (1 if (phase == 0) == (what == "tion") else -1), what, number] = clocks[rank]
                elif order.name == "ForwardPass":
                    clocks[rank] += 1
                    held[rank][phase] += 1
                    kept[rank].append(list(held[rank]))
                elif order.name == "BackwardPass":
                    clocks[rank] += 2
                    held[rank][phase] -= 1
    return clocks, kept
