"""Which rank is slow: each one's own time in a step, told to all of them, and who is behind its peers for long."""

import functools
import socket
import time
from collections.abc import Sequence
from statistics import median, median_low
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config

from .collapse import Change
from .resume import from_all

WINDOW = 50
"""Steps over which ranks are compared: a hiccup is no straggler."""
SLOW = 1.5
"""Of its peers' median own time, from which a rank is a straggler."""


class OwnTime:
    """This process's seconds in a step, less those in which it waits for others.

    A whole step lasts as long on every rank, as collectives make all wait for the slowest. All of them, and a
    pipeline's sends and receives, wait in `Work.wait`, whoever calls them (ZeRO's gathers and reductions, the layers of
    tensor, expert and sequence parallelism), so what is left is reading data and computing: this rank's part of the
    model and of the optimizer, in every topology. With expert parallelism a rank of much-used experts computes more.

    On a GPU `Work.wait` lets the device wait, not this thread, so it tells nothing there and is not recorded.
    """

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0
        wait = dist.Work.wait

        @functools.wraps(wait)
        def timed(work: Any, *arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(work, *arguments, **keywords)
            finally:
                self._waited += time.perf_counter() - start

        dist.Work.wait = timed  # type: ignore[assignment]

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._waited


@functools.cache
def own_time() -> OwnTime:
    """The one clock of this process."""
    return OwnTime()


def sum_over_all(sums: Tensor) -> tuple[Tensor, list[float]]:
    """Add up a float64 vector over all processes.

    Returns:
        the sum, and what rides along: the own seconds of each rank in this step; empty for a lone process, and on GPUs.
    """
    world = dist.get_world_size()
    if world == 1 or sums.is_cuda:
        dist.all_reduce(sums)
        return sums, []
    own = torch.zeros(world, dtype=sums.dtype)
    own[dist.get_rank()] = own_time().seconds()
    told = torch.cat([sums, own])
    dist.all_reduce(told)
    return told[:-world], told[-world:].tolist()


def slow_ranks(steps: Sequence[Sequence[float]], stage_of: Sequence[int]) -> dict[int, float]:
    """The ranks whose own time is at least `SLOW` times that of their peers, and how many times.

    Medians over the steps, beside the lower median over the ranks of the same pipeline stage, as stages differ in what
    they compute: half of the peers are at least as quick. A rank without peers is never slow.

    Args:
        steps: own seconds of each rank in each step.
        stage_of: of each rank.
    """
    typical = [median(times) for times in zip(*steps, strict=True)]
    found = {}
    for rank, seconds in enumerate(typical):
        peers = median_low([other for other, stage in zip(typical, stage_of, strict=True) if stage == stage_of[rank]])
        if seconds >= SLOW * peers:
            found[rank] = seconds / peers
    return found


class Stragglers:
    """The stragglers of an attempt.

    Args:
        stage_of: of each rank, as `slow_ranks`.
        hosts: of each rank.
    """

    def __init__(self, stage_of: Sequence[int], hosts: Sequence[str]) -> None:
        self._stage_of, self._hosts = stage_of, hosts
        self._steps: list[list[float]] = []
        self._named: set[int] = set()

    def after_step(self, rank_time: list[float]) -> list[Change]:
        """Who became a straggler, or is none any more, by the last `WINDOW` steps; told once."""
        if not rank_time:
            return []
        self._steps.append(rank_time)
        if len(self._steps) < WINDOW:
            return []
        slow, self._steps = slow_ranks(self._steps, self._stage_of), []
        changes = [
            Change("straggler", self._who(rank) | {"times_median": slow[rank], "steps": WINDOW})
            for rank in sorted(slow.keys() - self._named)
        ]
        changes += [Change("straggler_recovered", self._who(rank)) for rank in sorted(self._named - slow.keys())]
        self._named = set(slow)
        return changes

    def _who(self, rank: int) -> dict[str, Any]:
        return {"rank": rank, "host": self._hosts[rank]}


def among_all(config: Config) -> Stragglers:
    """Those of a process group. A collective."""
    world = dist.get_world_size()
    return Stragglers([rank * config.parallel.pp // world for rank in range(world)], from_all(socket.gethostname()))
