"""Pictures of a sweep: which are drawn, what their lines show, and that the page needs no network."""

from dataclasses import replace

import numpy as np
import pytest
from laws import HOFFMANN, isoflop
from matplotlib.image import imread

from cluster.sweep.results.figures import number, ticks
from cluster.sweep.results.plots import Prediction, _expected, _frontier, draw
from models.scaling.allocation import kinds
from models.scaling.curves import compute, curve
from models.scaling.fitting import Fits, fit, fit_form
from models.scaling.forms.dense import Approach3
from models.scaling.forms.sparse import ClarkPower, Ludziejewski
from models.scaling.predictions import Forecast
from models.scaling.refusal import Refusal
from models.scaling.table import Table

DENSE = isoflop(Approach3(), HOFFMANN)
JOINT = {"c": 1.5, "a": 20, "b": 60, "delta": -0.12, "alpha": -0.22, "gamma": 0, "omega": 0, "beta": -0.22, "zeta": 0}


def moe(noise: float = 0.002) -> Table:
    """The same sizes and budgets, dense and with 8 experts."""
    both = np.concatenate
    n, d, c = (both([getattr(DENSE, key)] * 2) for key in "ndc")
    extra = {"experts": np.repeat([1.0, 8.0], len(DENSE)), "top_k": np.repeat([1.0, 2.0], len(DENSE))}
    form = Ludziejewski()
    log_loss = form.log_loss(form.parameters(JOINT)[None], {"n": n, "d": d, "experts": extra["experts"]})[0]
    loss = np.exp(log_loss + np.random.default_rng(0).normal(0, noise, len(n)))
    return Table(n, d, c, loss, "active", extra=extra)


def test_a_dense_sweep_has_every_picture_but_that_of_experts(tmp_path):
    found = fit(DENSE, forms=["approach3"], bootstraps=50)
    written = draw(
        found, tmp_path / "plots", [Prediction(1e22, 2.1, 2.0, 2.2, found=2.12), Prediction(1e23, 2, 1.9, 2.1)]
    )
    assert [path.name for path in written] == [
        "isoflop.png", "frontier.png", "contours.png", "residuals.png", "sweep.html",
    ]  # fmt: skip
    for path in written[:-1]:
        pixels = imread(path)
        assert pixels.shape[0] > 500
        assert pixels.std() > 0.02
    page = written[-1].read_text()
    assert page.count("Plotly.newPlot") == 4
    assert "<script src=" not in page
    assert "$10^{" not in page, "mathtext, which plotly would show as it is written"


@pytest.mark.parametrize("table", [DENSE, moe()], ids=["dense", "experts"])
def test_the_frontier_shows_what_predict_says(table):
    """The same losses and intervals, solid over the budgets that the law is fitted to and dashed beyond them."""
    forecast, found = Forecast(table), kinds(table)
    c = np.geomspace(1e18, 1e22, 13)
    expected = _expected(forecast, c)
    assert sorted(expected) == list(range(len(found)))
    picture = _frontier(Fits(table, {}, {}, None), found, (), expected, ())
    marks = picture.panels[0].marks
    bands = [mark for mark in marks if mark.kind == "band"]
    assert len(bands) == len(found)
    at = forecast.at_budget(float(c[-1]))
    best = next(i for i, kind in enumerate(found) if kind.shape == at.shape)
    assert (bands[best].y[-1], bands[best].low[-1], bands[best].high[-1]) == at.loss
    lines = [mark for mark in marks if mark.kind == "line" and mark.colour == bands[best].colour]
    (solid,), after = [mark for mark in lines if not mark.dash], [mark for mark in lines if mark.dash][-1]
    assert solid.x.max() <= table.c.max() * 1.01
    assert (after.x.min(), after.x.max()) == (pytest.approx(table.c.max()), c[-1])
    assert at.form in picture.caption


def test_a_moe_sweep_shows_what_experts_are_worth(tmp_path):
    table = moe()
    fits = Fits(table, {"ludziejewski": fit_form(Ludziejewski(), table, bootstraps=20)}, {}, "ludziejewski")
    assert [path.stem for path in draw(fits, tmp_path)] == [
        "isoflop", "frontier", "contours", "residuals", "efficiency", "sweep",
    ]  # fmt: skip


