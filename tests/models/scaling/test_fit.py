"""Fits of a table: the form chosen on held-out budgets, approaches 1 and 2, typed refusals."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from laws import HOFFMANN, isoflop

from configs import ConfigError
from models.scaling.allocation import kinds, optimum
from models.scaling.fitting import Refusal, fit
from models.scaling.forms.dense import Approach3, Kaplan
from models.scaling.isoflop import approach2, valley
from models.scaling.predictions import predict
from models.scaling.table import Table

TABLE = isoflop(Approach3(), HOFFMANN)


def test_the_planted_form_is_chosen_and_its_law_lies_in_the_intervals():
    found = fit(TABLE, bootstraps=200)
    assert found.chosen == "approach3"
    assert set(found.fits) == {"approach3", "kaplan", "overtraining"}
    assert found.refused == {}
    for name, value in HOFFMANN.items():
        low, high = found.best.intervals[name]
        assert low < value < high, name
    summary = found.summary()
    assert {"E", "A", "B", "alpha", "beta", "objective", "converged", "intervals"} <= summary["approach3"].keys()
    assert summary["convention"] == "given"


def test_kaplans_law_is_chosen_where_it_holds():
    law = {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}
    assert fit(isoflop(Kaplan(), law, noise=0.0005), bootstraps=0).chosen == "kaplan"


def test_with_too_few_budgets_to_hold_any_out_the_fit_decides():
    """By Schwarz' criterion, not for its few coefficients."""
    found = fit(isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 3), noise=0.0005), bootstraps=0)
    assert {each.cross_validation for each in found.fits.values()} == {None}
    assert found.chosen == "approach3"
    assert found.best.form.size > min(each.form.size for each in found.fits.values())
    assert found.refused == {}


def test_approaches_1_and_2_find_the_exponent():
    """a = beta / (alpha + beta) of the planted law."""
    found = fit(isoflop(Approach3(), HOFFMANN, sizes=15, noise=0.0005), ["approach3"], bootstraps=0)
    expected = HOFFMANN["beta"] / (HOFFMANN["alpha"] + HOFFMANN["beta"])
    assert found.approach2 is not None
    assert found.approach2.n.exponent == pytest.approx(expected, abs=0.02)
    assert found.approach2.d.exponent == pytest.approx(1 - expected, abs=0.02)
    assert found.approach1 is not None
    assert found.approach1[0].exponent == pytest.approx(expected, abs=0.08)
    assert found.approach1_of == "final losses"


@pytest.mark.slow
def test_approach_1_of_a_ladder_is_by_loss_curves():
    """Its runs end at no common budgets: one run at each says nothing of the best size."""
    expected = HOFFMANN["beta"] / (HOFFMANN["alpha"] + HOFFMANN["beta"])
    form = Approach3()

    def table(n, d, runs):
        loss = np.exp(form.log_loss(form.parameters(HOFFMANN)[None], {"n": n, "d": d})[0])
        return Table(n, d, 6 * n * d, loss, run=tuple(runs))

    sizes, multiples = np.geomspace(1e7, 1e9, 12), np.array([5.0, 20.0, 80.0])
    n, d = np.repeat(sizes, 3), np.outer(sizes, multiples).ravel()
    ladder = table(n, d, [f"{size:.3g} {i % 3}" for i, size in enumerate(n)])
    c = np.geomspace(1e16, 1e20, 30)
    rows, budget = (part.ravel() for part in np.meshgrid(np.arange(len(ladder)), c))
    reached = budget <= ladder.c[rows]
    rows, budget = rows[reached], budget[reached]
    curves = table(ladder.n[rows], budget / (6 * ladder.n[rows]), [ladder.run[i] for i in rows])

    alone = fit(ladder, ["approach3"], bootstraps=0)
    assert alone.approach1 is None
    assert "these runs share none" in str(alone.refused["approach1"])
    found = fit(ladder, ["approach3"], bootstraps=0, curves=curves)
    assert found.approach1_of == "loss curves"
    assert found.approach1[0].exponent == pytest.approx(expected, abs=0.05)


def test_the_optimum_is_the_closed_form():
    """Hoffmann et al., eq. 4: N = G (C / 6)^a, G = (alpha A / (beta B))^(1 / (alpha + beta))."""
    form, [kind], budget = Approach3(), kinds(TABLE), 1e23
    a, b = HOFFMANN["alpha"], HOFFMANN["beta"]
    g = (a * HOFFMANN["A"] / (b * HOFFMANN["B"])) ** (1 / (a + b))
    best = optimum(form, form.parameters(HOFFMANN)[None], TABLE, budget, kind)
    assert best.n[0] == pytest.approx(g * (budget / 6) ** (b / (a + b)), rel=1e-3)
    assert best.n[0] * best.d[0] * 6 == pytest.approx(budget, rel=1e-9)


