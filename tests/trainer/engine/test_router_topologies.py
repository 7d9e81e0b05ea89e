"""Every router and balancing method, under expert parallelism and all others, against one process."""

import functools

import pytest
import torch
from engines import all_losses, assemble, bare_losses
from support import tiny
from teams import in_team

from configs import Config, resolve
from models.tasks.language_modelling import BIAS, fresh_routers, routers_after_step
from models.tasks.task import unless_skipped
from trainer.checkpoint.memory import on_device

STEPS = 12
ROUTERS = {
    "deepseek": {
        "router": "sigmoid", "expert_groups": 2, "top_groups": 1, "router_scale": 1.5, "router_bias_rate": 0.02,
        "aux_loss_over": "sequence", "shared_expert_size": 32, "shared_expert_gate": True,
    },
    "switch": {"top_k": 1, "norm_topk_prob": False, "router_jitter": 0.1, "capacity_factor": 1.0},
    "qwen3": {"top_k": 3, "aux_loss_over": "global_batch", "aux_loss_weight": 0.1},
}  # fmt: skip
OPTIMIZERS = {
    "sgd": ({"name": "sgd", "lr": 0.1, "momentum": 0.9}, 0.0),
    "adamw": ({"name": "adamw", "lr": 1e-3, "eps": 1e-6}, 0.5),
}


def config(router: str, optim: str, layers: int = 2, **parallel) -> Config:
    settings, clip = OPTIMIZERS[optim]
    asked = tiny(
        model=ROUTERS[router] | {"num_kv_heads": 4, "num_experts": 8, "num_layers": layers},
        train={"micro_batch": 2, "global_batch": 8, "grad_clip": clip},
        optim=settings | {"warmup": 2},
        parallel=parallel,
    )
    return resolve(asked)[0]


@functools.cache
def expected(router: str, optim: str, layers: int, steps: int):
    return bare_losses(config(router, optim, layers), steps)


TOPOLOGIES = [
    {},
    {"tp": 2, "ep": 2},
    {"dp": 2, "ep": 2, "zero_stage": 3},
    {"dp": 2, "ep": 2, "zero_stage": 2},
    {"dp": 2, "tp": 2, "ep": 4, "zero_stage": 2},
    {"pp": 2},
    {"dp": 2, "pp": 2, "ep": 2},
    {"pp": 2, "pp_schedule": "dualpipev"},
    {"sp": 2, "ep": 2},
    {"dp": 2, "sp": 2, "zero_stage": 3},
    {"dp": 4, "zero_stage": 3},
]


@pytest.mark.slow
def test_every_router_equals_one_process_in_a_few_steps():
    """The quick subset; the full matrix is below."""
    check({"tp": 2, "ep": 2}, [(router, "sgd") for router in ROUTERS], steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: "-".join(f"{k}{v}" for k, v in t.items()) or "one")
def test_router_equals_one_process(topology):
    cases = [(router, optim) for router in ROUTERS for optim in OPTIMIZERS]
    if topology.get("sp", 1) > 1:
        cases = [case for case in cases if case[0] != "switch"]  # refused: its capacity is defined over whole sequences
    check(topology, cases, STEPS)


def check(topology: dict, cases: list[tuple[str, str]], steps: int) -> None:
    layers = 4 if "pp_schedule" in topology else 2
    configs = [config(*case, layers, **topology) for case in cases]
    team = in_team(configs[0].parallel.world_size, all_losses, configs, steps)
    for number, case in enumerate(cases):
        outcomes, weights = expected(*case, layers, steps)
        for rank in team:
            found = rank[number][0]
            assert [o[0] for o in found] == pytest.approx([w[0] for w in outcomes], rel=1e-5), case
            assert [o[1] for o in found] == pytest.approx([w[1] for w in outcomes], rel=1e-4), case
        whole = assemble([rank[number][1] for rank in team], weights)
        for name, weight in weights.items():
            assert (whole[name] - weight).norm() <= 1e-5 * weight.norm() + 1e-7, (case, name)


def test_bias_moves_towards_the_even_load():
    settings = config("deepseek", "sgd")
    model = settings.model.model_copy(update={"num_layers": 1, "num_experts": 4})
    settings = settings.model_copy(update={"model": model})
    assert fresh_routers(model) == {BIAS: [[0.0] * 4]}
    first = on_device(fresh_routers(model), torch.device("cpu"))

    def bias_after(before: dict, load: list[float], skipped: bool = False, settings: Config = settings) -> list:
        values = torch.tensor([load], dtype=torch.float64)
        after = routers_after_step(before, values, 4, settings)
        return unless_skipped(torch.tensor(skipped), before, after)[BIAS].tolist()

    moved = bias_after(first, [0.25, 0.5, 0.0, 0.25 + 1e-9])
    assert moved == [[0.0, -0.02, 0.02, 0.0]], "a load that is even but for rounding must not move"
    assert bias_after(first, [0.25, 0.5, 0.0, 0.25], skipped=True) == [[0.0] * 4]
    assert bias_after(first, [torch.nan] * 4, skipped=True) == [[0.0] * 4]
    still = settings.model_copy(update={"model": model.model_copy(update={"router_bias_rate": 0.0})})
    assert bias_after(on_device({BIAS: moved}, torch.device("cpu")), [1.0, 0.0, 0.0, 0.0], settings=still) == moved
