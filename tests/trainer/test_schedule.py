"""The learning rate of every schedule: warmup, hand-computed values, continuity and the end."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.optim import lr_scheduler

from configs.sections.optim import OptimConfig
from trainer.schedule import learning_rate

CYCLES = ["one_cycle", "cyclic", "cosine_restarts"]
"""These rise again, or have a rise of their own."""
SCHEDULES = [
    name for name in get_args(OptimConfig.model_fields["schedule"].annotation) if name not in [*CYCLES, "plateau"]
]
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


def by_torch(steps, make):
    """Learning rates of a scheduler of torch's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK, momentum=0.9)
    scheduler, found = make(optimizer), []
    for step in range(1, steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps:
            scheduler.step()
    return found


@pytest.mark.parametrize("steps", [7, STEPS, 333])
def test_one_cycle_is_torchs(steps):
    wanted = by_torch(steps, lambda optimizer: lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps))
    assert rates("one_cycle", steps, warmup=0) == pytest.approx(wanted, rel=1e-9)
    share = by_torch(
        steps, lambda optimizer: lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=3 / steps)
    )
    assert rates("one_cycle", steps, warmup=3) == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("length", [10, 24])
def test_cyclic_is_torchs(length):
    wanted = by_torch(STEPS, lambda optimizer: lr_scheduler.CyclicLR(optimizer, LOW * PEAK, PEAK, length // 2))
    assert rates("cyclic", warmup=0, cycle_steps=length) == pytest.approx(wanted, rel=1e-9)


def test_after_a_warmup_a_cycle_begins_at_its_peak():
    found = rates("cyclic", cycle_steps=20)
    assert found[WARMUP - 1] == found[WARMUP] == PEAK
    assert found[WARMUP + 10] == pytest.approx(LOW * PEAK)
    assert found[WARMUP + 20] == pytest.approx(PEAK)


@pytest.mark.parametrize("growth", [1, 2])
def test_cosine_restarts_are_torchs(growth):
    wanted = by_torch(
        STEPS, lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 15, growth, eta_min=LOW * PEAK)
    )
    assert rates("cosine_restarts", warmup=0, cycle_steps=15, cycle_growth=growth) == pytest.approx(wanted, rel=1e-9)
    assert rates("cosine_restarts", STEPS + WARMUP, cycle_steps=15, cycle_growth=growth)[WARMUP:] == pytest.approx(
        wanted
    )


def test_a_plateau_drops_when_told_and_not_below_the_lowest():
    optim = OptimConfig(schedule="plateau", lr=PEAK, warmup=WARMUP, min_lr_ratio=0.01, plateau_factor=0.2)
    assert learning_rate(5, STEPS, optim, drops=3) == PEAK / 2
    assert [learning_rate(50, STEPS, optim, drops) / PEAK for drops in range(4)] == pytest.approx([1, 0.2, 0.04, 0.01])


@pytest.mark.parametrize("schedule", SCHEDULES + CYCLES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps(schedule, steps):
    assert all(0 < rate <= PEAK for rate in rates(schedule, steps, warmup=0))


def test_inverse_sqrt_is_that_of_the_transformer_paper():
    """lr(s) ~ min(s^-1/2, s * warmup^-3/2), scaled to the peak (Vaswani et al., section 5.3)."""
    paper = [min(s**-0.5, s * WARMUP**-1.5) * WARMUP**0.5 * PEAK for s in range(1, STEPS + 1)]
    assert rates("inverse_sqrt") == pytest.approx(paper)
