"""The simulator behind benchmarks/goodput.py equals lives written out by hand, and the closed form in the long run."""

import math
from itertools import repeat

import pytest
from goodput_simulator import Constants, closed_form, poisson, simulate

from trainer.checkpoint.cadence import daly


def test_without_failures_there_are_only_steps_and_checkpoints():
    life = simulate(Constants(step=1.0, between=0.25, cost=0.5, write=2.0), 10, iter([]), 100)
    assert life.wall == pytest.approx(100 * 1.25 + 9 * 0.5)  # none after the last step
    assert life.goodput == pytest.approx(100 / 129.5)
    assert (life.failures, life.lost) == (0, 0)


def test_a_write_that_is_slower_than_the_interval_is_waited_for():
    """Checkpoints at 2 (committed at 7), at 7 instead of 4, and the run's last two steps."""
    assert simulate(Constants(step=1.0, write=5.0), 2, iter([]), 6).wall == 9


def test_a_failure_at_a_given_time_written_out():
    """Steps of 1 s, a checkpoint each 3: taken at 3, 6.5 and committed 2 s later, so a failure at 8 loses from 3 on."""
    constants = Constants(step=1.0, cost=0.5, write=2.0, down=4.0, startup=1.5)
    life = simulate(constants, 3, iter([8.0]), 9)
    assert (life.failures, life.lost) == (1, 5.0)
    assert life.wall == 8 + 4 + 1.5 + 3 + 0.5 + 3
    assert life.productive == 9
    kept = simulate(constants, 3, iter([8.5]), 9)
    assert (kept.failures, kept.lost, kept.wall) == (1, 2.0, 8.5 + 4 + 1.5 + 3)


def test_failures_at_equal_distances_written_out():
    """Every attempt lives 10 s: 1 s of start, 9 steps, of which two intervals of 4 are kept."""
    life = simulate(Constants(step=1.0, startup=1.0, down=2.0), 4, iter([9.0, *repeat(10.0, 4)]), 40)
    assert life.failures == 4
    assert life.lost == 4 * 1
    assert life.wall == pytest.approx(9 + 2 + 3 * (10 + 2) + 1 + 8)


def test_a_failure_while_it_starts_loses_no_step():
    life = simulate(Constants(step=1.0, startup=5.0, down=1.0), 10, iter([3.5, 2.0]), 10)
    assert (life.failures, life.lost) == (2, 3.5)
    assert life.wall == 3.5 + 1 + 2 + 1 + 5 + 10


def test_steps_of_given_times_written_out():
    """The step that a failure cuts short is one of them too; those done again count once, with their last time."""
    life = simulate(Constants(step=1.0, startup=2.0), 2, iter([7.5]), 5, iter([1.0, 2.0, 4.0, 3.0, 5.0]))
    assert (life.failures, life.lost) == (1, 4.5)
    assert life.productive == 1 + 2 + 5 + 1 + 1
    assert life.wall == 7.5 + 2 + 5 + 1 + 1


def test_intervals_that_change_written_out():
    """One each 2 steps, from the fifth step taken on each 3: at 2, 4, 7 and 10, where the failure finds the last."""
    life = simulate(Constants(step=1.0), lambda taken: 2 if taken < 5 else 3, iter([11.5]), 14)
    assert (life.failures, life.lost, life.wall) == (1, 1.5, 11.5 + 4)


def test_a_run_that_never_gets_ahead_is_left_in_time():
    """Lives of 10 s and checkpoints after 20: what there is in the end are the steps of the last life."""
    life = simulate(Constants(step=1.0, down=1.0), 20, iter([10.0] * 4), 1000, last_life=5.0)
    assert (life.failures, life.wall, life.productive, life.lost) == (4, 4 * 11 + 5, 5, 40)


REAL = Constants(step=0.6, between=0.002, cost=0.13, write=0.3, down=4.0, startup=2.0)


@pytest.mark.parametrize(
    ("every", "mtbf", "steps"),
    [(2, 20, 100_000), (10, 20, 100_000), (60, 20, 120_000), (2, 75, 200_000), (60, 75, 200_000), (10, 600, 600_000)],
)
def test_the_closed_form_is_its_long_run(every, mtbf, steps):
    """Over a thousand failures or more."""
    life = simulate(REAL, every, poisson(mtbf, seed=every), steps)
    assert life.failures > 500
    assert life.goodput == pytest.approx(closed_form(REAL, every, mtbf), rel=0.02)


def test_the_closed_form_is_dalys():
    """Where a checkpoint is written in the foreground and a restart can fail as anything else."""
    step, cost, restart, mtbf, every = 0.5, 3.0, 20.0, 400.0, 50
    work = every * step
    total = mtbf * math.exp(restart / mtbf) * math.expm1((work + cost) / mtbf) / work
    constants = Constants(step=step, cost=cost, write=cost, startup=restart)
    assert closed_form(constants, every, mtbf) == pytest.approx(1 / total)


@pytest.mark.parametrize("mtbf", [75.0, 600.0, 11_000.0])
def test_dalys_interval_is_the_best_of_the_closed_form(mtbf):
    def goodput(interval: float) -> float:
        every = max(1, round(interval / (REAL.step + REAL.between)))
        return closed_form(REAL, every, mtbf)

    best = max(goodput(0.6 * number) for number in range(1, 2000))
    assert goodput(daly(REAL.cost, mtbf)) == pytest.approx(best, rel=1e-3)


def test_the_same_seed_is_the_same_life():
    assert simulate(REAL, 10, poisson(60, 1), 500) == simulate(REAL, 10, poisson(60, 1), 500)
    assert simulate(REAL, 10, poisson(60, 1), 500) != simulate(REAL, 10, poisson(60, 2), 500)
