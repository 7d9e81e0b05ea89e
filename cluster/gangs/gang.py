"""A gang of workers on a Ray cluster: reserved all or nothing, kept across the attempts of a run."""

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.attempts.failures import Failure, Final
from cluster.server import waiting
from configs.reading.parse import clip
from trainer.processes.protocol import Done, Failed, Fault, Order, Outcome

from .ray_nodes import machines
from .share import Node, Share
from .worker import Facts, Worker

RESERVED, STARTED, ENDED = 20.0, 120.0, 15.0
"""Seconds that a placement group, new workers, and the end of an attempt's processes may take."""
EXPLAINED = 5.0
"""Grace period, in seconds, to find the root cause: a connection may close before a process is seen dead."""
ANSWERED = 10.0
"""Seconds after which a worker that does not answer counts as unreachable."""
TICK = 1.0


class Member(NamedTuple):
    """A worker, the bundle of the placement group that it is in, and its machine."""

    actor: Any
    bundle: int
    node: str
    interface: str | None
    gpus: tuple[str, ...]


class Gang:
    """Workers with equal shares, in rank order; the ranks on one machine are consecutive.

    They hold a placement group with one bundle per machine. When a machine is lost, the other workers stay warm; Ray
    moves its bundle to where there is room, and `gather` starts the missing workers there.

    Args:
        each: what a worker reserves.
        group: number of consecutive ranks to keep on one machine wherever they fit.
        environment: environment variables of the training processes.
    """

    def __init__(self, each: Share, group: int, environment: dict[str, str]) -> None:
        self.each, self.group, self.environment = each, group, environment
        self.members: list[Member] = []
        self._reserved: Any = None
        self._counts: list[int] = []
        """Workers that each bundle has room for."""

    def __enter__(self) -> "Gang":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dissolve()

    def gather(self, workers: int, avoid: Collection[str] = ()) -> bool:
        """Bring the gang to this many workers. Those that answer are kept if the missing ones can join them.

        Args:
            avoid: ids of machines that must not be used.

        Returns:
            False: there is no room for all of them now. The present ones are kept, unless the room was lost while the
            gang was being moved.
        """
        avoid = {*avoid, *self.unreached()}
        self.members = [member for member in self.members if member.node not in avoid]
        with contextlib.suppress(ray.exceptions.RayError):
            if sum(self._counts) == workers and self._whole(avoid) and self._fill():
                return True
            if len(self.members) == workers:
                return True
            if counts := self.room_for(workers, avoid):
                self.dissolve()
                return self._reserve(counts, avoid) and self._fill()
        return False

    def room_for(self, workers: int, avoid: Collection[str]) -> list[int] | None:
        """Workers per machine if the gang first released what it holds; None: there is no room."""
        held, nothing = self.held(), Node(0.0, 0.0)
        there = [machine for machine in machines() if machine.id not in avoid]
        free = [Node(*(a + b for a, b in zip(m.free, held.get(m.id, nothing), strict=True))) for m in there]
        asked = waiting.Gang(workers, self.each, self.group)
        places = waiting.assign(asked, free, [machine.total for machine in there])
        return None if places is None else list(places.values())

    def _reserve(self, counts: list[int], avoid: Collection[str]) -> bool:
        others = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        bundles = [self._resources(count) for count in counts]
        self._counts = counts
        self._reserved = placement_group(bundles, bundle_label_selector=[others] * len(counts) if avoid else None)
        if self._reserved.wait(RESERVED):
            return True
        self.dissolve()
        return False

    def _resources(self, workers: int) -> dict[str, float]:
        needs = {"CPU": self.each.cpus * workers, "GPU": self.each.gpus * workers}
        return {kind: round(count, 4) for kind, count in needs.items() if count}

    def _nodes(self) -> dict[int, str]:
        """The machine of each bundle that has one."""
        if self._reserved is None:
            return {}
        table = placement_group_table(self._reserved)
        return {int(index): node for index, node in table["bundles_to_node_id"].items() if node}

    def _whole(self, avoid: Collection[str]) -> bool:
        """Whether every bundle is on a live machine that may be used."""
        nodes, alive = self._nodes(), {machine.id for machine in machines()}
        return len(nodes) == len(self._counts) and set(nodes.values()) <= alive - set(avoid)

    def _fill(self) -> bool:
        """Start the workers that are missing. Raises RayError if a machine does not answer."""
        there = Counter(member.bundle for member in self.members)
        bundles = [i for i, count in enumerate(self._counts) for _ in range(count - there[i])]
        kind: Any = ray.remote(Worker)
        actors = [
            kind.options(
                num_cpus=self.each.cpus,
                num_gpus=self.each.gpus,
                max_concurrency=4,  # to end an attempt and start the next beside one that hangs
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._reserved, index),
            ).remote(self.environment)
            for index in bundles
        ]
        facts = ray.get([actor.facts.remote() for actor in actors], timeout=STARTED)
        self.members += [
            Member(actor, index, fact.node, fact.interface, fact.gpus)
            for actor, index, fact in zip(actors, bundles, facts, strict=True)
        ]
        order = list(dict.fromkeys(member.node for member in self.members))
        self.members.sort(key=lambda member: (order.index(member.node), [gpu.rjust(4) for gpu in member.gpus]))
        return True

    def dissolve(self) -> None:
        """Release all workers, and wait until the cluster reports what they held as free."""
        if self._reserved is None:
            return
        held, before = self.held(), {machine.id: machine.free for machine in machines()}
        for member in self.members:
            ray.kill(member.actor)
        remove_placement_group(self._reserved)
        self.members, self._reserved, self._counts = [], None, []
        until = time.monotonic() + ANSWERED
        while time.monotonic() < until:
            free = {machine.id: sum(machine.free) for machine in machines()}
            if all(free.get(id, 1e9) >= sum(before[id]) + sum(held[id]) - 1e-3 for id in held.keys() & before.keys()):
                break
            time.sleep(0.05)

    def held(self) -> dict[str, Node]:
        """What the gang holds of each machine, by its id."""
        found: dict[str, Node] = {}
        for index, id in self._nodes().items():
            cpus, gpus = (part * self._counts[index] for part in self.each)
            there = found.get(id, Node(0.0, 0.0))
            found[id] = Node(there.cpus + cpus, there.gpus + gpus)
        return found

    def unreached(self) -> set[str]:
        """Drop workers that do not answer. Returns the machines that Ray cannot reach but has not declared dead."""
        asked = {member.actor.facts.remote(): member for member in self.members}
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWERED) if asked else ([], [])
        lost = {asked[ref]: True for ref in late}
        for ref in ready:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                lost[asked[ref]] = isinstance(error, ray.exceptions.ActorUnavailableError)
        self.members = [member for member in self.members if member not in lost]
        return {member.node for member, unreached in lost.items() if unreached}

    def attempt(
        self, run_dir: Path, folder: str, patience: float, meanwhile: Callable[[], None]
    ) -> tuple[list[str], list[Failure]]:
        """Train once with all workers.

        Args:
            folder: the user's working directory.
            patience: seconds that rank 0 waits for another process to release the run.
            meanwhile: called about every second.

        Returns:
            What `trainer.loop.train` returned in the workers that did not fail, and the failures of the others. All
            processes have ended by then, except those that could not be reached.

        Raises:
            Final: a worker found a mistake of the user's, or stopped for good.
        """
        try:
            orders = self._orders(run_dir, folder, patience)
        except ray.exceptions.RayError as error:
            return [], [Failure(0, f"the worker or its machine is gone: {clip(error, 400)}", str(error), lost=True)]
        running = {member.actor.train.remote(order): rank for rank, member, order in orders}
        ends: list[str] = []
        failures: list[Failure] = []
        until = float("inf")
        try:
            while running and time.monotonic() < until and not any(not failure.collateral for failure in failures):
                ready, _ = ray.wait(list(running), timeout=TICK)
                for ref in ready:
                    rank = running.pop(ref)
                    end = _outcome(ref)
                    if isinstance(end, Done):
                        ends.append(end.status)
                    elif end.kind == "mistake" or end.kind == "stopped":
                        raise Final(end.kind, end.reason)
                    else:
                        failures.append(_failure(rank, end))
                if failures:
                    until = min(until, time.monotonic() + EXPLAINED)
                meanwhile()
        finally:
            failures += self._end(running)
            with contextlib.suppress(ray.exceptions.RayError):  # its machine is gone
                ray.get(self.members[0].actor.close_store.remote(), timeout=ANSWERED)
        return ends, failures

    def _orders(self, run_dir: Path, folder: str, patience: float) -> list[tuple[int, Member, Order]]:
        """The order for each rank: torchrun's environment variables, and the run."""
        nodes = list(dict.fromkeys(member.node for member in self.members))
        first: Facts = ray.get(self.members[0].actor.facts.remote())
        store: str | None = ray.get(self.members[0].actor.open_store.remote()) if len(nodes) == 1 else None
        world, secret = len(self.members), secrets.token_hex(32)
        orders = []
        for rank, member in enumerate(self.members):
            beside = [other for other in self.members if other.node == member.node]
            variables: dict[str, Any] = {
                "RANK": rank,
                "LOCAL_RANK": beside.index(member),
                "GROUP_RANK": nodes.index(member.node),
            }
            variables |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": len(beside)}
            variables |= {"MASTER_ADDR": first.address, "MASTER_PORT": first.port}
            if member.gpus:  # those of all its workers; LOCAL_RANK selects one, as under torchrun
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in beside for gpu in other.gpus)
            if len(nodes) > 1 and member.interface:  # otherwise gloo takes the one that the host name resolves to
                variables["GLOO_SOCKET_IFNAME"] = member.interface
            environment = {key: str(value) for key, value in variables.items()}
            order = Order(
                run_dir=str(run_dir), folder=folder, environment=environment, patience=patience,
                secret=secret, store=store,
            )  # fmt: skip
            orders.append((rank, member, order))
        return orders

    def _end(self, running: dict[Any, int]) -> list[Failure]:
        """End the workers that still run. Returns the failures of those that had failed by themselves."""
        for rank in running.values():
            self.members[rank].actor.end.remote()
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=ENDED) if running else ([], [])
        ends = [(running[ref], _outcome(ref)) for ref in ready]
        return [_failure(rank, end) for rank, end in ends if isinstance(end, Failed) and not end.ended]


def _outcome(ref: Any) -> Outcome:
    """How one process ended."""
    try:
        found: Outcome = ray.get(ref)
        return found
    except ray.exceptions.RayActorError as error:
        reason = f"the worker or its machine is gone: {clip(error, 400)}"
        return Failed(kind="lost", reason=reason, traceback=str(error))
    except ray.exceptions.RayError as error:
        reason = f"{type(error).__name__}: {clip(error, 400)}"
        kind: Fault = "memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else "error"
        return Failed(kind=kind, reason=reason, traceback=str(error))


def _failure(rank: int, end: Failed) -> Failure:
    broken = tuple(end.ranks) if end.kind == "broken" else None
    fault: Fault = end.kind if end.kind == "memory" or end.kind == "connection" else "error"
    return Failure(rank, end.reason, end.traceback, end.kind == "lost", fault, broken)
