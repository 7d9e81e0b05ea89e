"""Which rank is slow: each one's own time in a step, told to all of them, and who is behind its peers for long."""

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
"""Steps over which ranks are compared: a hiccup is no straggler."""
SLOW = 1.5
"""Of its peers' median own time, from which a rank is a straggler."""


def sum_with_riders(sums: Tensor, riders: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Add up float64 values over all processes.

    Args:
        sums: on the device.
        riders: of the host.

    Returns:
        The sums; the riders' sums and what else rides along: the own seconds of each rank, nothing for a lone process.
        On a GPU they are those of an earlier step, 0 as long as there is none.
    """
    world = dist.get_world_size()
    own = [0.0] * (world if world > 1 else 0)
    if own:
        own[dist.get_rank()] = own_time().seconds()
    told = torch.cat([sums, to_device([*riders, *own], sums.device)])
    dist.all_reduce(told)
    return told[: len(sums)], told[len(sums) :]


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
        if not rank_time or not all(rank_time):
            return []  # a lone process, or one that has not measured any step yet
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
