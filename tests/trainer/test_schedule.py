"""The learning rate of every schedule: warmup, hand-computed values, continuity and the end."""

import math
from itertools import pairwise
from typing import get_args

import pytest

from configs.sections.optim import OptimConfig
from trainer.schedule import learning_rate

SCHEDULES = get_args(OptimConfig.model_fields["schedule"].annotation)
STEPS, WARMUP, PEAK, LOW = 100, 10, 0.5, 0.1
WITH_AN_END = ["linear", "cosine", "wsd", "exponential"]


def rates(schedule, steps=STEPS, **changes):
    """Learning rates of steps 1 to `steps`; index 0 is step 1."""
    optim = OptimConfig(**({"schedule": schedule, "lr": PEAK, "warmup": WARMUP, "min_lr_ratio": LOW} | changes))
    return [learning_rate(step, steps, optim) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_a_line_from_0_to_the_peak(schedule):
    assert rates(schedule)[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(1, WARMUP + 1)])
    assert max(rates(schedule)) == rates(schedule)[WARMUP - 1] == PEAK


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, WARMUP, STEPS - 1, STEPS])
def test_never_rises_after_the_warmup_and_stays_positive(schedule, warmup):
    after = rates(schedule, warmup=warmup)[max(warmup - 1, 0) :]
    assert all(later <= before for before, later in pairwise(after))
    assert all(0 < rate <= PEAK for rate in after)


@pytest.mark.parametrize("schedule", WITH_AN_END)
@pytest.mark.parametrize("warmup", [0, WARMUP, STEPS - 1])
def test_ends_at_min_lr_ratio(schedule, warmup):
    assert rates(schedule, warmup=warmup)[-1] == pytest.approx(LOW * PEAK)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_may_end_at_0(schedule):
    assert rates(schedule, min_lr_ratio=0.0)[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "step"])
def test_no_jumps(schedule):
    """Finer steps make smaller changes: ten times as many, a tenth of the largest change."""
    coarse = max(abs(b - a) for a, b in pairwise(rates(schedule, 100, warmup=20)))
    fine = max(abs(b - a) for a, b in pairwise(rates(schedule, 1000, warmup=200)))
    assert fine <= coarse / 9


def test_values_by_hand():
    """90 steps after a warmup of 10: step 55 is half way, step 40 a third."""
    at = {name: [rates(name)[step - 1] / PEAK for step in (11, 40, 55, 100)] for name in SCHEDULES}
    assert at["constant"] == [1, 1, 1, 1]
    assert at["linear"] == pytest.approx([0.99, 0.7, 0.55, 0.1])
    # 0.1 + 0.9 * (1 + cos(pi * done / 90)) / 2; cos(60 degrees) = 1/2
    assert at["cosine"] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.radians(2))), 0.775, 0.55, 0.1])
    # The last 20 steps (a fifth of the run) fall: the plateau holds until step 80.
    assert at["wsd"] == pytest.approx([1, 1, 1, 0.1])
    assert at["inverse_sqrt"] == pytest.approx([(10 / 11) ** 0.5, 0.5, (10 / 55) ** 0.5, 0.1**0.5])
    # Drops every 33 steps (a third of the run) after the warmup: from steps 44 and 77 on.
    assert at["step"] == pytest.approx([1, 1, 0.1, 0.01])
    assert at["exponential"] == pytest.approx([0.1 ** (1 / 90), 0.1 ** (1 / 3), 0.1**0.5, 0.1])


@pytest.mark.parametrize(("decay_steps", "plateau_ends"), [(None, 80), (30, 70), (1, 99), (1000, 10)])
def test_wsd_plateau(decay_steps, plateau_ends):
    found = [rate / PEAK for rate in rates("wsd", decay_steps=decay_steps)]
    assert found[WARMUP - 1 : plateau_ends] == [1.0] * (plateau_ends - WARMUP + 1)
    assert found[plateau_ends] < 1
    length = STEPS - plateau_ends
    assert found[plateau_ends:] == pytest.approx([1 - 0.9 * into / length for into in range(1, length + 1)])


def test_step_drops_where_told():
    found = rates("step", step_every=25, step_factor=0.5)
    drops = [step for step, (a, b) in enumerate(pairwise(found), start=2) if b < a]
    assert drops == [WARMUP + 26, WARMUP + 51, WARMUP + 76]
    assert found[-1] == PEAK * 0.5**3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps(schedule, steps):
    assert all(0 < rate <= PEAK for rate in rates(schedule, steps, warmup=0))


def test_inverse_sqrt_is_that_of_the_transformer_paper():
    """lr(s) ~ min(s^-1/2, s * warmup^-3/2), scaled to the peak (Vaswani et al., section 5.3)."""
    paper = [min(s**-0.5, s * WARMUP**-1.5) * WARMUP**0.5 * PEAK for s in range(1, STEPS + 1)]
    assert rates("inverse_sqrt") == pytest.approx(paper)
