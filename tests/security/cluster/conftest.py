"""A queue without Ray, and one Ray for all tests of this folder that need a live one."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from muster_cluster import Cluster, started
from queues import Queue

from cluster.gangs.ray_nodes import Machine
from cluster.gangs.share import Node
from cluster.server.jobs.ray_process import RayProcess


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Makes queues on one folder, of a cluster that has the given machines."""
    machines: list[Machine] = []
    monkeypatch.setattr("cluster.gangs.ray_nodes.machines", lambda: machines)
    monkeypatch.setattr(RayProcess, "ask", lambda self, gangs: None)
    monkeypatch.setattr(RayProcess, "_places", lambda self: [])
    room = Machine("a", "10.0.0.1", Node(8, 0), Node(8, 0), "one")

    def make(client=None):
        return Queue(tmp_path, client)

    return SimpleNamespace(make=make, folder=tmp_path, machines=machines, room=room)


@pytest.fixture(scope="package")
def live(tmp_path_factory) -> Iterator[Cluster]:
    """A head whose jobs are lines of shell."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "user").mkdir()
    with started(folder, folder / "user", folder / "runs") as cluster:
        yield cluster


@dataclass
class LiveQueue:
    """Past the command line, which would not send what is hostile."""

    cluster: Cluster

    def send(self, content: bytes) -> None:
        """Raises ConfigError with the reason for which it is refused."""
        path = self.cluster.user / "message.zip"
        path.write_bytes(content)
        with self.cluster.client() as client:
            client.submit(path)

    def ended(self, id: str) -> str:
        """How a job ended."""
        cluster = self.cluster
        cluster.wait(lambda: cluster.job(id)["state"] not in ("QUEUED", "RUNNING"))
        return str(cluster.job(id)["state"])


@pytest.fixture
def live_queue(live) -> LiveQueue:
    return LiveQueue(live)
