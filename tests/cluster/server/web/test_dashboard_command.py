"""`muster dashboard` as a person starts it."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from dashboards import write_run

from cluster.server.web.index.kept_rows import KEPT
from trainer.record.lines import Record

HEAVY = ("torch", "ray", "pandas", "mlflow", "deepspeed")


class Started:
    """`muster dashboard` in a process of its own."""

    def __init__(self, root, files=None):
        code = (
            "import atexit, os, sys\n"
            f"atexit.register(lambda: print('heavy', [name for name in {HEAVY} if name in sys.modules], flush=True))\n"
            "from cluster.cli import main; sys.argv[0] = 'muster'; main()"
        )
        limit = "" if files is None else f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {files})\n"
        command = [sys.executable, "-c", limit + code, "dashboard", "--root", str(root), "--port", "0"]
        environment = os.environ | {"MUSTER_DASHBOARD_TOKEN": str(root.parent / "token")}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root.parent
        )
        assert self.process.stdout is not None
        link = self.process.stdout.readline().strip()
        found = re.fullmatch(r"http://(127\.0\.0\.1:(\d+))/login#([0-9a-f]{64})", link)
        assert found, link
        self.host, port, self.token = found.groups()
        self.port = int(port)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def get(self, path):
        request = urllib.request.Request(f"http://{self.host}{path}", headers={"authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def rows(self):
        """All runs by column, once none is left to read."""
        wait_for(lambda: not self.get("/api/runs")["left"])
        return self.get("/api/runs")["columns"]

    def listen(self):
        """The connection of a page that is told what changes."""
        page = socket.create_connection(("127.0.0.1", self.port), 120)
        asked = f"GET /api/changes HTTP/1.1\r\nhost: {self.host}\r\nauthorization: Bearer {self.token}\r\n\r\n"
        page.sendall(asked.encode())
        return page

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def end(self):
        """What it prints after the link, when it is asked to end."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=120)
        assert (self.process.returncode, err) == (0, "")
        return out


def test_it_serves_until_it_is_asked_to_end(tmp_path):
    """Without the libraries that take hundreds of megabytes, and writes its token in no place but the link."""
    write_run(tmp_path / "runs" / "a")
    with Started(tmp_path / "runs") as server:
        assert (tmp_path / "token").read_text() == server.token
        assert server.rows()["id"] == ["a"]
        with server.listen() as page:
            read_until(page, b"retry:")
            out = server.end()  # it neither waits for the page nor complains of it
    assert "heavy []" in out
    assert server.token not in out


def test_a_thousand_open_pages_cost_no_thread_each(tmp_path):
    """Nor a file each of the few that a process may open unless it asks for more; all are told what changes."""
    pages, before = 1000, resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4 * pages:
        pytest.skip(f"no process may have {4 * pages} open files here")
    run = write_run(tmp_path / "runs" / "a", status=None, of=1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))  # for this end of the connections
    try:
        with Started(tmp_path / "runs", (256, before[1])) as server, contextlib.ExitStack() as closed:
            server.rows()
            threads = server.threads()
            listening = []
            for _ in range(pages):
                listening.append(closed.enter_context(server.listen()))
            for page in listening:
                read_until(page, b"retry:")
            assert server.threads() <= threads + 3  # those of a few requests
            record = Record(run, 1)
            record.metrics({"step": 5, "loss": 3.0})
            record.close()
            for page in listening:
                read_until(page, b'{"runs": ["a"]}')
            assert server.threads() <= threads + 3
            assert server.rows()["step"] == [5]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def read_until(page, text):
    told = b""
    while text not in told:
        got = page.recv(65536)
        assert got, told
        told += got


@pytest.mark.slow
def test_a_server_that_is_killed_shows_the_same_rows_when_it_is_started_again(tmp_path):
    """Also where the file of its root in which it keeps rows is torn, or it was killed as it wrote that."""
    root = tmp_path / "runs"
    for number in range(12):
        write_run(root / f"run-{number}", lr=0.001 * number, status=("FINISHED", "FAILED", "STOPPED")[number % 3])
    write_run(root / "live", status=None, of=9)
    kept = root / KEPT

    def told(server):
        return server.rows(), server.get("/api/keys"), server.get("/api/columns?key=optim.lr")["columns"]

    with Started(root) as server:
        before = told(server)
        wait_for(kept.exists)
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    (root / f".{KEPT}.{server.process.pid}").write_bytes(whole[:100])
    with Started(root) as server:
        assert told(server) == before
        wait_for(lambda: len(kept.read_bytes()) == len(whole))  # it is written anew
    with Started(root) as server:
        assert told(server) == before
        assert server.end()


def wait_for(reached):
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--root", "nowhere"], "--root nowhere: no such folder"),
        (["--host", "no.such.host.invalid", "--root", "."], "--host no.such.host.invalid --port 8267"),
    ],
)
def test_mistakes(muster, arguments, told):
    code, out, err = muster("dashboard", *arguments)
    assert (code, out) == (2, "")
    assert told in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--address", "127.0.0.1"], "--address '127.0.0.1' is not HOST:PORT of a head, such as 127.0.0.1:6379"),
        (["--address", "http://127.0.0.1:8265"], "is not HOST:PORT of a head"),
        (["--root", "nowhere"], "--root nowhere: no such folder"),
        ([], "no token for the cluster at 127.0.0.1:6379"),
    ],
)
def test_mistakes_of_a_clusters_server(muster, tmp_path, monkeypatch, arguments, told):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = muster("cluster", "serve", *arguments)
    assert (code, out) == (2, "")
    assert told in err


def test_a_second_server_of_a_queue_does_not_start(muster, tmp_path, monkeypatch):
    from cluster.server.jobs.job_queue import locked

    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("MUSTER_QUEUE", str(tmp_path / "queue"))
    with locked(tmp_path / "queue"):
        code, _, err = muster("cluster", "serve", "--port", "0")
    assert code == 2
    assert f"another queue keeps its state in {tmp_path / 'queue'}: set MUSTER_QUEUE" in err
