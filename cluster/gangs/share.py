"""What each worker process gets of the machines: a pure function of their sizes and the config."""

import contextlib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from configs import Config, ConfigError, counted, with_workers, worker_counts

TO_WAIT = "wait for machines to join with --queue"
"""What a refusal suggests on a command line; a page has other words for it."""


class Node(NamedTuple):
    """CPUs and GPUs of one machine: those that are free, or all."""

    cpus: float
    gpus: float


class Share(NamedTuple):
    """What each worker reserves."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Compute threads of a worker on the CPU."""
        return max(1, int(self.cpus))


def group_of(config: Config) -> int:
    """Number of consecutive ranks that communicate most (tp, sp, ep): they share a machine where they fit."""
    parallel = config.parallel
    return math.lcm(parallel.tp * parallel.sp, parallel.ep)


def share(config: Config, nodes: Sequence[Node]) -> Share:
    """Divide machines among `parallel.world_size` workers, as evenly as possible.

    Raises:
        ConfigError: there are more workers than the machines have room for.
    """
    world, cluster = config.parallel.world_size, config.cluster
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    if gpus and (room := _room(nodes, Share(0.0, gpus))) < world:
        raise ConfigError(
            f"parallel.* asks for {counted(world, 'process')} with {gpus:g} GPU each, but {_sizes(nodes)} have "
            f"room for {room}:\n"
            f"lower parallel.dp, set cluster.gpus_per_worker, or use a larger cluster (cluster.address)"
        )
    if cluster.cpus_per_worker is not None:
        cpus = cluster.cpus_per_worker
        if cpus > 1 and cpus != int(cpus):
            raise ConfigError(
                f"cluster.cpus_per_worker={cpus:g}: above 1 it must be a whole number, such as {int(cpus)}"
            )
        if (room := _room(nodes, Share(cpus, gpus))) < world:
            raise ConfigError(
                f"parallel.* asks for {counted(world, 'process')} with cluster.cpus_per_worker={cpus:g} each, but "
                f"{_sizes(nodes)} have room for {room}:\nlower one of them, or unset cluster.cpus_per_worker"
            )
        return Share(cpus, gpus)
    # Whole CPUs where there are enough, else 1/2, 1/3, ... of one.
    whole = range(int(max((node.cpus for node in nodes), default=0)), 0, -1)
    for cpus in (*whole, *(math.floor(100 / part) / 100 for part in range(2, 101))):
        if _room(nodes, Share(cpus, gpus)) >= world:
            return Share(float(cpus), gpus)
    raise ConfigError(
        f"parallel.* asks for {counted(world, 'process')}, far too many for {_sizes(nodes)}: lower parallel.dp"
    )


def share_of_most(config: Config, divide: Callable[[Config], Share]) -> Share:
    """What each process gets with the largest number of processes that cluster.workers allows and that fits.

    Args:
        divide: the share for a fixed number of processes; raises ConfigError if they do not fit.
    """
    counts = worker_counts(config)

    def has_room(workers: int) -> bool:
        try:
            divide(with_workers(config, workers))
        except ConfigError:
            return False
        return True

    # If some number of processes fits, so does every smaller one.
    most = bisect_left(counts[:-1], True, key=has_room)
    return divide(with_workers(config, counts[most]))


def share_of_gang(config: Config, nodes: Sequence[Node], wait: bool) -> Share:
    """What each worker of a job reserves on a shared cluster: of the CPUs, those that go with its GPUs.

    Args:
        wait: more machines may join, so that a job too large for the present ones is accepted as it is.

    Raises:
        ConfigError: it asks for more than the cluster has.
    """
    cluster, world = config.cluster, config.parallel.world_size
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    asked = {"GPU": world * gpus, "CPU": world * (cluster.cpus_per_worker or 0)}
    has = {"GPU": [node.gpus for node in nodes if node.gpus], "CPU": [node.cpus for node in nodes if node.cpus]}
    try:
        for kind, count in asked.items():
            if count > sum(has[kind]):
                raise ConfigError(f"asks for {counted(count, kind)}; the cluster has {_like(has[kind])}")
        each = share(config, nodes)
    except ConfigError as error:
        if wait:
            return Share(cluster.cpus_per_worker or 1.0, gpus)
        raise ConfigError(f"{error}\nLower parallel.dp, or {TO_WAIT}") from None
    if each.gpus and cluster.cpus_per_worker is None:
        beside = min(node.cpus / node.gpus for node in nodes if node.gpus) * each.gpus
        return Share(min(each.cpus, max(1.0, float(int(beside)))), each.gpus)
    return each


def share_of_trial(config: Config, nodes: Sequence[Node], wait: bool = False) -> Share:
    """What each process of a sweep's trial reserves: as for a job, but a single CPU if there are no GPUs, since many
    small runs side by side get more done than one run on many CPUs.

    Args:
        wait: see `share_of_gang`.

    Raises:
        ConfigError: it asks for more than the cluster has.
    """
    cluster = config.cluster
    if cluster.cpus_per_worker is None and not any(node.gpus for node in nodes) and not cluster.gpus_per_worker:
        alone = config.model_copy(update={"cluster": cluster.model_copy(update={"cpus_per_worker": 1.0})})
        with contextlib.suppress(ConfigError):  # more processes than CPUs: fractions of one
            return share(alone, nodes)
    return share_of_gang(config, nodes, wait)


def _like(sizes: Sequence[float]) -> str:
    """8 (2 nodes x 4)"""
    groups = sorted(Counter(sizes).items(), reverse=True)
    nodes = [f"{counted(count, 'node')} x {size:g}" for size, count in groups]
    return f"{sum(sizes):g} ({', '.join(nodes) or 'no node'})"


def capacity(node: Node, each: Share) -> float:
    """Number of workers that fit on a machine; a share of 0 limits nothing."""

    def fit(there: float, needed: float) -> float:
        return math.floor(there / needed + 1e-9) if needed else math.inf

    return min(fit(node.cpus, each.cpus), fit(node.gpus, each.gpus))


def _room(nodes: Sequence[Node], each: Share) -> int:
    return int(sum(capacity(node, each) for node in nodes))


def _sizes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    where = "this machine's" if len(nodes) == 1 else f"the cluster's {len(nodes)} machines'"
    return f"{where} {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}"
