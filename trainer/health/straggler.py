"""Which ranks are slow: each rank's own time in a step is shared with all, and those that lag their peers are named."""

import socket
from collections.abc import Sequence
from statistics import median, median_low
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config
from models.tasks.task import Change
from trainer.late import to_device
from trainer.processes.collectives import from_all

from .clock import own_time

WINDOW = 50
"""Steps over which ranks are compared: a single slow step makes no straggler."""
SLOW = 1.5
"""A rank is a straggler from this multiple of its peers' median own time."""


def sum_with_riders(sums: Tensor, riders: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Sum float64 values over all processes, in a single all-reduce.

    Args:
        sums: on the device.
        riders: on the host.

    Returns:
        The sums; then the sums of the riders, followed by each rank's own seconds (none for a single process). On a GPU
        these seconds are of an earlier step, 0 if there is none yet.
    """
    world = dist.get_world_size()
    own = [0.0] * (world if world > 1 else 0)
    if own:
        own[dist.get_rank()] = own_time().seconds()
    told = torch.cat([sums, to_device([*riders, *own], sums.device)])
    if world > 1:
        dist.all_reduce(told)
    return told[: len(sums)], told[len(sums) :]


def slow_ranks(steps: Sequence[Sequence[float]], stage_of: Sequence[int]) -> dict[int, float]:
    """The ranks whose own time is at least `SLOW` times that of their peers, and the ratio.

    A rank's median over the steps is compared with the lower median over the ranks of its pipeline stage, as stages
    differ in what they compute: at least half of the peers are as fast as that. A rank without peers is never slow.

    Args:
        steps: own seconds of each rank in each step.
        stage_of: pipeline stage of each rank.
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
        stage_of: pipeline stage of each rank.
        hosts: of each rank.
    """

    def __init__(self, stage_of: Sequence[int], hosts: Sequence[str]) -> None:
        self._stage_of, self._hosts = stage_of, hosts
        self._steps: list[list[float]] = []
        self._named: set[int] = set()

    def after_step(self, rank_time: list[float]) -> list[Change]:
        """Ranks that became stragglers in the last `WINDOW` steps, or recovered; each change is reported once."""
        if not rank_time or not all(rank_time):
            return []  # a single process, or a rank that has not measured any step yet
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
    """The stragglers of the process group. A collective."""
    world = dist.get_world_size()
    return Stragglers([rank * config.parallel.pp // world for rank in range(world)], from_all(socket.gethostname()))
