"""One law of all kinds of models: kinds that were never trained, kinds with few runs, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.scaling import read_table
from models.scaling.allocation import kinds
from models.scaling.fitting import FORMS
from models.scaling.forms.sparse import Ludziejewski
from models.scaling.joint import Joint
from models.scaling.predictions import Forecast
from models.scaling.refusal import Refusal
from models.scaling.scoring import score
from models.scaling.table import Table

DATA = Path(__file__).parent / "data"
CLARK = {"n": "dense_parameter_count", "c": "flops_per_step", "loss": "loss_validation", "experts": "num_experts",
         "recipe": "router_type"}  # fmt: skip
LAW = Ludziejewski().parameters(
    {"c": 1.36, "a": 60.0, "b": 40.0, "delta": -0.25, "alpha": -0.22, "gamma": 0.011, "omega": 0.05, "beta": -0.2,
     "zeta": -0.004}
)  # fmt: skip


def clark(router: str) -> Table:
    table = read_table(DATA / "clark_runs.csv", CLARK, {"k": "1", "routing_frequency": "0.5", "flop_increase": "1"})
    return replace(table.take(np.array([each in (router, "Dense") for each in table.recipe])), recipe=())


def planted(experts: tuple[int, ...], seed: int, noise: float = 0.003) -> Table:
    """Six budgets of seven sizes for each number of experts, from a law of Ludziejewski et al.'s form."""
    c, ratio, e = (each.ravel() for each in np.meshgrid(np.geomspace(1e18, 1e20, 6), np.geomspace(0.3, 3, 7), experts))
    n = np.sqrt(c / 120) * ratio
    x = {"n": n, "d": c / (6 * n), "experts": e.astype(float)}
    loss = np.exp(Ludziejewski().log_loss(LAW[None], x)[0] + noise * np.random.default_rng(seed).normal(size=len(n)))
    return Table(n=n, d=x["d"], c=c, loss=loss, extra={"experts": x["experts"]}, run=tuple(map(str, range(len(n)))))


def truth(experts: int, budget: float) -> tuple[float, float]:
    """(loss, N) of the best model of a budget."""
    n = np.geomspace(1e6, 1e12, 20_000)
    x = {"n": n, "d": budget / (6 * n), "experts": np.full_like(n, experts)}
    losses = Ludziejewski().log_loss(LAW[None], x)[0]
    return float(np.exp(losses.min())), float(n[losses.argmin()])


def without(table: Table, experts: int) -> tuple[Table, Table]:
    mine = table.extra["experts"] == experts
    return table.take(~mine), table.take(mine)


