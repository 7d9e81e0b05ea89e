"""The solver finds the global optimum, says so when it does not, and refits by the thousand."""

from pathlib import Path

import numpy as np
import pytest
from laws import HOFFMANN, isoflop
from scipy.optimize import least_squares, minimize

from models.scaling.forms.dense import Approach3, DataConstrained, Gadre, Kaplan
from models.scaling.forms.newton import AT_ONCE, HUBER_LOG, LEAST_SQUARES, Objective, Prior
from models.scaling.forms.solve import at_bound, minimise, refit, solve, solve_parts
from models.scaling.forms.sparse import ClarkPower, ClarkSeparable, Ludziejewski
from models.scaling.table import budgets, read_table

DATA = Path(__file__).parent / "data"

LAWS = {
    "approach3": (Approach3(), HOFFMANN),
    "kaplan": (Kaplan(), {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}),
    "overtraining": (Gadre(), {"E": 1.8, "a": 100.0, "b": 100.0, "eta": 0.13}),
}


@pytest.mark.parametrize("name", LAWS)
def test_without_noise_the_planted_law_comes_back(name):
    form, law = LAWS[name]
    table = isoflop(form, law, noise=0.0)
    found = solve(form, table.columns, table.loss)
    assert form.coefficients(found.parameters) == pytest.approx(law, rel=1e-4)
    assert found.at_bound == ()


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("objective", [HUBER_LOG, Objective("log", np.inf), LEAST_SQUARES], ids=str)
def test_no_start_leads_lower(name, objective):
    """Also under outliers, from the planted law and from random starts."""
    form, law = LAWS[name]
    table = isoflop(form, law, noise=0.01, seed=3)
    loss = table.loss.copy()
    loss[::9] *= 1.3
    found = solve(form, table.columns, loss, objective)
    assert found.converged
    assert found.gradient < 1e-6
    generator = np.random.default_rng(0)
    starts = form.parameters(law) + generator.normal(0, 0.1, (40, form.size))
    starts[0] = form.parameters(law)
    _, values, _ = minimise(form, table.columns, loss, np.ones((40, len(loss))), starts, objective)
    assert found.value <= values.min() * (1 + 1e-9)


def test_agrees_with_scipy():
    form, law = LAWS["approach3"]
    table = isoflop(form, law, noise=0.005, seed=1)

    def residuals(p):
        return form.log_loss(p[None], table.columns)[0] - np.log(table.loss)

    def huber(p):
        near = np.minimum(np.abs(residuals(p)), 1e-3)
        return float((near * (np.abs(residuals(p)) - 0.5 * near)).sum())

    ours = solve(form, table.columns, table.loss, Objective("log", np.inf))
    theirs = least_squares(residuals, form.parameters(law), x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert ours.parameters == pytest.approx(theirs.x, rel=1e-5)
    assert ours.value == pytest.approx(theirs.cost, rel=1e-9)
    robust = solve(form, table.columns, table.loss)
    polished = minimize(huber, robust.parameters, method="Nelder-Mead", options={"maxiter": 4000, "fatol": 1e-15})
    assert robust.value == pytest.approx(huber(robust.parameters), rel=1e-9)
    assert robust.value <= polished.fun * (1 + 1e-6)


def test_refits_are_those_of_the_rows_drawn():
    form, law = LAWS["approach3"]
    table = isoflop(form, law, noise=0.005, seed=2)
    start = solve(form, table.columns, table.loss).parameters
    weights = np.random.default_rng(0).multinomial(len(table), np.full(len(table), 1 / len(table)), size=300) * 1.0
    found, converged = refit(form, table.columns, table.loss, weights, start)
    assert converged.mean() > 0.98
    for draw in range(5):
        rows = np.repeat(np.arange(len(table)), weights[draw].astype(int))
        some = table.take(rows)
        alone = solve(form, some.columns, some.loss)
        assert found[draw] == pytest.approx(alone.parameters, rel=1e-3)


@pytest.fixture(scope="module")
def many():
    """Tables that have several local optima each: planted, published dense and published routed runs."""
    law = isoflop(Approach3(), HOFFMANN, noise=0.01, seed=3)
    law.loss[::9] *= 1.3
    sets = read_table(DATA / "porian_runs.csv", {"d": "tokens", "c": "flops"}, {"set": "7"})
    routed = {"n": "dense_parameter_count", "c": "flops_per_step", "loss": "loss_validation", "experts": "num_experts"}
    clark = read_table(DATA / "clark_runs.csv", routed, {"router_type": "RL-R"})
    return {"outliers": law, "porian": sets, "clark": clark}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "form"),
    [
        ("outliers", Approach3()), ("outliers", Kaplan()), ("porian", Approach3()), ("porian", Kaplan()),
        ("porian", Gadre()), ("clark", ClarkSeparable()), ("clark", ClarkPower()), ("clark", Ludziejewski()),
    ],
    ids=lambda each: getattr(each, "name", each),
)  # fmt: skip
def test_parts_end_no_higher_than_each_fitted_alone(many, table, form):
    runs = many[table]
    x, level = {name: runs.columns[name] for name in form.needs}, budgets(runs).level
    growing = [level < k for k in range(2, level.max() + 1)]
    parts = np.array([rows for rows in growing if rows.sum() > form.size])[-6:]
    assert len(parts) > 2
    found, values = solve_parts(form, x, runs.loss, parts, solve(form, x, runs.loss).parameters)
    for rows, end, value in zip(parts, found, values, strict=True):
        some = {name: each[rows] for name, each in x.items()}
        alone = solve(form, some, runs.loss[rows])
        assert value <= alone.value * (1 + 1e-6)
        error = np.abs(form.log_loss(end[None], some)[0] - np.log(runs.loss[rows]))
        near = np.minimum(error, HUBER_LOG.delta)
        assert value == pytest.approx((near * (error - 0.5 * near)).sum(), rel=1e-9)


