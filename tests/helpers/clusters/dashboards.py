"""Dashboards that tests ask: a server in a thread of this process, and records of runs as training writes them."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from cluster.server.jobs.board import Board
from cluster.server.web.app import create_app
from trainer.record.lines import Record

TOKEN = "0123456789abcdef" * 4


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Dashboard:
    """A server that listens, and what it answers."""

    def __init__(self, app: Any, port: int) -> None:
        self.app, self.port = app, port
        self.host = f"127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> Answer:
        """Send what is given and no more; `_` in a header's name is `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            given = {"host": self.host} | {key.replace("_", "-"): value for key, value in headers.items()}
            if body is not None:
                given.setdefault("content-length", str(len(body)))
            for key, value in given.items():
                if value is not None:
                    connection.putheader(key, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str | None) -> Answer:
        """With the token."""
        return self.ask("GET", path, authorization=f"Bearer {TOKEN}", **headers)

    def post(self, path: str, body: Any, **headers: str | None) -> Answer:
        """JSON, with the token."""
        given = {"authorization": f"Bearer {TOKEN}", "content_type": "application/json"} | headers
        return self.ask("POST", path, json.dumps(body).encode(), **given)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Each run's row by its id, as the server sees them now."""
        self.look()
        columns = self.get("/api/runs").json["columns"]
        each = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {row["id"]: row for row in each}

    def look(self) -> None:
        """Let the server look at its roots now, at every run."""
        index = self.app.state.index
        for root in index._roots:
            root.listed = root.listed and time.monotonic() - 1000.0
        for _ in range(20):
            self.app.state.changes.tell_soon(index.look(patience=60.0))


@contextlib.contextmanager
def serving(roots: Sequence[Path], hosts: Sequence[str] = (), board: Board | None = None) -> Iterator[Dashboard]:
    """A server of these roots, and of a queue, while the block runs."""
    app = create_app(roots, TOKEN, hosts, board)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Dashboard(app, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


CONFIG = """\
run:
  name: {name}
  seed: 0
model:
  family: decoder
  hidden_size: 32
train:
  steps: {steps}
optim:
  lr: {lr}
data:
  path: /data/tokens
"""


def write_run(
    run_dir: Path, steps: int = 4, *, of: int = 4, status: str | None = "FINISHED", lr: float = 0.001, **more: Any
) -> Path:
    """The folder of a run that has trained so many steps of `of`.

    Args:
        status: None: it is being trained, by this process.
        more: numbers or lists of each step's record; a function is called with the step.
    """
    record = Record(run_dir, 1)
    (run_dir / "config.yaml").write_text(CONFIG.format(name=json.dumps(run_dir.name), steps=of, lr=lr))
    record.event("resolved", derived=[], command="muster train tiny")
    record.event("attempt_started", world_size=1, device="cpu")
    for step in range(1, steps + 1):
        told = {key: value(step) if callable(value) else value for key, value in more.items()}
        record.metrics(
            {"step": step, "loss": 1.0 / step, "tokens": 8 * step, "tokens_per_second": 100.0, "step_time": 0.5,
             "data_wait": 0.0} | told
        )  # fmt: skip
    if steps:
        record.metrics({"step": steps, "eval_loss": 2.0})
        record.event("evaluation", step=steps, eval_loss=2.0, eval_weight=8, seconds=0.1)
    if status:
        record.event("attempt_ended", status=status, reason=f"why {run_dir.name} ended", step=steps)
    record.close()
    return run_dir


def write_stacks(run_dir: Path, rank: int, frames: Sequence[tuple[str, int, str]]) -> None:
    """Where a rank stood, as its watchdog saves it; each frame is a file below /a, a line and a function."""
    (run_dir / "stacks").mkdir(exist_ok=True)
    head = {"rank": rank, "host": f"host-{rank}", "step": 4, "phase": "step", "thread": "0x0000000000000001"}
    stack = [f'  File "/a/{file}", line {line} in {name}' for file, line, name in frames]
    text = "\n".join([json.dumps(head), "Thread 0x0000000000000001 (most recent call first):", *stack, ""])
    (run_dir / "stacks" / f"attempt-01-rank-{rank:04d}.txt").write_text(text)
