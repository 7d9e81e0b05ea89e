"""Queues without Ray, for what Ray might do wrong and for what must not wait for it."""

import json
from pathlib import Path
from typing import Any

from cluster.gangs.ray_private import JobApiError
from cluster.gangs.share import Node
from cluster.server.jobs.board import Board
from cluster.server.jobs.job_queue import JobQueue
from cluster.server.jobs.ray_link import Hello, result
from cluster.server.jobs.ray_process import RayProcess, reply
from cluster.server.jobs.scheduler import Scheduler
from cluster.server.messages import Known
from cluster.server.pack import read_message


class Client:
    """A job API that starts everything, and knows of no job afterwards."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []

    def submit_job(self, **job: Any) -> None:
        self.started.append(job)

    def get_job_info(self, id: str) -> Any:
        raise JobApiError(404, "no such job")

    def list_jobs(self) -> list[Any]:
        return []

    def stop_job(self, id: str) -> None:
        raise JobApiError(404, "no such job")


class DirectLink:
    """The server's line to Ray, with the process at its other end in this one, and a job API that a test makes up."""

    address = "127.0.0.1:6379"

    def __init__(self, client: Any) -> None:
        self.connected: Hello | None = None
        self.process = RayProcess.__new__(RayProcess)
        self.process.client = client

    def connect(self) -> Hello:
        self.connected = Hello(Path("/nowhere"), "http://127.0.0.1:8265")
        return self.connected

    def call(self, what: str, **arguments: Any) -> Any:
        asked = json.loads(json.dumps({"do": what} | arguments))
        return result(json.loads(json.dumps(reply(self.process, asked))))

    def close(self) -> None:
        self.connected = None


class Queue:
    """A queue with its scheduler, whose ticks are the test's."""

    def __init__(self, folder: Path, client: Any = None) -> None:
        self.queue = JobQueue(folder)
        self.scheduler = Scheduler(self.queue, DirectLink(client or Client()))
        self.board = Board(self.queue, self.scheduler)

    def send(self, content: bytes) -> Known:
        """As the server takes in a package."""
        import hashlib

        path = self.queue.upload()
        path.write_bytes(content)
        try:
            return self.queue.submit(read_message(content), path, hashlib.sha256(content).hexdigest())
        finally:
            path.unlink(missing_ok=True)

    def tick(self) -> None:
        self.scheduler.tick()

    @property
    def jobs(self) -> dict[str, Known]:
        return self.queue.jobs()


ROOM = Node(8, 0)
