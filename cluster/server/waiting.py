"""Which queued jobs may start now: pure functions of jobs and machines. Does not know Ray."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.gangs.share import Node, Share, capacity

from .messages import Job, Known, State

QUEUED: State = "QUEUED"
RUNNING: State = "RUNNING"
FINISHED: State = "FINISHED"
STOPPED: State = "STOPPED"
FAILED: State = "FAILED"
CANCELLED: State = "CANCELLED"
"""Stopped before it was started."""
LOST: State = "LOST"
"""It was running on a cluster that is gone."""
ACTIVE = (QUEUED, RUNNING)
_ENOUGH = 10**9
"""Workers on a machine, where each reserves nothing of it."""


class Gang(NamedTuple):
    """The processes that a job needs at the same time.

    Attributes:
        group: number of consecutive ranks that communicate most (a tensor-, sequence- or expert-parallel group); they
            share a machine if any has room for them.
    """

    workers: int
    each: Share
    group: int = 1


class Waiting(NamedTuple):
    """A queued job."""

    id: str
    gang: Gang
    priority: int
    """Higher starts first; among equals, the older."""
    since: float


def startable(waiting: Sequence[Waiting], starting: Sequence[Gang], free: list[Node], total: list[Node]) -> list[str]:
    """Ids of the jobs to start now, in order.

    No job overtakes one that waits for others to end: small jobs would starve a large one. A job that does not fit on
    the present machines, and waits for more to join, blocks nobody.

    Args:
        starting: gangs of jobs that were started but do not hold their resources yet.
        free: free resources of each machine.
        total: total resources of each machine.
    """
    for gang in starting:
        free = place(gang, free, total) or free
    chosen, sizes = [], Counter(total)
    for job in sorted(waiting, key=lambda job: (-job.priority, job.since, job.id)):
        if not fits(job.gang, sizes):
            continue
        left = place(job.gang, free, total)
        if left is None:
            break
        chosen.append(job.id)
        free = left
    return chosen


def fits(gang: Gang, sizes: Mapping[Node, int]) -> bool:
    """Whether a gang fits on idle machines, given the number of machines of each size."""
    rooms = _rooms(gang, sizes, sizes)
    return sum(rooms[node] * count for node, count in sizes.items()) >= gang.workers


def place(gang: Gang, free: Sequence[Node], total: Sequence[Node]) -> list[Node] | None:
    """Free resources after the whole gang is placed; None if it does not fit."""
    places = assign(gang, free, total)
    if places is None:
        return None
    cpus, gpus = gang.each
    taken = [places.get(index, 0) for index in range(len(free))]
    return [Node(node.cpus - n * cpus, node.gpus - n * gpus) for node, n in zip(free, taken, strict=True)]


def assign(gang: Gang, free: Sequence[Node], total: Sequence[Node]) -> dict[int, int] | None:
    """Number of workers by index of the machine, without splitting groups; None if the gang does not fit."""
    room_of = _rooms(gang, free, total)
    rooms = sorted(((room_of[node], index) for index, node in enumerate(free)), key=lambda room: (-room[0], room[1]))
    need, places = gang.workers, dict[int, int]()
    for position, (room, index) in enumerate(rooms):
        if room <= 0:
            return None
        if room >= need:  # best fit for what is left; until then the roomiest: few machines, little fragmentation
            _, index = min((room, index) for room, index in rooms[position:] if room >= need)
            return places | {index: need}
        places[index] = room
        need -= room
    return None


def _rooms(gang: Gang, free: Iterable[Node], total: Iterable[Node]) -> dict[Node, int]:
    """Number of workers that fit on a machine, without splitting groups, by its free resources."""
    group = gang.group if any(capacity(node, gang.each) >= gang.group for node in set(total)) else 1
    return {node: int(min(capacity(node, gang.each), _ENOUGH)) // group * group for node in set(free)}


def fold(lines: Iterable[str], refuse: Callable[[str], object] = lambda line: None) -> dict[str, Known]:
    """Jobs by id, from the lines of a journal: JSON objects, later ones update earlier ones.

    Args:
        refuse: called with each line that is skipped because it is malformed or would make a job invalid.
    """
    jobs: dict[str, Known] = {}
    for line in lines:
        try:
            entry = json.loads(line) if line.startswith('{"id": ') else {}
            known = jobs.get(entry["id"])
            job = known.changed(**entry) if known else Known.model_validate(entry)
        except (ValueError, TypeError, KeyError, RecursionError):  # truncated by a crash, or not about a job
            refuse(line)
        else:
            jobs[job.id] = job
    return jobs


def gang_of(job: Job) -> Gang:
    """The processes that a job needs to start."""
    return Gang(job.workers, Share(job.cpus, job.gpus), job.group)
