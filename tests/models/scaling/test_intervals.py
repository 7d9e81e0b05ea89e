"""Intervals beyond a sweep: their parts, and that they cover planted laws neither too rarely nor too often."""

import json

import numpy as np
import pytest
from scaling_coverage import LAWS, best, planted, sweep

from models.scaling.drift import HOLDS, Drift, Held
from models.scaling.forms.crossed import Crossed
from models.scaling.forms.dense import Approach3
from models.scaling.intervals import extrapolate
from models.scaling.laws import RECENT, has_valleys
from models.scaling.refusal import Refusal
from models.scaling.table import Table, budgets

HOFFMANN = LAWS["Hoffmann et al."]


def ladder(noise: float, seed: int = 0) -> Table:
    """Sizes by tokens per parameter, whose budgets no two runs share."""
    generator = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(2e7, 7e8, 7), 5)
    d = n * np.tile([10, 21, 43, 90, 190], 7)
    return Table(n=n, d=d, c=6 * n * d, loss=HOFFMANN(n, d) * np.exp(generator.normal(0, noise, len(n))))


def test_crossed_contains_approach_3():
    n, d = np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)
    form = Crossed(1e8, 1e10)
    known = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    p = form.parameters(known)
    np.testing.assert_allclose(np.exp(form.log_loss(p[None], {"n": n, "d": d})[0]), HOFFMANN(n, d), rtol=1e-12)
    assert form.coefficients(p) == pytest.approx(known | {"alpha_D": 0, "beta_N": 0})


def test_drift_follows_errors_on_held_out_budgets():
    def drift(*errors: float) -> Drift:
        return Drift.of([Held(4 + i, 1.0, error, 0.001) for i, error in enumerate(errors)], slope=0.05)

    none, unseen, much = drift(0.0005, -0.001, 0.0002, 0.0004), drift(), drift(0.02, -0.015, 0.02, 0.018)
    assert none.std < unseen.std < much.std
    assert unseen.mass[0] == pytest.approx(HOLDS)
    assert none.mass[0] > HOLDS
    assert much.mass[0] < 1e-6
    assert 0.01 < much.std < 0.04


def test_one_fit_that_is_wrong_counts_once():
    once = Drift.of([Held(4, 1.0, 0.01, 0.001)], slope=0.05)
    thrice = Drift.of([Held(4, h, 0.01 * h, 0.001 * h) for h in (1.0, 1.0, 1.0)], slope=0.05)
    np.testing.assert_allclose(once.mass, thrice.mass)


def test_without_noise_the_law_is_found():
    found = extrapolate(sweep(HOFFMANN, 6, 7, 0.0, 0))
    n, loss = best(HOFFMANN, 3e21)
    at = found.at_budget(3e21)
    assert at["loss"].value == pytest.approx(loss, rel=1e-4)
    assert at["n"].value == pytest.approx(n, rel=0.02)
    assert at["loss"].high / at["loss"].low < 1.01


def test_deterministic_and_recorded():
    table = sweep(HOFFMANN, 6, 6, 0.003, 0)
    first, again, other = (extrapolate(table, refits=100, seed=seed) for seed in (1, 1, 2))
    assert first.at_budget(1e21) == again.at_budget(1e21) != other.at_budget(1e21)
    record = json.loads(json.dumps(first.record()))
    law = record["laws"][0]
    assert law["form"] == "crossed"
    assert law["runs"] == RECENT * 6
    assert {held["budgets"] for held in law["loss_drift"]["held_back"]} == {2, 3, 4, 5}


def test_intervals_widen_with_distance_and_level():
    found = extrapolate(sweep(HOFFMANN, 6, 6, 0.003, 0))
    near, far, sure = found.at_budget(4e20)["loss"], found.at_budget(1e22)["loss"], found.at_budget(4e20, 0.99)["loss"]
    assert far.high / far.low > near.high / near.low
    assert sure.low < near.low < near.value < near.high < sure.high
    best_n = found.at_budget(1e21)["n"].value
    beside, aside = (found.at_size(n, 1e21 / (6 * n)) for n in (best_n, 8 * best_n))
    assert aside.high / aside.low > beside.high / beside.low


