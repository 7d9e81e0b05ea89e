"""`checkpoint.every: auto`: the number of steps between checkpoints, from their cost and the failure rate."""

import bisect
import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from configs import counted
from configs.units import duration
from trainer.record.events import LAUNCH
from trainer.record.lines import Record

PRIOR = 419 / (54 * 86_400 * 16_384)
"""Failures per device-second before a run has failures of its own: Llama 3's unexpected interruptions over 54 days on
16,384 GPUs (arXiv:2407.21783, section 3.3.4)."""
DECADES = 0.5
"""Half of the prior mass lies within this many decades of that rate; the tails are heavy."""
MOST_LOST = 1800.0
"""Most seconds between checkpoints, however rare failures are: the most work that a user is willing to lose."""
WRITES = 4.0
"""The interval is at least this many times the duration of a background write, so that writes take up at most a quarter
of the time, however little they seem to slow down the steps."""
YOUNG = 0.5
"""While nothing has failed, the interval is at most this fraction of the run's time so far. If the prior is wrong, the
first failure then loses at most a third of the run, not half an hour; the price is about fifteen more checkpoints in a
run's first hour."""
FIRST = 10
"""Steps before a run's first checkpoint, which measures the cost, and shows early whether the disk can be written."""
CHANGE = 1.5
"""Factor by which a new interval must differ from the current one: costs are noisy, and near the optimum the interval
matters little (one 50% longer loses 8% more time to checkpoints and failures)."""
RECENT = 9
"""How many recent checkpoints the median cost is taken over."""


def daly(cost: float, mtbf: float) -> float:
    """The interval of work between checkpoints that loses the least time.

    Daly 2006 (Future Generation Computer Systems 22:303): the higher-order form of Young's sqrt(2 cost mtbf) (1974,
    CACM 17:530). Neither restart time nor a background write changes it: both are lost once per failure, whatever the
    interval.

    Args:
        cost: seconds that training loses to a checkpoint, above 0.
        mtbf: mean seconds between failures.
    """
    if cost >= 2 * mtbf:
        return mtbf
    x = math.sqrt(cost / (2 * mtbf))
    return math.sqrt(2 * cost * mtbf) * (1 + x / 3 + x * x / 9) - cost


def failure_rate(failures: int, device_seconds: float) -> float:
    """Failures per device-second: the posterior median for a Poisson count and a prior centred on `PRIOR`.

    The prior is a Cauchy distribution over the logarithm of the rate: it dominates while little is known, but its tails
    are so heavy that one or two failures move the estimate to the observed rate, even one a million times higher.
    """
    decades = [number / 100 for number in range(-1000, 1001)]
    rates = [PRIOR * 10**decade for decade in decades]
    logs = [
        failures * math.log(rate) - rate * device_seconds - math.log1p((decade / DECADES) ** 2)
        for decade, rate in zip(decades, rates, strict=True)
    ]
    highest = max(logs)
    below = list(itertools.accumulate(math.exp(log - highest) for log in logs))
    return rates[bisect.bisect(below, below[-1] / 2)]


class Past(NamedTuple):
    """Failures observed in a run."""

    failures: int
    """Attempts that ended by an infrastructure failure or a hang."""
    device_seconds: float
    """Sum over attempts of duration times number of devices."""


def past(events: Sequence[dict[str, Any]], attempt: int) -> Past:
    """The failures of earlier attempts, and the device time over which they occurred.

    Without a supervisor (torchrun), an attempt that ended without a record counts as lost.
    """
    failures, device_seconds = 0, 0.0
    starts = [event for event in events if event["event"] == "attempt_started"]
    for start in (event for event in starts if event["attempt"] < attempt):
        own = [event for event in events if event["attempt"] == start["attempt"] and event["time"] >= start["time"]]
        own = [event for event in own if event["event"] not in LAUNCH]
        kinds = [event.get("kind", "error") for event in own if event["event"] in ("worker_lost", "worker_failed")]
        ended = any(event["event"] == "attempt_ended" for event in own)
        lost = kinds[-1] in ("infrastructure", "hang") if kinds else not ended
        failures += lost
        device_seconds += (max(event["time"] for event in own) - start["time"]) * start.get("world_size", 1)
    return Past(failures, device_seconds)


class Choice(NamedTuple):
    """Steps between checkpoints, and the numbers behind the choice."""

    every: int
    interval_s: float
    """Seconds between checkpoints; `every` is this, rounded to whole steps."""
    by: str
    """`daly`, or the bound that the interval was clipped to: `write`, `most_lost`, `age`."""
    step_s: float
    cost_s: float
    write_s: float
    mtbf_s: float


