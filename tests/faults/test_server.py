"""Faults of a cluster's server and of its Ray: no job notices the one, and the server outlives the other."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from threading import Thread

import psutil
import pytest
from hostile_messages import submit, zipped
from muster_cluster import ROOT, Cluster, free_port, started

from cluster.server import client

pytestmark = pytest.mark.ray

KILLS = 3
TELLS = "echo $$ >>{pids}; echo begun; while [ ! -e {go} ]; do sleep 0.1; done; echo through; exit 0"


def send(cluster: Cluster, id: str, command: str, **changes) -> None:
    path = cluster.user / f"{id}.zip"
    path.write_bytes(zipped(submit(id, command="sh job.sh", cpus=0.1, **changes), {"work/job.sh": command.encode()}))
    client.Cluster(client.api_url(cluster.url)).submit(path)


def states(cluster: Cluster) -> dict[str, str]:
    return {job["id"]: job["state"] for job in json.loads(cluster.muster("jobs", "--json"))}


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "queue" / "journal.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of a cluster and of its user, whose environment names the token."""
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [5, 20])
def test_no_job_notices_that_the_server_was_killed(folder, jobs):
    """Again and again while jobs run and others come in: each is started once, and every answer was kept."""
    pids, go = folder / "pids", folder / "go"
    with started(folder, folder / "user", folder / "runs") as cluster:
        ids = [f"job-{number}" for number in range(jobs)]
        for id in ids:
            send(cluster, id, TELLS.format(pids=pids, go=go))
        cluster.wait(lambda: len(pids.read_text().split()) == jobs if pids.exists() else False, 600)
        begun = pids.read_text().split()
        accepted: list[str] = []

        def come_in() -> None:
            for number in range(4 * KILLS):
                send(cluster, f"job-late-{number}", "true")
                accepted.append(f"job-late-{number}")

        sending = Thread(target=come_in)
        sending.start()
        for kill in range(KILLS):
            cluster.wait(lambda kill=kill: len(accepted) > 2 * kill)
            server = cluster.server_process()
            server.kill()
            server.wait(30)
            cluster.wait(cluster.reaches_ray)
        sending.join(120)
        assert len(accepted) == 4 * KILLS
        assert {state for id, state in states(cluster).items() if id in ids} == {"RUNNING"}
        assert all(psutil.pid_exists(int(pid)) for pid in begun)
        followed: list[str] = []
        follow = Thread(target=lambda: followed.append(_follow(cluster, ids[0])))
        follow.start()
        cluster.server_process().kill()  # also under whoever follows
        go.touch()
        cluster.wait(lambda: set(states(cluster).values()) == {"FINISHED"})
        follow.join(120)
        assert "begun\n" in followed[0]
        assert followed[0].endswith("through\n")
        assert pids.read_text().split() == begun  # nobody was started twice
        assert list(states(cluster)) == [*ids, *accepted]
        told = journal(folder)
        for id in (*ids, *accepted):
            assert [entry["state"] for entry in told if entry["id"] == id][-1] == "FINISHED"


def _follow(cluster: Cluster, id: str) -> str:
    text, at, ended = "", 0, False
    server = client.Cluster(client.api_url(cluster.url))
    while not ended:
        piece = server.output(id, at, 5.0)
        text, at, ended = text + piece.text, piece.next, piece.ended
    return text


class Server:
    """`muster cluster serve` beside a head that somebody else has started."""

    def __init__(self, folder: Path, token: Path, gcs: int) -> None:
        self.port, self.token = free_port(), token
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT)}
        environment["MUSTER_QUEUE"] = str(folder / "other-queue")
        command = [sys.executable, "-P", "-m", "cluster.cli", "cluster", "serve", f"--address=127.0.0.1:{gcs}"]
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [*command, f"--port={self.port}"], env=environment, cwd=folder, stdout=self.log, stderr=self.log
        )

    def ask(self, path: str) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("Authorization", f"Bearer {self.token.read_text()}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def wait(self, reached, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if reached():
                    return
            except OSError:
                pass
            assert self.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.3)

    def state(self, id: str) -> str:
        return self.ask(f"/api/jobs/{id}")["state"]


@pytest.mark.slow
def test_a_server_outlives_its_ray_and_goes_on_with_the_next(folder):
    """What ran is lost with its head, what waits and what comes in meanwhile starts on the next one."""
    gcs, token = free_port(), folder / "token"
    server = None

    def hand_in(id: str, cpus: float) -> None:
        path = folder / f"{id}.zip"
        path.write_bytes(zipped(submit(id, command="sleep 600", cpus=cpus)))
        client.Cluster(client.api_url(f"http://127.0.0.1:{server.port}")).submit(path)

    try:
        with started(folder, folder / "user", folder / "runs", gcs):
            server = Server(folder, token, gcs)
            server.wait(lambda: server.ask("/api/machines")["reachable"])
            hand_in("job-runs", 3)
            server.wait(lambda: server.state("job-runs") == "RUNNING")
            hand_in("job-waits", 1)
            hand_in("job-cancelled", 1)
        server.wait(lambda: not server.ask("/api/machines")["reachable"])
        told = server.ask("/api/now")
        assert told["problems"][0]["what"] == "Ray does not answer"
        assert told["problems"][0]["why"]
        assert [job["id"] for job in told["waiting"]] == ["job-waits", "job-cancelled"]
        assert server.state("job-runs") == "RUNNING"  # nobody knows better
        hand_in("job-comes-in", 1)
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/api/jobs/job-cancelled/stop", b"{}", {"Content-Type": "application/json"}
        )
        request.add_header("Authorization", f"Bearer {token.read_text()}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["state"] == "CANCELLED"
        with started(folder, folder / "user", folder / "runs", gcs):
            server.wait(lambda: server.ask("/api/machines")["reachable"])
            assert server.state("job-runs") == "LOST"
            server.wait(lambda: server.state("job-waits") == server.state("job-comes-in") == "RUNNING")
            assert server.state("job-cancelled") == "CANCELLED"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    finally:
        if server is not None:
            server.process.kill()
            server.process.wait()
            server.log.close()
