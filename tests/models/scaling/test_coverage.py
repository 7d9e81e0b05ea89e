"""Prediction intervals cover actual losses as often as they claim, at held-out budgets."""

from pathlib import Path

import numpy as np
import pytest
from laws import HOFFMANN, isoflop
from scaling_tables import SETS, windows

from models.scaling.forms.dense import Approach3
from models.scaling.predictions import Forecast
from models.scaling.table import budgets, read_table

PORIAN = Path(__file__).parent / "data" / "porian_runs.csv"
COLUMNS = {"n": "n", "d": "tokens", "c": "flops", "loss": "loss"}


@pytest.mark.slow
def test_real_tables():
    """15 isoFLOP tables, the top two budgets of each held out: at least 90% covered, at most 4% wide (median)."""
    inside, widths = [], []
    for number in range(1, 16):
        table = read_table(PORIAN, COLUMNS, {"set": str(number)})
        index = budgets(table).level
        below = table.take(index < index.max() - 1)
        forecast = Forecast(below)
        for held in (index == index.max() - 1, index == index.max()):
            loss = forecast.at_budget(float(table.c[held].mean())).loss
            inside.append(loss.low <= table.loss[held].min() <= loss.high)
            widths.append((loss.high - loss.low) / loss.value)
    assert len(inside) == 30
    assert np.mean(inside) >= 0.9
    assert np.median(widths) <= 0.04


@pytest.mark.slow
def test_the_next_budget_of_one_table():
    found = windows([4], [1])[4]
    assert len(found) == 7
    assert sum(covered for covered, _ in found) >= 6
    assert np.median([width for _, width in found]) <= 0.02


@pytest.mark.slow
def test_the_next_budget_after_a_few():
    """Of the tables that no constant was chosen on; few budgets show little of how far a law holds."""
    for each in windows([3, 4, 5], SETS["held out"]).values():
        assert len(each) > 40
        assert np.mean([covered for covered, _ in each]) >= 0.9
        assert np.median([width for _, width in each]) <= 0.025


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.001, 0.005])
def test_a_planted_law(noise):
    """The compute-optimal loss and N* ten times beyond the largest budget; 95% intervals, give or take chance."""
    form, a, b = Approach3(), HOFFMANN["alpha"], HOFFMANN["beta"]
    g = (a * HOFFMANN["A"] / (b * HOFFMANN["B"])) ** (1 / (a + b))
    n = g * (1e22 / 6) ** (b / (a + b))
    x = {"n": np.array([n]), "d": np.array([1e22 / (6 * n)])}
    loss = float(np.exp(form.log_loss(form.parameters(HOFFMANN)[None], x))[0, 0])
    inside = []
    for seed in range(100):
        found = Forecast(isoflop(form, HOFFMANN, (1e18, 1e21, 7), noise=noise, seed=seed)).at_budget(1e22)
        inside.append((found.loss.low <= loss <= found.loss.high, found.n.low <= n <= found.n.high))
    covered = np.mean(inside, axis=0)
    assert (covered >= 0.9).all(), covered
