"""Which of the waiting jobs may start now: pure functions of jobs and machines. Knows nothing of Ray."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .share import Node, Share, capacity

QUEUED, RUNNING, FINISHED, STOPPED, FAILED = "QUEUED", "RUNNING", "FINISHED", "STOPPED", "FAILED"
CANCELLED, LOST = "CANCELLED", "LOST"
"""Never started; the cluster that ran it is gone."""
ACTIVE = (QUEUED, RUNNING)


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
    chosen = []
    for job in sorted(waiting, key=lambda job: (-job.priority, job.since, job.id)):
        left = place(job.gang, free, total)
        if left is not None:
            chosen.append(job.id)
            free = left
        elif place(job.gang, total, total) is not None:
            break
    return chosen


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
    group = gang.group if any(capacity(node, gang.each) >= gang.group for node in total) else 1
    need, places = gang.workers, {}
    rooms = {index: int(capacity(node, gang.each)) // group * group for index, node in enumerate(free)}
    while need > 0:
        # The tightest machine that takes all that is left, else the roomiest: few machines, and few halves of one.
        fits = [index for index in rooms if rooms[index] >= need]
        index = min(fits, key=rooms.__getitem__) if fits else max(rooms, key=rooms.__getitem__, default=None)
        if index is None or (taken := min(need, rooms.pop(index))) == 0:
            return None
        places[index] = taken
        need -= taken
    return places


def fold(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Jobs by id, from the queue's journal: a JSON object a line, later ones over earlier; other lines are skipped."""
    jobs: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.startswith('{"id": '):
            try:
                entry = json.loads(line)
            except ValueError:  # cut by a crash
                continue
            jobs[entry["id"]] = jobs.get(entry["id"], {}) | entry
    return jobs


def gang_of(job: dict[str, Any]) -> Gang:
    """Of a job in the journal."""
    return Gang(job["workers"], Share(job["cpus"], job["gpus"]), job["group"])
