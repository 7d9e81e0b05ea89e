"""Tables whose runs share no valley: the loss is predicted, and a best size is named only if the runs determine it."""

import numpy as np
import pytest
from scaling_coverage import LAWS, best
from scaling_tables import DESIGNS, OFF, QUICK, Design, ladder, planted, study

from models.scaling.predictions import WIDEST, Forecast
from models.scaling.refusal import Refusal

HOFFMANN = LAWS["Hoffmann et al."]


@pytest.mark.slow
def test_the_quick_study():
    found = study(*QUICK)
    assert len(found) == 12
    assert np.mean([each.loss for each in found]) > 0.7
    assert np.mean([each.size for each in found]) > 0.7
    assert all(each.off < OFF for each in found)


def test_many_ratios_determine_the_best_size():
    design = Design(ladder(np.geomspace(2e7, 7e8, 7), (3, 8, 20, 50, 120)), 0.001)
    n, loss = best(HOFFMANN, 1e21)
    found = Forecast(planted(HOFFMANN, design, 0)).at_budget(1e21)
    assert found.unnamed == ""
    assert found.n.low < n < found.n.high < 2 * found.n.low
    assert found.n.value == pytest.approx(n, rel=0.2)
    assert found.loss.value == pytest.approx(loss, rel=0.005)


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_ladder_gives_a_bound_but_names_no_size(seed):
    """Under approach 3's form alone, which a ladder cannot confirm, N* would be certain to within a factor of 3."""
    table = planted(HOFFMANN, DESIGNS["6 sizes x 3 ratios"], seed)
    budget = 10 * float(table.c.max())
    n, loss = best(HOFFMANN, budget)
    found = Forecast(table).at_budget(budget)
    assert found.n.low < n < found.n.high
    assert found.loss.low < loss < found.loss.high
    assert np.isnan(found.n.value) == np.isnan(found.d.value) == (found.n.high > WIDEST * found.n.low)
    assert (found.unnamed in found.warnings) == bool(found.unnamed)


def test_one_ratio_determines_no_size():
    unnamed = 0
    for seed in range(4):
        try:
            found = Forecast(planted(HOFFMANN, DESIGNS["10 sizes, one ratio"], seed)).at_budget(1e22)
        except Refusal:
            continue
        assert found.unnamed.startswith("no best size is given for 1e+22 FLOPs: it may be anything from ")
        unnamed += 1
    assert unnamed