def test_a_fit_does_not_depend_on_those_beside_it():
    """More fits than are computed at once, which end after different numbers of steps."""
    form, table = Approach3(), isoflop(Approach3(), HOFFMANN, noise=0.01)
    generator = np.random.default_rng(0)
    weights = generator.multinomial(len(table), np.full(len(table), 1 / len(table)), size=2000).astype(float)
    assert len(weights) > 2 * AT_ONCE // len(table)
    starts = form.parameters(HOFFMANN) + generator.normal(0, 0.1, (len(weights), form.size))
    found, values, gradients = minimise(form, table.columns, table.loss, weights, starts, HUBER_LOG)
    for i in (0, 1, 777, 1999):
        alone = minimise(form, table.columns, table.loss, weights[i : i + 1], starts[i : i + 1], HUBER_LOG)
        assert gradients[i] < 1e-6
        assert values[i] == pytest.approx(alone[1][0], rel=1e-9)
        assert found[i] == pytest.approx(alone[0][0], rel=1e-5)


def test_a_floor_of_zero_is_named():
    form, law = LAWS["approach3"]
    table = isoflop(form, law | {"E": 1e-9}, noise=0.0)
    assert "E" in solve(form, table.columns, table.loss).at_bound


def test_an_exponent_at_its_bound_is_named():
    form, law = LAWS["approach3"]
    table = isoflop(form, law)
    assert at_bound(form, table.columns, form.parameters(law | {"beta": 2.0, "B": 1e20})) == ("beta",)


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_the_differences(name):
    form, law = LAWS[name]
    x = isoflop(form, law).columns
    gamma = form.parameters(law)[None, len(form.linear) :]
    step = 1e-6
    for g in range(gamma.shape[1]):
        up = gamma.copy()
        up[:, g] += step
        change = (form.log_terms(up, x) - form.log_terms(gamma, x)) / step
        assert form.gradients(gamma, x)[:, :, g] == pytest.approx(change, abs=1e-4)


def test_repeated_tokens():
    form = DataConstrained()
    law = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.35, "beta": 0.35, "R_D": 15.4, "R_N": 5.3}
    table = isoflop(form, law, noise=0.0005, unique=(2e8, 1e9, 1e12), sizes=12)
    found = solve(form, table.columns, table.loss)
    ours = form.coefficients(found.parameters)
    assert ours["R_D"] == pytest.approx(15.4, rel=0.25)
    assert ours["alpha"] == pytest.approx(0.35, abs=0.02)
    # One repetition is worth nearly what new tokens are, forty next to nothing (the paper's section 5).
    x = {"n": np.full(2, 1e8), "d": np.array([2e9, 4e10]), "unique": np.full(2, 1e9)}
    fresh = x | {"unique": x["d"]}
    loss, best = (np.exp(form.log_loss(found.parameters[None], each)[0]) for each in (x, fresh))
    assert loss[0] - best[0] < 0.2 * (loss[1] - best[1])


