"""The server's end of the connection to `ray_process`, which is started on demand and replaced when it is gone."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from cluster.gangs.session import check_reachable
from configs.reading.parse import clip

CONNECTING = 120.0
"""Seconds that the process may take to import Ray and connect, on a busy machine."""
ANSWERING = 120.0
"""Seconds that it may take for a request."""


class Unreachable(Exception):
    """Ray does not answer, or the process is gone. Whether the request was executed is unknown."""


class Failed(Exception):
    """Ray refused the request."""


def result(said: dict[str, Any]) -> Any:
    """The result in an answer of the process. Raises Unreachable or Failed."""
    if "away" in said:
        raise Unreachable(str(said["away"]))
    if "error" in said:
        raise Failed(str(said["error"]))
    return said["ok"]


class Hello(NamedTuple):
    """What a new connection reports."""

    logs: Path
    """Folder of the drivers' output."""
    dashboard: str
    """URL of Ray's own dashboard."""


class RayLink:
    """A connection to the Ray head at host:port. Not thread-safe.

    Attributes:
        connected: what the connection reported; None if there is none.
    """

    def __init__(self, address: str, here: Path) -> None:
        self.address, self._here = address, here
        self.connected: Hello | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def connect(self) -> Hello:
        """Start the process. Raises Unreachable."""
        try:
            check_reachable(self.address)
        except (OSError, ValueError) as error:
            raise Unreachable(clip(error)) from None
        command = [sys.executable, "-P", "-m", "cluster.server.jobs.ray_process", self.address, str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self._here, bufsize=0
        )
        self._rest = b""
        said = self._answer(CONNECTING)
        self.connected = Hello(Path(said["logs"]), said["dashboard"])
        return self.connected

    def call(self, what: str, **arguments: Any) -> Any:
        """Execute a request. Raises Unreachable or Failed."""
        if self._process is None or self._process.stdin is None:
            raise Unreachable("not connected")
        try:
            self._process.stdin.write(json.dumps({"do": what} | arguments).encode() + b"\n")
        except OSError as error:
            raise self._lost(error.strerror or "") from None
        return self._answer(ANSWERING)

    def _answer(self, patience: float) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        read, until = [self._rest], time.monotonic() + patience
        while b"\n" not in read[-1]:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise self._lost(f"no answer in {patience:.0f} s")
            if not (more := os.read(self._process.stdout.fileno(), 1 << 20)):
                raise self._lost("its process here has ended")
            read.append(more)
        line, _, self._rest = b"".join(read).partition(b"\n")
        try:
            return result(json.loads(line))
        except Unreachable:
            self.close()
            raise

    def _lost(self, why: str) -> Unreachable:
        self.close()
        return Unreachable(clip(why))

    def close(self) -> None:
        """End the process."""
        self.connected = None
        if self._process is None:
            return
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._process = None