def test_size_and_tokens_spend_the_budget():
    at = extrapolate(sweep(HOFFMANN, 5, 6, 0.002, 3)).at_budget(1e21)
    assert 6 * at["n"].value * at["d"].value == pytest.approx(1e21, rel=1e-6)
    assert at["n"].low * at["d"].high == pytest.approx(at["n"].high * at["d"].low, rel=1e-6)


def test_noisy_sweeps_fall_back_on_approach_3():
    forms = [[law.form.name for law in extrapolate(sweep(HOFFMANN, 7, 7, noise, 0)).laws] for noise in (0.001, 0.02)]
    assert forms == [["crossed"], ["crossed", "approach3"]]


def test_budgets_are_told_from_ladders():
    table = sweep(HOFFMANN, 6, 5, 0.003, 0)
    generator = np.random.default_rng(0)
    loose = Table(n=table.n, d=table.d, c=table.c * np.exp(generator.normal(0, 0.1, len(table))), loss=table.loss)
    for each in (table, loose):
        found = budgets(each)
        assert has_valleys(each, found)
        assert np.bincount(found.level).tolist() == [5] * 6
    assert not budgets(ladder(0.003)).common


@pytest.mark.parametrize("count", [40, 150, 400])
def test_runs_at_random_flops_share_no_budget(count):
    """However many there are: their FLOPs chain into clusters."""
    generator = np.random.default_rng(count)
    for _ in range(20):
        c = np.exp(generator.uniform(np.log(1e18), np.log(1e20), count))
        index, common = budgets(Table(n=np.sqrt(c), d=np.sqrt(c) / 6, c=c, loss=np.ones(count)))
        assert not common
        assert index.max() + 1 in (6, 7)


def test_pairs_of_sizes_share_budgets_without_a_valley():
    table = sweep(HOFFMANN, 6, 2, 0.003, 0)
    found = budgets(table)
    assert found.common
    assert np.bincount(found.level).tolist() == [2] * 6
    assert not has_valleys(table, found)


def test_a_ladder_takes_all_runs():
    found = extrapolate(ladder(0.003))
    assert [law.form.name for law in found.laws] == ["crossed"]
    assert all(law.window.rows.all() for law in found.laws)
    n, d = 3e9, 6e10
    assert found.at_size(n, d).low < HOFFMANN(np.array(n), np.array(d)) < found.at_size(n, d).high


def test_another_form_takes_all_runs():
    found = extrapolate(sweep(HOFFMANN, 5, 5, 0.003, 0), Approach3(), refits=50)
    assert [law.form.name for law in found.laws] == ["approach3"]
    assert found.laws[0].window.rows.all()


def test_too_few_runs_are_refused():
    with pytest.raises(Refusal, match=r"approach3 needs at least 7 runs .*, but there are 6$"):
        extrapolate(sweep(HOFFMANN, 2, 3, 0.003, 0))


@pytest.mark.slow
def test_a_few_seeds():
    """The slow test's claim on so few seeds that only gross errors show."""
    at = planted(HOFFMANN, 5, 5, 0.003, 8)
    assert min(at.loss, at.size) >= 0.7
    assert at.width < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_planted_laws(name):
    """95% intervals cover 90 to 99% over 200 seeds, pooled over designs, also of laws that the forms do not contain."""
    each = [planted(LAWS[name], *design, 200) for design in ((5, 5, 0.01), (7, 7, 0.001), (9, 9, 0.003))]
    loss, size = np.mean([at.loss for at in each]), np.mean([at.size for at in each])
    assert 0.9 <= loss <= 0.99
    assert 0.9 <= size <= 0.99
