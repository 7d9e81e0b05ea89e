"""A run that fails again and again, simulated step by step, and the closed form of the same; pure and seeded."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Constants:
    """Durations taken from a run's record, in seconds."""

    step: float
    """A step's own time: the productive part."""
    between: float = 0.0
    """From the end of a step to the start of the next."""
    cost: float = 0.0
    """Time that training loses to a checkpoint: it pauses, or steps are slower during the write."""
    write: float = 0.0
    """From the start of a checkpoint, where `cost` starts, too, until it is committed."""
    down: float = 0.0
    """From a failure until a process is up that can fail again."""
    startup: float = 0.0
    """From there to the first step; this may be cut short by a failure."""


@dataclass(frozen=True)
class Life:
    """A simulated run, in seconds, from the start of its first step to the end of its last."""

    wall: float
    productive: float
    """Time in steps, each counted once."""
    lost: float
    """From when the last committed checkpoint was taken, or an attempt's first step, until a failure."""
    failures: int

    @property
    def goodput(self) -> float:
        return self.productive / self.wall


def poisson(mtbf: float, seed: int) -> Iterator[float]:
    """Times to the next failure, exponentially distributed."""
    draw = random.Random(seed)
    while True:
        yield draw.expovariate(1 / mtbf)


class Progress(NamedTuple):
    """The state that a checkpoint keeps."""

    step: int = 0
    productive: float = 0.0
    """Seconds of the steps up to here."""
    at: float = 0.0
    """When it was taken."""


def simulate(
    constants: Constants,
    every: int | Callable[[int], int],
    gaps: Iterator[float],
    steps: int,
    step_times: Iterator[float] | None = None,
    last_life: float = math.inf,
) -> Life:
    """Simulate a run of `steps` steps.

    Args:
        every: steps between checkpoints; or a function of the steps taken so far, lost ones included, that gives them.
        gaps: seconds from each attempt's start to the failure that ends it, if the attempt lasts that long. The first
            attempt starts with its first step. After the last gap nothing fails.
        step_times: seconds of each step taken, in order; `constants.step` without them and after the last.
        last_life: seconds after which the run is abandoned, from the start of the attempt after the last failure.
    """
    now, failures, lost, kept = 0.0, 0, 0.0, Progress()
    alive, fails_at, taken = 0.0, next(gaps, math.inf), 0
    while True:
        until = alive + last_life if fails_at == math.inf else math.inf
        done, writing, committed_at, saved = kept._replace(at=now), kept, math.inf, kept.step
        began = now
        while done.step < steps and now < min(fails_at, until):
            seconds = next(step_times, constants.step) if step_times else constants.step
            now += seconds + constants.between
            done = Progress(done.step + 1, done.productive + seconds, now)
            taken += 1
            if done.step - saved >= (every(taken) if callable(every) else every) and done.step < steps:
                saved = done.step
                if committed_at < math.inf:
                    now = max(now, committed_at)  # one is written at a time
                    kept = writing if committed_at <= fails_at else kept
                writing, committed_at = done._replace(at=now), now + max(constants.write, constants.cost)
                now += constants.cost
        if (done.step == steps or now >= until) and now <= fails_at:
            return Life(now, done.productive, lost, failures)
        kept = writing if committed_at <= fails_at else kept
        failures += 1
        lost += max(fails_at - max(kept.at, began), 0.0)
        alive = fails_at + constants.down
        now, fails_at = alive + constants.startup, alive + next(gaps, math.inf)


def closed_form(constants: Constants, every: int, mtbf: float) -> float:
    """The goodput of an endless run whose attempts fail after exponentially distributed times.

    As Daly 2006 (Future Generation Computer Systems 22:303), section 4, whose total time is
    `mtbf e^(restart / mtbf) (e^((work + cost) / mtbf) - 1) work_total / work`, with two additions: a background
    write delays every commit equally, as a longer restart would, and nothing can fail while nothing is up. It is the
    work of the expected number of commits per attempt divided by the expected time from one start to the next.

    Args:
        mtbf: mean seconds from an attempt's start to its failure.
    """
    period = every * (constants.step + constants.between) + constants.cost
    before = constants.startup + max(constants.write, constants.cost) - constants.cost
    commits = math.exp(-before / mtbf) / math.expm1(period / mtbf)
    return commits * every * constants.step / (mtbf + constants.down)