def test_the_tie_between_terms_of_repeated_data_holds():
    """U_N is the compute-optimal N for U_D tokens by the fit's own coefficients (the paper's section 3.2)."""
    form = DataConstrained()
    law = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.4, "beta": 0.3, "R_D": 15.4, "R_N": 5.3}
    p = form.parameters(law)
    assert form.coefficients(p) == pytest.approx(law)
    g = (0.4 * 521 / (0.3 * 1488)) ** (1 / 0.7)
    unique = 5e8
    size = g * (g * unique) ** (0.3 / 0.4)
    n, d = 3 * size, 8 * unique
    x = {"n": np.array([n]), "d": np.array([d]), "unique": np.array([unique])}
    n_worth, d_worth = size * (1 + 5.3 * (1 - np.exp(-2 / 5.3))), unique * (1 + 15.4 * (1 - np.exp(-7 / 15.4)))
    expected = 1.87 + 521 / n_worth**0.4 + 1488 / d_worth**0.3
    assert np.exp(form.log_loss(p[None], x)[0, 0]) == pytest.approx(expected, rel=1e-9)


def test_a_law_that_is_not_quite_right_is_fitted_to_its_optimum():
    """A smooth misfit of a percent, as real losses have: the objective is nearly L1, and the floor tends to vanish."""
    form = Ludziejewski()
    n, d, experts = (
        part.ravel()
        for part in np.meshgrid(np.geomspace(1.5e7, 1.3e9, 6), np.geomspace(2.6e10, 1.3e11, 5), 2.0 ** np.arange(10))
    )
    worth = 1 / (1 / (experts - 1 + 1 / (1 / 2.1 - 1 / 260.0)) + 1 / 260.0)
    log_loss = np.log(10**1.1 * n**-0.083 * worth ** (-0.108 + 0.0038 * np.log(n / 1e8))) + 0.3 * (d / 1e9) ** -0.3
    log_loss = log_loss + 0.003 * np.sin(experts) + 0.001 * np.random.default_rng(0).normal(size=len(n))
    x = {"n": n, "d": d, "experts": experts}
    found = solve(form, x, np.exp(log_loss))
    assert found.converged
    starts = found.parameters + np.random.default_rng(1).normal(0, 0.02, (6, form.size))
    _, values, _ = minimise(form, x, np.exp(log_loss), np.ones((6, len(n))), starts, HUBER_LOG, 2000)
    assert found.value <= values.min() * (1 + 1e-6)


def test_a_prior_of_the_exponents_is_part_of_the_objective():
    """Against scipy's least squares with the prior as two more residuals; a flat one changes nothing."""
    form, table = Approach3(), isoflop(Approach3(), HOFFMANN, noise=0.005)
    weights, start = np.ones((1, len(table))), form.parameters(HOFFMANN)[None]
    squares, mean, scale = Objective("log", np.inf), np.array([[0.45, 0.2]]), 0.02

    def fitted(scale: float) -> np.ndarray:
        prior = Prior(mean, np.full((1, 2), scale**-2.0) * 0.005**2)
        return minimise(form, table.columns, table.loss, weights, start, squares, prior=prior)[0][0]

    def residuals(p):
        return [
            *(form.log_loss(p[None], table.columns)[0] - np.log(table.loss)), *(0.005 * (p[3:] - mean[0]) / scale)
        ]  # fmt: skip

    found, expected = fitted(scale), least_squares(residuals, start[0], xtol=1e-12, ftol=1e-12, x_scale="jac").x
    np.testing.assert_allclose(found, expected, atol=1e-4)
    flat = minimise(form, table.columns, table.loss, weights, start, squares)[0][0]
    assert (fitted(np.inf) == flat).all()
    assert np.abs(found[3:] - flat[3:]).min() > 1e-3
