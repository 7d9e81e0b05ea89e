"""A queue without Ray, and one Ray for all tests of this folder that need a live one."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from muster_cluster import Cluster, started

from cluster.server import dispatch
from cluster.server.waiting import refusals


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Makes queues on one folder; `messages` are those that the next tick finds."""
    messages: dict[bytes, bytes] = {}
    monkeypatch.setattr(dispatch, "_messages", lambda: list(messages.items()))
    monkeypatch.setattr(dispatch, "_delete", lambda name: messages.pop(name, None))
    monkeypatch.setattr(dispatch._Queue, "_ask_for_machines", lambda self, gangs: None)
    monkeypatch.setattr("cluster.gangs.ray_nodes.machines", list)

    def make(client=None):
        return dispatch._Queue(tmp_path, client)

    return SimpleNamespace(make=make, messages=messages, folder=tmp_path)


@pytest.fixture(scope="package")
def live(tmp_path_factory) -> Iterator[Cluster]:
    """A head whose jobs are lines of shell."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "user").mkdir()
    with started(folder, folder / "user", folder / "runs") as cluster:
        cluster.muster("jobs")  # starts the queue
        yield cluster


@dataclass
class LiveQueue:
    """Past the command line, which would not send what is hostile."""

    cluster: Cluster

    def send(self, content: bytes, name: str) -> None:
        path = self.cluster.user / "message.zip"
        path.write_bytes(content)
        with self.cluster.client() as client:
            client.jobs_api._upload_package(f"gcs://{dispatch.MESSAGES}{name}.zip", str(path), False, is_file=True)

    def ended(self, id: str) -> str:
        """How a job ended."""
        cluster = self.cluster
        cluster.wait(lambda: id in cluster.muster("jobs") and cluster.job(id)["state"] not in ("QUEUED", "RUNNING"))
        return str(cluster.job(id)["state"])

    def refused(self) -> dict[str, str]:
        with self.cluster.client() as client:
            return refusals(client._said())


@pytest.fixture
def live_queue(live) -> LiveQueue:
    return LiveQueue(live)