@pytest.mark.parametrize("table", [DENSE, DENSE.take(np.arange(2)), moe()], ids=["dense", "two runs", "experts"])
def test_without_a_reliable_form_the_runs_are_still_drawn(tmp_path, table):
    doubt = {"approach3": Refusal("floor", "a coefficient lies at an edge")}
    written = [path.stem for path in draw(Fits(table, {}, doubt, None), tmp_path, [Prediction(1e22, 2.1, 2.0, 2.2)])]
    assert written == [*(["isoflop"] if len(table) > 2 else []), "frontier", "sweep"]
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("Plotly.newPlot") == len(written) - 1
    assert "No form is reliable" in page


def test_runs_of_one_number_of_tokens_have_no_frontier_in_tokens_and_no_contours(tmp_path):
    n, experts = (part.ravel() for part in np.meshgrid(np.geomspace(1e7, 1e9, 5), [1.0, 4.0, 16.0]))
    form = ClarkPower()
    law = form.parameters({"E": 1.2, "a": -0.15, "b": -0.05, "d": 1.3})
    loss = np.exp(form.log_loss(law[None], {"n": n, "experts": experts})[0])
    table = Table(n, np.full_like(n, 1e10), 6e10 * n, loss, extra={"experts": experts})
    found = fit_form(form, table, bootstraps=0)
    line = curve(found, table, kinds(table)[0], np.array([6e18]))
    assert line.n == pytest.approx([1e8])
    assert line.loss == pytest.approx(loss[(experts == 1) & np.isclose(n, 1e8)], rel=1e-4)
    written = draw(Fits(table, {form.name: found}, {}, form.name), tmp_path)
    assert [path.stem for path in written] == ["frontier", "residuals", "efficiency", "sweep"]


def test_the_frontier_is_the_laws_own():
    """N* = G (C / 6)^(beta / (alpha + beta)), Hoffmann et al., eq. 4."""
    found = fit_form(Approach3(), DENSE, bootstraps=0)
    planted = replace(found, solution=replace(found.solution, parameters=Approach3().parameters(HOFFMANN)))
    c = np.geomspace(1e18, 1e22, 5)
    line = curve(planted, DENSE, kinds(DENSE)[0], c)
    alpha, beta = HOFFMANN["alpha"], HOFFMANN["beta"]
    g = (alpha * HOFFMANN["A"] / (beta * HOFFMANN["B"])) ** (1 / (alpha + beta))
    best = g * (c / 6) ** (beta / (alpha + beta))
    assert line.n == pytest.approx(best, rel=0.01)
    loss = HOFFMANN["E"] + HOFFMANN["A"] / best**alpha + HOFFMANN["B"] / (c / 6 / best) ** beta
    assert line.loss == pytest.approx(loss, rel=1e-5)
    assert line.loss_samples.shape == (0, 5)


def test_compute_that_reaches_a_loss():
    c = np.geomspace(1e18, 1e22, 50)
    assert compute(c**-0.1, c, (3 * c[:40]) ** -0.1) == pytest.approx(3 * c[:40], rel=1e-6)
    assert np.isnan(compute(c**-0.1, c, np.array([1e23**-0.1, 1e17**-0.1]))).all()


@pytest.mark.parametrize(
    ("ends", "scale", "written"),
    [
        ((1.5e7, 2e10), "count", ["100M", "1B", "10B"]),
        ((8e18, 3e20), "flops", ["$10^{19}$", "3×$10^{19}$", "$10^{20}$", "3×$10^{20}$"]),
        ((1.9, 3.2), "loss", ["2", "2.5", "3"]),
        ((-0.0045, 0.003), "share", ["−0.4%", "−0.2%", "0", "+0.2%"]),
        ((0.9, 11.0), "factor", ["1×", "2×", "5×", "10×"]),
    ],
)
def test_ticks_are_few_and_round(ends, scale, written):
    assert [number(value, scale) for value in ticks(*ends, scale, most=4)] == written
