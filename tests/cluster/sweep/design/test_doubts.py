"""Warnings of a plan."""

import math
import re

import pytest

from cluster.sweep.design.doubts import off_centre, repeated
from cluster.sweep.design.plan import plan
from cluster.sweep.design.sizes import conventions
from configs.sweep.definition import sweep_from_dict

SHAPE = {"head_dim": 16, "aspect_ratio": 32, "ffn_multiple": 16}


def plan_of(losses=None, **keys):
    return plan(sweep_from_dict({"base": "dense-small", "shape": SHAPE} | keys), 512, losses)


def warnings_of(losses=None, **keys):
    return [line for line in plan_of(losses, **keys).warnings if not line.startswith("Step Law")]


BUDGETS = [1e15, 3e15, 1e16]


def test_a_centred_plan_gives_no_warning():
    assert warnings_of(isoflop={"budgets": BUDGETS}, variants={"dense": {}, "moe": {"experts": 4}}) == []
    assert warnings_of(isoflop={"budgets": BUDGETS, "sizes": 7}) == []
    large = plan_of(isoflop={"budgets": [7e18, 1e19, 2e19], "spread": 2}, shape={}, set={"train.seq_len": 2048})
    assert large.warnings == ()


def test_beyond_the_sizes_or_at_their_edge():
    line = warnings_of(isoflop={"budgets": BUDGETS, "parameters": [1e6, 1.4e6, 2e6, 2.5e6, 2.9e6]})[0]
    assert line.startswith("off-centre: by 20 tokens per parameter the best size is beyond the sizes or at their edge")
    assert "dense 3e15: 4.87M in 935k to 2.85M" in line
    assert "dense 1e16" in line
    assert "widen isoflop.spread" in line


def test_few_sizes_on_a_side():
    (line,) = warnings_of(isoflop={"budgets": BUDGETS, "sizes": 3})
    assert "fewer than 3 sizes are on one side of the best" in line
    assert line.count("dense") == 3
    assert "raise isoflop.sizes" in line


def test_by_a_fitted_optimum():
    planned = plan_of(isoflop={"budgets": BUDGETS})
    here = planned.trials[2]
    n = conventions(here.counts)["active"]
    assert off_centre(planned.sweep, planned.trials, lambda variant, budget: n if budget == 1e15 else None, "it") == []
    line = off_centre(planned.sweep, planned.trials, lambda variant, budget: 3 * n, "the fit")[0]
    assert line.startswith("off-centre: by the fit the best size is beyond")


def test_by_the_losses_of_finished_trials():
    keys = {"isoflop": {"budgets": BUDGETS}}
    trials = plan_of(**keys).trials
    bowl = {t.name: (math.log(t.tokens / t.counts.active / 20)) ** 2 for t in trials}
    assert warnings_of(bowl, **keys) == []
    falling = {t.name: -float(t.counts.active) for t in trials}
    (line,) = warnings_of(falling, **keys)
    assert "the size with the lowest loss is at the edge of its budget (dense 1e15: " in line
    assert "the largest" in line
    falling.pop(trials[0].name)
    falling[trials[5].name] = math.nan
    assert "dense 1e15" not in "".join(warnings_of(falling, **keys)), "one size has not finished yet"


def test_batches_and_steps():
    lines = warnings_of(isoflop={"budgets": BUDGETS}, rules={"batch": "fixed", "lr": "fixed"},
                        set={"train": {"global_batch": 1024, "micro_batch": 8}})  # fmt: skip
    assert [re.split(" trials? ha(?:s|ve) ", line)[1][:20] for line in lines] == [
        "a batch that is larg",
        "fewer than 100 steps",
    ]
    assert "262,144 tokens a step, Step Law" in lines[0]


def test_step_law_far_from_where_it_was_fitted():
    (line,) = plan_of(isoflop={"budgets": BUDGETS}).warnings
    assert line.startswith("Step Law is used outside the range that it was fitted on: N from ")
    assert "rules.max_lr=0.02 caps" in line or "rules.max_lr" not in line
    assert plan_of(isoflop={"budgets": BUDGETS}, rules={"lr": "fixed"}).warnings == ()


def test_sizes_that_are_nearly_the_same_and_few_budgets():
    lines = warnings_of(
        isoflop={"budgets": [3e13], "spread": 1.3},
        shape={"head_dim": 64, "slack": 0, "min_layers": 1, "aspect_ratio": 10},
    )
    assert any(line.startswith("isoflop.budgets has 1: a law needs 3") for line in lines)
    assert any(line.startswith("sizes next to each other are nearly the same") for line in lines)


def test_shapes_that_are_too_coarse_for_the_sizes():
    lines = warnings_of(isoflop={"budgets": [1e14], "spread": 1.2}, shape={"head_dim": 64})
    assert any("sizes are further apart than isoflop.spread says (dense 1e14: " in line for line in lines)


def test_unequal_sizes():
    lines = warnings_of(isoflop={"budgets": [1e17, 3e17, 1e18]}, count="total", shape={"head_dim": 64},
                        variants={"dense": {}, "moe": {"experts": 16}})  # fmt: skip
    assert any("the sizes of moe differ from those of dense by up to" in line for line in lines)


@pytest.mark.parametrize(("unique", "warned"), [(10**12, False), (10**6, True)])
def test_repeated_data(unique, warned):
    lines = repeated(plan_of(isoflop={"budgets": BUDGETS}).trials, unique)
    assert bool(lines) == warned
    assert not warned or "read the 1,000,000 training tokens over 4 times" in lines[0]
