"""A Ray that `muster cluster up` started on the loopback, and a user's folder that jobs are sent from."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cluster import cli
from cluster.server import client
from trainer.record.lines import read_metrics

ROOT = Path(__file__).parents[3]


@dataclass
class Cluster:
    """A Ray that `muster cluster up` started, and a user's folder."""

    url: str
    """Of its server."""
    ray_url: str
    """Of Ray's own dashboard and job API."""
    user: Path
    runs: Path
    token: Path
    head: subprocess.Popen
    folder: Path
    """`--temp-dir` of Ray."""
    printed: list[str] = field(default_factory=list)

    def muster(self, *arguments: str, code: int = 0) -> str:
        """Run the command line in this process. Returns what it printed."""
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            patch.setattr(sys, "argv", ["muster", *arguments])
            patch.setenv("RAY_API_SERVER_ADDRESS", self.url)
            patch.setenv("RAY_AUTH_TOKEN_PATH", os.environ.get("TEST_TOKEN", str(self.token)))
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.chdir(self.user)
            umask = os.umask(0)
            try:
                with pytest.raises(SystemExit) as end:
                    cli.main()
            finally:
                os.umask(umask)
        self.printed.append(out.getvalue())
        assert (end.value.code or 0) == code, out.getvalue()
        return out.getvalue()

    @contextlib.contextmanager
    def client(self) -> Iterator[client.Cluster]:
        """What the command line does with the cluster."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN_PATH", str(self.token))
            patch.setenv("RAY_AUTH_MODE", "token")
            yield client.Cluster(client.api_url(self.url))

    def submit(self, *arguments: str) -> str:
        return self.muster("submit", "run.yaml", *arguments).splitlines()[0]

    def job(self, id: str) -> dict:
        return json.loads(self.muster("status", id, "--json"))

    def wait(self, reached: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert self.head.poll() is None
            assert time.monotonic() < end, self.muster("jobs")
            time.sleep(0.3)

    def server_process(self) -> psutil.Process:
        """The cluster's server, which `up` starts again."""
        found = []
        for process in psutil.Process(self.head.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie among them
                if "serve" in process.cmdline():
                    found.append(process)
        [server] = found
        return server

    def reaches_ray(self) -> bool:
        """Whether its server answers, and reaches Ray."""
        try:
            return bool(self._machines()["reachable"])
        except OSError:
            return False

    def machines(self) -> list[dict]:
        """What the server tells of them."""
        return self._machines()["machines"]

    def _machines(self) -> dict:
        request = urllib.request.Request(f"{self.url}/api/machines")
        request.add_header("Authorization", f"Bearer {self.token.read_text()}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def steps(self, run: str) -> int:
        return len(read_metrics(self.runs / run))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(folder: Path, user: Path, runs: Path, gcs: int = 0) -> Iterator[Cluster]:
    """A head with three CPUs while the block runs.

    Args:
        folder: of its token, its queue and its log.
        gcs: port of the head; 0: one that is free.
    """
    port, server, token = free_port(), free_port(), folder / "token"
    temporary = tempfile.TemporaryDirectory(prefix="mj-", dir="/tmp")  # Ray's sockets want a short path
    options = (
        f"--port={gcs or free_port()} --dashboard-port={port} --dashboard-agent-listen-port={free_port()} --num-cpus=3 "
        f"--num-gpus=0 --ray-client-server-port={free_port()} --node-ip-address=127.0.0.1 --temp-dir={temporary.name} "
        f"--object-store-memory={100 * 2**20} --server-port={server}"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"RAY_AUTH_TOKEN_PATH": str(token), "MUSTER_QUEUE": str(folder / "queue"), "PYTHONPATH": str(ROOT)}
    log = (folder / "head.log").open("w")
    command = [sys.executable, "-P", "-m", "cluster.cli", "cluster", "up", *options.split()]
    head = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, umask=0)
    urls = f"http://127.0.0.1:{server}", f"http://127.0.0.1:{port}"
    found = Cluster(*urls, user, runs, token, head, Path(temporary.name))
    try:
        found.wait(found.reaches_ray, 120)
        yield found
    finally:
        # Not by SIGTERM: Ray then takes 20 s to drain the node.
        started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        for process in [head, *started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        psutil.wait_procs(started, timeout=10)
        log.close()
        temporary.cleanup()


def status(url: str, token: str | None = None) -> int | None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
