"""The laws of sparse models: their formulas, their gradients, and that a fit finds planted coefficients."""

import numpy as np
import pytest

from models.scaling.forms.dense import Form
from models.scaling.forms.solve import solve
from models.scaling.forms.sparse import MOE_FORMS, Abnar, Clark, ClarkFloorless, Krajewski, Ludziejewski, saturated


def grid(**axes) -> dict[str, np.ndarray]:
    mesh = np.meshgrid(*(np.asarray(values, dtype=float) for values in axes.values()), indexing="ij")
    return {name: values.ravel() for name, values in zip(axes, mesh, strict=True)}


N, D, EXPERTS = np.geomspace(1e7, 2e9, 8), np.geomspace(5e8, 1e11, 6), 2.0 ** np.arange(10)
ROUTED = grid(n=N, experts=EXPERTS)
# Each form's planted coefficients, its sweep, and how near a fit to losses with 0.2% noise comes to them, where the
# sweep tells: in Abnar's law e and c, in Ludziejewski's and Krajewski's the terms of D, trade places almost freely.
PLANTED = {
    "clark": (
        {"E": 1.2, "a": -0.2, "b": -0.45, "c": 0.035, "d": 1.9, "E_start": 2.1, "E_max": 260.0},
        ROUTED,
        {"E": 0.05, "a": 0.01, "b": 0.05, "c": 0.005, "d": 0.05, "E_start": 0.5, "E_max": 40},
    ),
    "clark_floorless": (
        {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 314.478},
        ROUTED,
        {"a": 0.001, "b": 0.01, "c": 0.001, "d": 0.01, "E_start": 0.5, "E_max": 60},
    ),
    "clark_separable": (
        {"E": 1.2, "a": -0.2, "b": -0.12, "d": 1.9, "E_start": 2.1, "E_max": 260.0},
        ROUTED,
        {"E": 0.05, "a": 0.01, "b": 0.01, "d": 0.05, "E_start": 0.5, "E_max": 40},
    ),
    "clark_unsaturated": (
        {"E": 1.2, "a": -0.2, "b": -0.45, "c": 0.035, "d": 1.9},
        ROUTED,
        {"E": 0.05, "a": 0.01, "b": 0.03, "c": 0.003, "d": 0.05},
    ),
    "clark_power": (
        {"E": 1.2, "a": -0.2, "b": -0.1, "d": 1.9},
        ROUTED,
        {"E": 0.05, "a": 0.01, "b": 0.01, "d": 0.05},
    ),
    "abnar": (
        {"e": 0.94, "a": 16612.5, "b": 5455.67, "c": 0.4598, "d": 17.26,
         "alpha": 0.5962, "beta": 0.3954, "lambda": -0.1666, "delta": 0.1603, "gamma": 0.1595},
        grid(n=N, d=D, active_ratio=[1, 0.5, 0.25, 0.1, 0.05, 0.02]),
        {"alpha": 0.05, "beta": 0.01, "delta": 0.03, "gamma": 0.03},
    ),
    "ludziejewski": (
        {"c": 1.36, "a": 60.0, "b": 40.0,
         "delta": -0.25, "alpha": -0.22, "gamma": 0.011, "omega": 0.05, "beta": -0.2, "zeta": -0.004},
        grid(n=N, d=D, experts=[1, 2, 4, 8, 16, 32]),
        {"c": 0.05, "alpha": 0.01, "beta": 0.02, "gamma": 0.004, "delta": 0.05},
    ),
    "krajewski": (
        {"c": 1.2, "g": 40.0, "a": 300.0, "b": 500.0, "gamma": 0.58, "alpha": 0.32, "beta": 0.28},
        grid(n=N, d=D, granularity=[1, 2, 4, 8, 16]),
        {"c": 0.05, "gamma": 0.1, "alpha": 0.02, "beta": 0.02},
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", MOE_FORMS, ids=lambda form: form.name)


def losses(form: Form) -> np.ndarray:
    truth, x, _ = PLANTED[form.name]
    return np.exp(form.log_loss(form.parameters(truth)[None], x)[0])


def test_every_form_is_planted():
    assert {form.name for form in MOE_FORMS} == PLANTED.keys()


@every_form
def test_coefficients_are_the_parameters_under_other_names(form):
    truth, _, _ = PLANTED[form.name]
    assert form.coefficients(form.parameters(truth)) == pytest.approx(truth, rel=1e-9)


@every_form
def test_gradients_are_those_of_the_terms(form):
    truth, x, _ = PLANTED[form.name]
    gamma = form.parameters(truth)[None, len(form.linear) :] * np.array([[1.0], [1.1]])
    exact, differences = form.gradients(gamma, x), Form.gradients(form, gamma, x)
    np.testing.assert_allclose(np.broadcast_to(exact, differences.shape), differences, atol=1e-8)


@every_form
def test_planted_coefficients_are_found(form):
    truth, x, near = PLANTED[form.name]
    loss = losses(form)
    found = solve(form, x, loss * np.exp(0.002 * np.random.default_rng(0).normal(size=len(loss))))
    assert found.converged
    assert found.at_bound == ()
    coefficients = form.coefficients(found.parameters)
    assert {name: abs(coefficients[name] - truth[name]) < near[name] for name in near} == dict.fromkeys(near, True)
    error = form.log_loss(found.parameters[None], x)[0] - np.log(loss)
    assert np.sqrt(np.mean(error**2)) < 0.001


def test_a_flat_valley_is_descended_to_its_end():
    """Abnar's e and c are nearly interchangeable: under noise of a percent the descent takes many hundreds of steps."""
    loss = losses(Abnar())
    loss = loss * np.exp(0.01 * np.random.default_rng(0).normal(size=len(loss)))
    assert solve(Abnar(), PLANTED["abnar"][1], loss).converged


@every_form
def test_losses_without_noise_give_the_coefficients_back(form):
    truth, x, _ = PLANTED[form.name]
    found = solve(form, x, losses(form))
    assert form.coefficients(found.parameters) == pytest.approx(truth, rel=1e-4)


def test_formulas_are_those_of_the_papers():
    n, d, e = 3e8, 2e10, np.array([1.0, 64.0])
    x = {"n": np.full(2, n), "d": np.full(2, d), "experts": e, "active_ratio": 1 / e, "granularity": e}

    def loss(form):
        return np.exp(form.log_loss(form.parameters(PLANTED[form.name][0])[None], x)[0])

    p = PLANTED["clark_floorless"][0]
    hat = np.log10(saturated(e, p["E_start"], p["E_max"]))
    published = p["a"] * np.log10(n) + p["b"] * hat + p["c"] * np.log10(n) * hat + p["d"]
    np.testing.assert_allclose(np.log10(loss(ClarkFloorless())), published, rtol=1e-12)
    p = PLANTED["clark"][0]
    hat = saturated(e, p["E_start"], p["E_max"])
    expected = p["E"] + 10 ** p["d"] * n ** p["a"] * hat ** (p["b"] + p["c"] * np.log10(n))
    np.testing.assert_allclose(loss(Clark()), expected, rtol=1e-12)
    p = PLANTED["abnar"][0]
    share = 1 / e
    expected = p["e"] + p["a"] / n ** p["alpha"] + p["b"] / d ** p["beta"]
    expected = expected + p["c"] / share ** p["lambda"] + p["d"] / (share ** p["delta"] * n ** p["gamma"])
    np.testing.assert_allclose(loss(Abnar()), expected, rtol=1e-12)
    p = PLANTED["ludziejewski"][0]
    hat = saturated(e, *Ludziejewski.saturation)
    of_n = p["a"] * hat ** p["delta"] * n ** (p["alpha"] + p["gamma"] * np.log(hat))
    of_d = p["b"] * hat ** p["omega"] * d ** (p["beta"] + p["zeta"] * np.log(hat))
    np.testing.assert_allclose(loss(Ludziejewski()), of_n + of_d + p["c"], rtol=1e-12)
    p = PLANTED["krajewski"][0]
    expected = p["c"] + (p["g"] / e ** p["gamma"] + p["a"]) / n ** p["alpha"] + p["b"] / d ** p["beta"]
    np.testing.assert_allclose(loss(Krajewski()), expected, rtol=1e-12)


def test_saturation():
    assert saturated(np.array(1.0), 2.0, 300.0) == pytest.approx(2.0)
    assert saturated(np.array(1e9), 2.0, 300.0) == pytest.approx(300.0, rel=1e-5)
    assert saturated(np.array(17.0), 1.0, 1e12) == pytest.approx(17.0)
