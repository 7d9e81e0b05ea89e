"""The machines of the Ray cluster that this process is connected to: what is free, what is about to leave."""

from typing import NamedTuple

import ray

from . import ray_private
from .share import Node


class Machine(NamedTuple):
    """A live machine; `id` is its node id in Ray."""

    id: str
    address: str
    free: Node
    total: Node
    name: str = ""
    """Of its host."""


def machines() -> list[Machine]:
    free_of = ray_private.free_resources()
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] in free_of:
            free, total = (
                Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
                for resources in (free_of[node["NodeID"]], node["Resources"])
            )
            host = node.get("NodeManagerHostname", "")
            found.append(Machine(node["NodeID"], node["NodeManagerAddress"], free, total, host))
    return found


def draining() -> dict[str, int]:
    """Machines that are about to leave (a reclaimed spot instance, an autoscaler that scales down): id to the Unix time
    in ms of the deadline; 0: unknown."""
    return ray_private.draining_nodes()
