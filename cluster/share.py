"""What each worker process gets of the machines there are: a pure function of their sizes and the config."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from configs import Config, ConfigError


class Node(NamedTuple):
    """One machine, with what is free to use on it."""

    cpus: float
    gpus: float


class Share(NamedTuple):
    """What each worker reserves."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads that a worker computes with on the CPU."""
        return max(1, int(self.cpus))


def share(config: Config, nodes: Sequence[Node]) -> Share:
    """Divide machines among `parallel.world_size` workers, as evenly as they go.

    Raises:
        ConfigError: there are more workers than the machines have room for.
    """
    world, cluster = config.parallel.world_size, config.cluster
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    if gpus and (room := _room(nodes, Share(0.0, gpus))) < world:
        raise ConfigError(
            f"parallel.* asks for {world} processes with {gpus:g} GPU each, and {_sizes(nodes)} have room for {room}:\n"
            f"lower parallel.dp, set cluster.gpus_per_worker, or join more machines with cluster.address"
        )
    if cluster.cpus_per_worker is not None:
        cpus = cluster.cpus_per_worker
        if cpus > 1 and cpus != int(cpus):
            raise ConfigError(f"cluster.cpus_per_worker={cpus:g}: above 1 it must be whole, such as {int(cpus)}")
        if (room := _room(nodes, Share(cpus, gpus))) < world:
            raise ConfigError(
                f"parallel.* asks for {world} processes with cluster.cpus_per_worker={cpus:g} each, and "
                f"{_sizes(nodes)} have room for {room}:\nlower one of them, or leave cluster.cpus_per_worker out"
            )
        return Share(cpus, gpus)
    # Whole CPUs where there are enough, else 1/2, 1/3, ... of one.
    whole = range(int(max((node.cpus for node in nodes), default=0)), 0, -1)
    for cpus in (*whole, *(math.floor(100 / part) / 100 for part in range(2, 101))):
        if _room(nodes, Share(cpus, gpus)) >= world:
            return Share(float(cpus), gpus)
    raise ConfigError(f"parallel.* asks for {world} processes, far too many for {_sizes(nodes)}: lower parallel.dp")


def _room(nodes: Sequence[Node], each: Share) -> int:
    """Workers that fit, where 0 of something reserves nothing."""

    def fit(there: float, needed: float) -> float:
        return math.floor(there / needed + 1e-9) if needed else math.inf

    return int(sum(min(fit(node.cpus, each.cpus), fit(node.gpus, each.gpus)) for node in nodes))


def _sizes(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    where = "this machine's" if len(nodes) == 1 else f"the cluster's {len(nodes)} machines'"
    return f"{where} {cpus:g} CPUs and {gpus:g} GPUs"
