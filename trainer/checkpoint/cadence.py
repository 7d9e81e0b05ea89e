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
"""Most seconds between checkpoints, however rare failures are: the most work that a user is ready to lose."""
WRITES = 4.0
"""The interval is at least this many times the duration of a background write: one is in progress at most a quarter of
the time, however little the steps seem to slow down."""
YOUNG = 0.5
"""While nothing has failed, the interval is at most this fraction of the run's time so far: if the prior is wrong, the
first failure costs a third of it, not half an hour, for some fifteen more checkpoints in a run's first hour."""
FIRST = 10
"""Steps before the first checkpoint of a run, which measures the cost, and shows early that the disk accepts it."""
CHANGE = 1.5
"""Factor by which a new interval must differ from the current one: costs are noisy, and near the optimum it matters
little (an interval half as long again loses 8% more time to checkpoints and failures)."""
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
    """Failures per device-second: the posterior's median, of a Poisson count and a prior around `PRIOR`.

    The prior is Cauchy's distribution over the rate's logarithm: it dominates while little is known, and its tails are
    so heavy that one or two failures move the rate to the observed one, even a million times higher.
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
    """Attempts that infrastructure or a hang ended."""
    device_seconds: float
    """In attempts, the devices of each counted."""


def past(events: Sequence[dict[str, Any]], attempt: int) -> Past:
    """The failures of the attempts before this one, and the time in which they came.

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
    """Steps between checkpoints, and the numbers that they follow from."""

    every: int
    interval_s: float
    """Seconds between checkpoints, of which `every` steps are the nearest."""
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
        write: seconds from the beginning of one until it is committed.
        step: seconds of a step.
        mtbf: mean seconds between failures.
        age: seconds in which nothing has failed, if nothing ever has.
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
        saved: step of the last checkpoint, or where the attempt began.
        chosen: steps between them, by rank 0's `Cadence`; for `auto` only.
    """
    return step - saved >= chosen if asked == "auto" else bool(asked) and step % int(asked) == 0


class Cadence:
    """Rank 0's choice as a run goes on, with an event `cadence` for each that is new.

    What a checkpoint costs is measured: the time in which training stood still for it, and what the steps beside its
    writing took longer than those before, on this rank or, through the collectives, on any.

    Args:
        events: of the run; what an earlier attempt has measured holds until there is something newer.
        devices: of this attempt.
    """

    def __init__(self, events: Sequence[dict[str, Any]], devices: int, record: Record) -> None:
        self._past, self._devices, self._record = past(events, record.attempt), devices, record
        self._began = time.monotonic()
        self._steps: deque[float] = deque(maxlen=50)
        self._beside: list[float] | None = None
        """Seconds of the steps beside a write whose cost is still open."""
        self._took: deque[tuple[float, float]] = deque(maxlen=RECENT)
        """Cost and duration of the last writes."""
        self.every = FIRST
        """Steps between checkpoints."""
        if earlier := [event for event in events if event["event"] == "cadence"]:
            last = earlier[-1]
            self.every = last["every"]
            self._took.extend([(last["cost_s"], last["write_s"])] * (RECENT // 2))  # one new one shall not outweigh it
            self._decide(last["cost_s"], last["write_s"], last["step_s"])

    def step_took(self, seconds: float, beside_write: bool, took: tuple[float, float] | None) -> None:
        """Record a finished step.

        Args:
            beside_write: a checkpoint was being written when it began.
            took: of the last checkpoint that was written, as `Saver.took`.
        """
        if self._beside is not None and beside_write:
            self._beside.append(seconds)
            return
        self._close(took)
        self._steps.append(seconds)

    def began_write(self, took: tuple[float, float] | None) -> None:
        """Record that a checkpoint's write has begun, so the previous one has ended; `took` as above."""
        self._close(took)
        self._beside = []

    def _close(self, took: tuple[float, float] | None) -> None:
        beside, self._beside = self._beside, None
        if beside is None or took is None or not self._steps:
            return
        stalled, write = took
        typical = median(list(self._steps)[-8:])  # a recent median: machines are faster at some hours than at others
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
    """What `auto` expects before anything is measured, in one line; `step` in seconds."""
    mtbf = 1 / (PRIOR * devices)
    choice = choose(1.0, 0.0, step, mtbf)
    return (
        f"checkpoint.every=auto: one of {counted(devices, 'device')} fails every {duration(mtbf)} at Llama 3's "
        f"rate; if a checkpoint costs 1 s, that means one every {counted(choice.every, 'step')}"
    )
