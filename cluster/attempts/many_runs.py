"""Trains many runs on one cluster, reusing warm gangs."""

import queue as queues
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster.gangs.gang import Gang
from cluster.gangs.ray_nodes import Machine, machines
from cluster.gangs.share import Node, Share
from cluster.server import waiting
from configs import ConfigError
from trainer.run.folder import is_finished
from trainer.run.stop import request_stop

from .failures import Final
from .supervise import Supervisor
from .tasks import Ended, Source, Task

TICK = 0.2
"""Seconds between checks for runs that have ended or may start."""


class Trials:
    """Trains each run to its end as soon as there is room; a gang that has finished one takes the next of its size.

    Gangs are created where the cluster has room, and released for one of another size or when no more runs will come.
    Runs start in order: none overtakes one that waits for room.

    Args:
        environment: environment variables of the training processes, given the share that each reserves.
        joined: whether the cluster was joined, so that machines may come and go.
        folder: the user's working directory.
        most: maximum number of processes at a time; None: as many as fit.
    """

    def __init__(
        self,
        source: Source,
        environment: Callable[[Share], dict[str, str]],
        joined: bool,
        folder: str,
        most: int | None = None,
    ) -> None:
        self._source, self._environment, self._joined, self._folder = source, environment, joined, folder
        self._most = most
        self._ended: queues.SimpleQueue[Ended | BaseException] = queues.SimpleQueue()
        self._slots: list[_Slot] = []
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[Ended]:
        """Train them all; yields each run as it ends."""
        head: Task | None = None
        try:
            while True:
                if self._stopped.is_set():
                    head = None
                elif head is None:
                    head = self._source.next()
                if head and self._begin(head):
                    head = None
                    continue
                last = self._stopped.is_set() or not (head or self._source.more())
                if last:
                    self._give_up(slot for slot in self._slots if not slot.run_dir)
                    if not self._slots and self._ended.empty():
                        return
                try:
                    ended = self._ended.get(timeout=TICK)
                except queues.Empty:
                    continue
                if isinstance(ended, BaseException):
                    raise ended
                yield ended
        except BaseException:  # otherwise the other runs would train on to their ends
            self.stop()
            raise
        finally:
            self._give_up(self._slots)

    def stop(self) -> None:
        """Have every run write a checkpoint and end, and start no more. Any thread may call it."""
        self._stopped.set()
        for run_dir in [slot.run_dir for slot in self._slots]:
            if run_dir:
                request_stop(run_dir)

    def _begin(self, task: Task) -> bool:
        idle = [slot for slot in self._slots if not slot.run_dir]
        slot = next((slot for slot in idle if slot.asked == task.gang), None)
        while slot is None:
            if self._has_room(task.gang):
                slot = _Slot(task.gang, self)
                self._slots.append(slot)
            elif idle:
                self._give_up([idle.pop()])
            else:
                return False
        if run_dir := task.make():
            slot.run_dir = run_dir
            slot.given.put(run_dir)
        return True

    def _has_room(self, gang: waiting.Gang) -> bool:
        held = sum(slot.asked.workers for slot in self._slots)
        if self._most is not None and held + gang.workers > self._most:
            return False
        there = machines()
        total = [machine.total for machine in there]
        free = [_less(machine, self._slots) for machine in there]
        for slot in self._slots:
            if not slot.gang.members:  # it has not reserved its share yet
                free = waiting.place(slot.asked, free, total) or [Node(0.0, 0.0)] * len(free)
        return waiting.assign(gang, free, total) is not None

    def _give_up(self, slots: "Iterator[_Slot] | Sequence[_Slot]") -> None:
        leaving = list(slots)
        for slot in leaving:
            slot.given.put(None)
        for slot in leaving:
            slot.thread.join()
            self._slots.remove(slot)


class _Slot:
    """A gang, and the thread that trains with it."""

    def __init__(self, asked: waiting.Gang, trials: Trials) -> None:
        self.asked = asked
        self.run_dir: Path | None = None
        """What it trains."""
        self.given: queues.SimpleQueue[Path | None] = queues.SimpleQueue()
        self.gang = Gang(asked.each, asked.group, trials._environment(asked.each))
        self._trials = trials
        self.thread = threading.Thread(target=self._serve, daemon=True, name="trials")
        self.thread.start()

    def _serve(self) -> None:
        trials = self._trials
        try:
            with self.gang:
                while run_dir := self.given.get():
                    ended = self._train(run_dir)
                    self.run_dir = None
                    trials._ended.put(ended)
        except BaseException as error:
            self.run_dir = None
            trials._ended.put(error)

    def _train(self, run_dir: Path) -> Ended:
        trials = self._trials
        try:
            if is_finished(run_dir):
                return Ended(run_dir, "FINISHED")
            if trials._stopped.is_set():
                return Ended(run_dir, "STOPPED")
            return Ended(run_dir, Supervisor(run_dir, self.gang, trials._joined, trials._folder).run())
        except ConfigError as error:
            return Ended(run_dir, "FAILED", str(error), "mistake")
        except Final as error:
            return Ended(run_dir, "FAILED", error.reason, error.kind)


def _less(machine: Machine, slots: Sequence["_Slot"]) -> Node:
    """What is free on a machine. Ray reports this with a delay, so it is capped by what these slots do not hold."""
    held = [slot.asked.each for slot in slots for member in slot.gang.members if member.node == machine.id]
    cpus, gpus = sum(each.cpus for each in held), sum(each.gpus for each in held)
    return Node(min(machine.free.cpus, machine.total.cpus - cpus), min(machine.free.gpus, machine.total.gpus - gpus))
