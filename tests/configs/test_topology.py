"""The table of what cannot be combined: every rule is met by a config, and every refusal names a way out that works."""

import pytest
from support import tiny

from configs import ConfigError, resolve
from configs.topology import RULES, check_topology, nearest_topology, refusals, topologies

BREAKS = {
    "tp heads": ({}, {"tp": 3}),
    "tp width": ({"num_experts": 0, "intermediate_size": 97}, {"tp": 2}),
    "ep without experts": ({"num_experts": 0}, {"ep": 2, "dp": 2}),
    "ep experts": ({}, {"ep": 3, "dp": 3}),
    "ep ranks": ({}, {"ep": 2}),
    "ep and hash": ({"router": "hash"}, {"dp": 2, "ep": 2}),
    "ep and padding": ({"capacity_factor": 1.0, "pad_to_capacity": True}, {"dp": 2, "ep": 2}),
    "sp and capacity": ({"capacity_factor": 1.0}, {"sp": 2}),
    "tp and sp": ({}, {"tp": 2, "sp": 2}),
    "pp and zero": ({}, {"pp": 2, "zero_stage": 3}),
    "pp and tp": ({}, {"pp": 2, "tp": 2}),
    "pp and sp": ({}, {"pp": 2, "sp": 2}),
    "pp layers": ({}, {"pp": 3}),
    "pp and tied embeddings": ({"tie_embeddings": True}, {"pp": 2}),
    "pp and ep": ({"num_layers": 4, "first_dense_layers": 2}, {"pp": 2, "dp": 2, "ep": 2}),
    "pp and fp16": ({}, {"pp": 2}),
    "fp8 and split models": ({}, {"tp": 2}),
    "dualpipev alone": ({}, {"pp_schedule": "dualpipev"}),
    "dualpipev and batch": ({"num_layers": 4}, {"pp": 2, "dp": 2, "pp_schedule": "dualpipev"}),
    "sp heads": ({}, {"sp": 8}),
    "sp length": ({"num_heads": 3, "num_kv_heads": 3, "hidden_size": 30}, {"sp": 3}),
    "hpz": ({}, {"hpz": 2, "dp": 2, "zero_stage": 2}),
    "hpz alone": ({}, {"hpz": 2, "dp": 2, "ep": 2, "zero_stage": 3}),
    "offload and zero": ({}, {"offload": "parameters", "dp": 2, "zero_stage": 2}),
    "offload alone": ({}, {"offload": "optimizer", "dp": 2, "ep": 2, "zero_stage": 2}),
    "sam": ({}, {"dp": 2, "zero_stage": 3}),
}  # fmt: skip


def test_every_rule_is_tried():
    assert set(BREAKS) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_refused_with_a_way_out(name):
    model, parallel = BREAKS[name]
    train = {"precision": {"pp and fp16": "fp16", "fp8 and split models": "fp8"}.get(name, "bf16")}
    optim = {"sam": 0.05} if name == "sam" else {}
    with pytest.raises(ConfigError, match=r"^parallel\.\w+=.*Nearest that works: set parallel\.") as caught:
        resolve(tiny(model=model, train=train, parallel=parallel, optim=optim))
    assert "\n" not in str(caught.value)
    # Through the table alone too: the one rule is broken, and the way out breaks none and keeps the processes.
    whole = resolve(tiny(model=model, train=train, optim=optim))[0]
    asked = whole.model_copy(update={"parallel": tiny(parallel=parallel).parallel})
    assert RULES[name].broken(asked)
    nearest = nearest_topology(asked)
    assert nearest is not None
    assert nearest.world_size == asked.parallel.world_size
    assert refusals(asked.model_copy(update={"parallel": nearest})) == []


def test_what_works_is_let_through():
    for parallel in (
        {},
        {"dp": 2, "tp": 2, "ep": 4, "zero_stage": 2},
        {"pp": 2, "dp": 2, "ep": 2},
        {"sp": 4, "ep": 2},
        {"dp": 4, "hpz": 2, "zero_stage": 3},
        {"dp": 2, "offload": "optimizer", "zero_stage": 1},
    ):
        check_topology(resolve(tiny(parallel=parallel))[0])


def test_stage_0_becomes_1_where_its_norm_would_be_wrong():
    resolved, notes = resolve(tiny(parallel={"tp": 2}))
    assert resolved.parallel.zero_stage == 1
    assert "parallel.zero_stage=1: DeepSpeed's gradient norm is wrong at stage 0 with tp=2" in notes
    assert resolve(tiny(parallel={"sp": 2}))[0].parallel.zero_stage == 0


def test_dualpipev_holds_two_stages_on_each_rank():
    v = {"pp": 2, "pp_schedule": "dualpipev"}
    with pytest.raises(ConfigError, match=r"each of the 4 stages needs a layer, but model.num_layers is 2\. .*=1f1b"):
        resolve(tiny(parallel=v))
    resolved, notes = resolve(tiny(model={"num_layers": 4}, train={"global_batch": 9}, parallel=v))
    assert resolved.train.micro_batch == 2
    assert "train.micro_batch=2: global_batch / (dp * 2 * pp)" in notes
    # Each rank has an MoE layer, which the second of two stages alone would not have.
    model = {"num_layers": 4, "moe_every": 4}
    with pytest.raises(ConfigError, match="expert parallelism needs an MoE layer on every pipeline rank"):
        resolve(tiny(model=model, train={"global_batch": 8}, parallel={"dp": 2, "ep": 2} | v))
    model = {"num_layers": 4, "first_dense_layers": 2}
    check_topology(resolve(tiny(model=model, train={"global_batch": 8}, parallel={"dp": 2, "ep": 2} | v))[0])


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("cp", "parallel.sp"),
        ("mics", "parallel.hpz"),
        ("vpp", "parallel.pp_schedule=dualpipev"),
        ("dualpipe", "parallel.pp_schedule=dualpipev"),
    ],
)
def test_kinds_that_deepspeed_lacks_are_refused_by_name(key, instead):
    with pytest.raises(ConfigError, match=instead):
        tiny(parallel={key: 2})


def test_all_topologies_of_some_processes():
    found = list(topologies(4, tiny().parallel))
    assert all(p.world_size == 4 for p in found)
    assert len({str(p) for p in found}) == len(found)
