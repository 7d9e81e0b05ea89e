"""Which of the waiting jobs may start now: pure functions of jobs and machines. Knows nothing of Ray."""

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
"""Never started."""
LOST: State = "LOST"
"""The cluster that ran it is gone."""
ACTIVE = (QUEUED, RUNNING)
_ENOUGH = 10**9
"""Workers on a machine, where each reserves nothing of it."""


class Gang(NamedTuple):
    """What a job needs all at once.

    Attributes:
        group: ranks in a row that talk most (a tensor-, sequence- or expert-parallel group): they share a machine
            wherever one has room for so many.
    """

    workers: int
    each: Share
    group: int = 1


class Waiting(NamedTuple):
    """A job of the queue."""

    id: str
    gang: Gang
    priority: int
    """The higher goes first; of equals the older."""
    since: float


def startable(waiting: Sequence[Waiting], starting: Sequence[Gang], free: list[Node], total: list[Node]) -> list[str]:
    """The jobs to start now, in order.

    Nobody overtakes a job that must wait for others to end: small jobs would keep a large one waiting for ever. One
    that waits for machines to join holds up nobody.

    Args:
        starting: gangs of jobs that were started and hold nothing yet.
        free: what is free of each machine.
        total: what each machine has.
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
    """Whether a gang has room on machines that are empty, given how many there are of each size."""
    rooms = _rooms(gang, sizes, sizes)
    return sum(rooms[node] * count for node, count in sizes.items()) >= gang.workers


def place(gang: Gang, free: Sequence[Node], total: Sequence[Node]) -> list[Node] | None:
    """What is left free once the whole gang is placed; None: it does not fit."""
    places = assign(gang, free, total)
    if places is None:
        return None
    cpus, gpus = gang.each
    taken = [places.get(index, 0) for index in range(len(free))]
    return [Node(node.cpus - n * cpus, node.gpus - n * gpus) for node, n in zip(free, taken, strict=True)]


def assign(gang: Gang, free: Sequence[Node], total: Sequence[Node]) -> dict[int, int] | None:
    """How many workers go to which machine, by its index, with the groups unbroken; None: the gang does not fit."""
    room_of = _rooms(gang, free, total)
    rooms = sorted(((room_of[node], index) for index, node in enumerate(free)), key=lambda room: (-room[0], room[1]))
    need, places = gang.workers, dict[int, int]()
    for position, (room, index) in enumerate(rooms):
        if room <= 0:
            return None
        if room >= need:  # the tightest machine that takes all that is left, else the roomiest: few, and few halves
            _, index = min((room, index) for room, index in rooms[position:] if room >= need)
            return places | {index: need}
        places[index] = room
        need -= room
    return None


def _rooms(gang: Gang, free: Iterable[Node], total: Iterable[Node]) -> dict[Node, int]:
    """Workers that fit on a machine with so much free, with the groups unbroken; of each size once, there are few."""
    group = gang.group if any(capacity(node, gang.each) >= gang.group for node in set(total)) else 1
    return {node: int(min(capacity(node, gang.each), _ENOUGH)) // group * group for node in set(free)}


def fold(lines: Iterable[str], refuse: Callable[[str], object] = lambda line: None) -> dict[str, Known]:
    """Jobs by id, from the queue's journal: a JSON object a line, later ones over earlier.

    Args:
        refuse: called with each line that is none of a job, or would make of one what it cannot be; it is skipped.
    """
    jobs: dict[str, Known] = {}
    for line in lines:
        try:
            entry = json.loads(line) if line.startswith('{"id": ') else {}
            known = jobs.get(entry["id"])
            job = known.changed(**entry) if known else Known.model_validate(entry)
        except (ValueError, TypeError, KeyError, RecursionError):  # cut by a crash, or none of a job
            refuse(line)
        else:
            jobs[job.id] = job
    return jobs


def gang_of(job: Job) -> Gang:
    """What a job needs to begin."""
    return Gang(job.workers, Share(job.cpus, job.gpus), job.group)