def errors_of_unseen(router: str, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors at runs of a number of experts that the law has not seen, and whether each is covered."""
    others, held = without(clark(router), experts)
    forecast, found = Forecast(others), []
    for n, d, loss in zip(held.n, held.d, held.loss, strict=True):
        each = forecast.at_size(n, d, {"experts": experts}).run_loss
        found.append((loss / each.value - 1, each.low <= loss <= each.high))
    return tuple(np.array(column) for column in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("experts", [16])
def test_a_number_of_experts_that_was_not_trained(experts):
    """Clark et al.'s models."""
    errors, inside = errors_of_unseen("Hash", experts)
    assert np.abs(errors).max() < 0.013
    assert inside.all()


@pytest.mark.slow
@pytest.mark.parametrize("router", ["S-Base", "RL-R", "Hash"])
def test_every_number_of_experts_from_all_others(router):
    """The ends of the range too, which are extrapolated to."""
    found = [errors_of_unseen(router, int(kind.shape["experts"])) for kind in kinds(clark(router))]
    errors, inside = (np.concatenate(each) for each in zip(*found, strict=True))
    assert len(errors) >= 59
    assert np.abs(errors).mean() < 0.004
    assert np.abs(errors).max() < 0.013
    assert inside.mean() >= 0.95


def test_the_best_model_of_an_unseen_kind_at_a_larger_budget():
    loss, n = truth(8, 1e21)
    found = Forecast(planted((1, 4, 16, 64), 0), FORMS["ludziejewski"]).at_budget(1e21, shape={"experts": 8})
    assert found.shape == {"experts": 8}
    assert found.loss.low <= loss <= found.loss.high
    assert found.loss.value == pytest.approx(loss, rel=0.01)
    assert found.n.low <= n <= found.n.high
    assert found.n.value == pytest.approx(n, rel=0.5)
    assert found.method["joint"]["shift"] == 0
    assert found.warnings[0] == "by one law of 4 kinds of models, none of them this one (experts=8)"


@pytest.mark.slow
def test_intervals_of_unseen_kinds_cover():
    """At the next budget and ten times that, within and beyond the experts trained; twelve tables."""
    inside, sizes = [], []
    for seed in range(12):
        forecast = Forecast(planted((1, 4, 16, 64), seed))
        for experts in (8, 128):
            for budget in (2e20, 2e21):
                (loss, n), found = truth(experts, budget), forecast.at_budget(budget, shape={"experts": experts})
                inside.append(found.loss.low <= loss <= found.loss.high)
                sizes.append(found.n.low <= n <= found.n.high)
    assert np.mean(inside) >= 0.9
    assert np.mean(sizes) >= 0.9


@pytest.mark.slow
def test_a_kind_with_few_runs_is_moved_towards_them():
    """As far as the departures of other kinds make it likely, but never beyond its own runs."""
    table = planted((1, 4, 8, 16, 64), 3, noise=0.001)
    rare = np.flatnonzero(table.extra["experts"] == 8)
    loss = np.where(table.extra["experts"] == 8, 1.01 * table.loss, table.loss)  # it departs from the law by 1%
    kept = np.sort(np.concatenate([np.flatnonzero(table.extra["experts"] != 8), rare[:3]]))
    few = replace(table, loss=loss).take(kept)
    joint = Joint(few, FORMS["ludziejewski"])
    [law] = [joint.law(kind) for kind in joint.kinds if kind.shape == {"experts": 8}]
    assert 0 < law.shift < 0.011
    found = Forecast(few).at_size(1e9, 1e10, {"experts": 8})
    assert found.method["joint"]["shift"] != 0


@pytest.mark.slow
def test_a_joint_form_is_used_for_every_kind_if_it_is_named():
    table = planted((1, 4, 16, 64), 1)
    found = Forecast(table, FORMS["ludziejewski"]).at_budget(1e21)
    assert found.form == "ludziejewski"
    assert found.shape == {"experts": 64}
    own = Forecast(table).at_budget(1e21)
    assert own.form.startswith("crossed")


@pytest.mark.slow
def test_scores_of_kinds_that_smaller_budgets_lack():
    table = planted((1, 4, 16, 64), 2)
    keep = (table.extra["experts"] != 16) | (table.c > 5e19)
    found, left_out = score(planted((1, 4, 8, 64, 16), 2).take(np.flatnonzero(
        (planted((1, 4, 8, 64, 16), 2).extra["experts"] != 16) | (planted((1, 4, 8, 64, 16), 2).c > 5e19)
    )), 5e19, "ludziejewski")  # fmt: skip
    assert left_out == []
    assert np.mean([each.inside for each in found]) > 0.9
    found, left_out = score(table.take(np.flatnonzero(keep)), 5e19)
    assert {why.partition(":")[0] for _, why in left_out} == {"the smaller budgets have no model of this kind"}
    assert len(left_out) == 7
    assert "runs of at least 4" in left_out[0][1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"experts": 8.0, "granularity": 2.0}, "--kind granularity: the table tells kinds apart by experts, top_k"),
        ({"experts": 8.0}, "--kind experts=8 leaves top_k open: give it too, such as top_k=4"),
    ],
)
def test_a_kind_must_be_fully_said(shape, message):
    table = planted((1, 4, 16, 64), 0)
    top = np.where(table.extra["experts"] == 1, 1.0, np.where(table.extra["experts"] > 4, 4.0, 2.0))
    joint = Joint(replace(table, extra=table.extra | {"top_k": top, "active_ratio": top / table.extra["experts"]}),
                  FORMS["ludziejewski"])  # fmt: skip
    with pytest.raises(Refusal, match=message):
        joint.unseen(shape)
    assert joint.unseen({"experts": 8.0, "top_k": 4.0}).shape == {"experts": 8.0, "top_k": 4.0, "active_ratio": 0.5}
    assert len(joint.unseen({"experts": 4.0, "top_k": 2.0}).rows) == 42


def test_three_kinds_are_too_few():
    with pytest.raises(Refusal, match="at least 4, such as four numbers of experts, but the table has 3"):
        Forecast(planted((1, 4, 16), 0)).at_budget(1e21, shape={"experts": 8})