def refusal(table: Table, **options) -> Refusal:
    with pytest.raises(Refusal) as found:
        fit(table, **options)
    return found.value


def test_few_budgets():
    assert refusal(isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e19, 2))).kind == "few_budgets"


def test_mixed_recipes():
    mixed = replace(TABLE, recipe=tuple("ab" * 21))
    assert refusal(mixed).kind == "mixed_recipes"
    assert "recipes (a, b)" in str(refusal(mixed))


def test_few_rows():
    found = fit(TABLE.take(np.array([0, 8, 16, 30])), forms=["approach3"])
    assert (found.chosen, found.reason.kind) == (None, "few_rows")
    assert str(found.reason) == "approach3 needs more than 5 runs, but there are 4"


def test_a_prediction_from_few_runs_names_a_law_that_they_determine():
    runs = isoflop(
        Kaplan(), {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}, budgets=(1e18, 1e20, 6)
    )
    few = runs.take(np.array([0, 8, 16, 27, 34, 40]) % len(runs))
    with pytest.raises(Refusal, match=r"approach3 needs at least 7 runs .* there are 6; --form kaplan could be fitted"):
        predict(few, 1e21)
    assert predict(few, 1e21, "kaplan").form == "kaplan"
    with pytest.raises(Refusal, match=r"there are 4$"):
        predict(few.take(np.arange(4)), 1e21)


def test_a_form_without_its_columns():
    found = fit(TABLE, forms=["abnar"]).reason
    assert (found.kind, str(found)) == ("columns", "abnar needs the column active_ratio")


def test_a_table_without_the_spread_for_any_form_says_what_each_needs():
    found = fit(replace(TABLE, n=np.full(len(TABLE), 1e8)), bootstraps=0)
    assert found.chosen is None
    assert str(found.refused["approach3"]) == "approach3 needs more than one value of n"
    assert str(found.refused["abnar"]) == "abnar needs the column active_ratio"


def test_where_every_form_is_refused_each_has_its_reason_and_approach_2_stays():
    """Losses that rise with the budget, with the valleys of the planted law."""
    found = fit(replace(TABLE, loss=TABLE.loss * (TABLE.c / TABLE.c[0]) ** 0.1), bootstraps=20)
    assert found.chosen is None
    assert found.refused.keys() >= {"approach3", "kaplan", "overtraining"}
    assert found.approach2 is not None
    assert found.summary()["chosen"] is None
    with pytest.raises(Refusal, match=r"(?s)no form is reliable:.*approach3: .*kaplan: .*overtraining: "):
        _ = found.best


def test_no_such_form():
    with pytest.raises(ConfigError, match="--form hoffman: no such form; known are approach3"):
        fit(TABLE, ["hoffman"])


def test_a_floor_of_zero_is_refused():
    """Losses that fall faster than any power law with a floor; the form without one stays."""
    table = replace(TABLE, loss=TABLE.loss * np.exp(-0.02 * np.log(TABLE.c / TABLE.c[0]) ** 2))
    assert fit(table, ["approach3"], bootstraps=0).reason.kind == "floor"
    found = fit(table, ["approach3", "kaplan"], bootstraps=0)
    assert found.refused["approach3"].kind == "floor"
    assert "E at the edge" in str(found.refused["approach3"])
    assert found.chosen == "kaplan"


@pytest.mark.parametrize(
    ("curve", "kind"),
    [(lambda x: -(x**2), "concave"), (lambda x: x + 0.1 * x**2, "edge"), (lambda x: -x + 0.1 * x**2, "edge")],
)
def test_budgets_without_a_valley(curve, kind):
    n = np.geomspace(1e6, 8e6, 5)
    loss = 3 + curve(np.log(n / np.median(n)))
    with pytest.raises(Refusal) as found:
        valley(np.full(5, 1e15), n, 1e15 / (6 * n), loss)
    assert found.value.kind == kind


def test_budgets_without_a_valley_are_named_and_the_others_used():
    index = np.repeat(np.arange(6), 7)
    rows = ~((index == 0) & (TABLE.n > np.sort(TABLE.n[index == 0])[1]))
    found = approach2(TABLE.take(rows))
    assert len(found.valleys) == 5
    assert [each.kind for each in found.refused] == ["few_sizes"]


def test_a_notebook_needs_neither_ray_nor_torch():
    code = "import sys, models.scaling; print(*{'ray', 'torch', 'deepspeed', 'mlflow', 'pyarrow'} & sys.modules.keys())"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