def choose(cost: float, write: float, step: float, mtbf: float, age: float = math.inf) -> Choice:
    """The steps between checkpoints.

    Args:
        cost: seconds that training loses to a checkpoint.
        write: seconds from the start of a checkpoint until it is committed.
        step: seconds per step.
        mtbf: mean seconds between failures.
        age: seconds that the run has trained without any failure; infinity if it has failed.
    """
    bounds = {"daly": daly(max(cost, 1e-6), mtbf), "write": WRITES * write, "most_lost": MOST_LOST}
    bounds["age"] = max(YOUNG * age, bounds["write"])
    interval = min(max(bounds["daly"], bounds["write"]), MOST_LOST, bounds["age"])
    by = next(name for name, seconds in bounds.items() if interval == seconds)
    return Choice(max(1, round(interval / max(step, 1e-6))), interval, by, step, cost, write, mtbf)


def is_due(asked: int | str, step: int, saved: int, chosen: int) -> bool:
    """Whether a checkpoint follows a step.

    Args:
        asked: checkpoint.every.
        saved: step of the last checkpoint, or the step at which the attempt began.
        chosen: steps between checkpoints, from rank 0's `Cadence`; for `auto` only.
    """
    return step - saved >= chosen if asked == "auto" else bool(asked) and step % int(asked) == 0


class Cadence:
    """Rank 0's choice of the interval during a run; each new choice is recorded as an event `cadence`.

    A checkpoint's cost is measured: the time that training stalled for it, plus the extra time of the steps that ran
    during its write compared with those before, on this rank or, through the collectives, on any.

    Args:
        events: the run's events; an earlier attempt's measurements hold until there are newer ones.
        devices: number of devices of this attempt.
    """

    def __init__(self, events: Sequence[dict[str, Any]], devices: int, record: Record) -> None:
        self._past, self._devices, self._record = past(events, record.attempt), devices, record
        self._began = time.monotonic()
        self._steps: deque[float] = deque(maxlen=50)
        self._beside: list[float] | None = None
        """Seconds of the steps during the current write, whose cost is not known yet."""
        self._took: deque[tuple[float, float]] = deque(maxlen=RECENT)
        """Cost and duration of the last writes."""
        self.every = FIRST
        """Steps between checkpoints."""
        if earlier := [event for event in events if event["event"] == "cadence"]:
            last = earlier[-1]
            self.every = last["every"]
            self._took.extend([(last["cost_s"], last["write_s"])] * (RECENT // 2))  # one new one must not outweigh it
            self._decide(last["cost_s"], last["write_s"], last["step_s"])

    def step_took(self, seconds: float, beside_write: bool, took: tuple[float, float] | None) -> None:
        """Record a finished step.

        Args:
            beside_write: whether a checkpoint was being written when the step began.
            took: times of the last checkpoint that was written, as in `Saver.took`.
        """
        if self._beside is not None and beside_write:
            self._beside.append(seconds)
            return
        self._close(took)
        self._steps.append(seconds)

    def began_write(self, took: tuple[float, float] | None) -> None:
        """Record that a checkpoint's write has begun, so the previous one has ended; `took` as in `step_took`."""
        self._close(took)
        self._beside = []

    def _close(self, took: tuple[float, float] | None) -> None:
        beside, self._beside = self._beside, None
        if beside is None or took is None or not self._steps:
            return
        stalled, write = took
        typical = median(list(self._steps)[-8:])  # a recent median: a machine's speed varies over the day
        self._took.append((max(stalled, sum(beside) - len(beside) * typical), write))
        cost, write = (median(values) for values in zip(*self._took, strict=True))
        self._decide(cost, write, median(self._steps))

    def _decide(self, cost: float, write: float, step: float) -> None:
        device_seconds = self._past.device_seconds + (time.monotonic() - self._began) * self._devices
        mtbf = 1 / (failure_rate(self._past.failures, device_seconds) * self._devices)
        age = math.inf if self._past.failures else device_seconds / self._devices
        choice = choose(cost, write, step, mtbf, age)
        if max(choice.every, self.every) >= CHANGE * min(choice.every, self.every):
            self.every = choice.every
            evidence = {"failures": self._past.failures, "device_hours": device_seconds / 3600}
            self._record.event("cadence", **choice._asdict(), **evidence)


def expected(devices: int, step: float) -> str:
    """What `auto` expects before anything is measured, as one line; `step` in seconds."""
    mtbf = 1 / (PRIOR * devices)
    choice = choose(1.0, 0.0, step, mtbf)
    return (
        f"checkpoint.every=auto: at Llama 3's failure rate, one of {counted(devices, 'device')} fails every "
        f"{duration(mtbf)}; if a checkpoint costs 1 s, one is written every {counted(choice.every, 'step')}"
    )
