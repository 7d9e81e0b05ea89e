"""Real Ray nodes on this machine, started by `deploy/local-cluster`, and `muster` commands for them."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.record.lines import read_metrics, summary

ROOT = Path(__file__).parents[3]


def missing() -> str | None:
    """The reason why this machine cannot give each node a network of its own; None: it can."""
    if os.geteuid():
        return "network namespaces need root"
    return None if shutil.which("ip") else "network namespaces need iproute2"


class Process(NamedTuple):
    """One rank of a run's newest attempt."""

    node: int
    pid: int


class LocalCluster:
    """Context manager: nodes of two CPUs each while the block runs.

    Args:
        user: folder that `muster` is called in.
    """

    def __init__(self, count: int, user: Path, *options: str) -> None:
        self.user, self._up = user, ("up", str(count), "--cpus", "2", *options)
        self.folder = Path(tempfile.mkdtemp(prefix="mlc-", dir="/tmp"))  # Ray's sockets want a short path

    def __enter__(self) -> "LocalCluster":
        try:
            said = self.do(*self._up)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        [self.url] = re.findall(r"RAY_API_SERVER_ADDRESS=(\S+)", said)
        return self

    def __exit__(self, *_: object) -> None:
        self.do("down")

    def do(self, *arguments: str) -> str:
        """Run deploy/local-cluster."""
        command = [sys.executable, str(ROOT / "deploy" / "local-cluster"), "--folder", str(self.folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def muster(self, *arguments: str) -> str:
        """Run the command line on the host, whose network no node of the cluster shares."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"RAY_API_SERVER_ADDRESS": self.url, "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        command = [sys.executable, "-P", "-m", "cluster.cli", *arguments]
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, env=environment, cwd=self.user, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    @contextlib.contextmanager
    def hidden(self, number: int, folder: Path) -> Iterator[None]:
        """Make a running node see an empty folder instead of one of the machine's, as if a mount were missing."""
        network = self.url.split(".")[2]
        pids = subprocess.run(["ip", "netns", "pids", f"muster-{network}-{number}"], capture_output=True, text=True)
        inside = ["nsenter", f"--target={pids.stdout.split()[0]}", "--mount"]  # `ip netns exec` gave it its own mounts
        subprocess.run([*inside, "mount", "-t", "tmpfs", "none", folder], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "umount", "--lazy", folder], check=True)

    def submit(self, *arguments: str) -> str:
        """Returns the job's id."""
        return self.muster("submit", *arguments).splitlines()[0]

    def job(self, id: str) -> dict:
        return json.loads(self.muster("status", id, "--json"))

    def finish(self, id: str, run_dir: Path, patience_s: float = 600) -> None:
        """Wait until a job has ended, which it must as FINISHED."""
        begun = asked = time.monotonic()
        active = ("QUEUED", "RUNNING")
        # Reading the record is cheaper than asking the cluster, but a job that died silently is not in it.
        while summary(run_dir)["status"] != "FINISHED" and (now := time.monotonic()) < begun + patience_s:
            if now > asked + 20:
                asked = now
                if self.job(id)["state"] not in active:
                    break
            time.sleep(0.5)
        wait_for(lambda: self.job(id)["state"] not in active, 60)
        assert self.job(id)["state"] == "FINISHED", self.muster("logs", id)


def wait_for(reached: Callable[[], object], patience_s: float = 300) -> None:
    end = time.monotonic() + patience_s
    while not reached():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


def steps_of(run_dir: Path) -> tuple[int, int]:
    """(attempt, step) of the last recorded step; zeros before the first."""
    recorded = read_metrics(run_dir)
    return (recorded[-1]["attempt"], recorded[-1]["step"]) if recorded else (0, 0)


def ranks_of(run_dir: Path, attempt: int) -> dict[int, Process]:
    """Where the processes of an attempt run, from the first line of each one's output."""
    found = {}
    for path in (run_dir / "logs").glob(f"attempt-{attempt:02d}-rank-*.log"):
        if said := re.search(r"^\S+ \S+ node-(\d+) pid (\d+)$", path.read_text(errors="replace"), re.MULTILINE):
            found[int(path.stem[-4:])] = Process(int(said[1]), int(said[2]))
    return found
