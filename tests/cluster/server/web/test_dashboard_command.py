"""`muster dashboard` as a person starts it."""

import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from dashboards import write_run

HEAVY = ("torch", "ray", "pandas", "mlflow", "deepspeed")


def test_it_serves_until_it_is_asked_to_end(tmp_path):
    """Without the libraries that take hundreds of megabytes, and writes its token in no place but the link."""
    write_run(tmp_path / "runs" / "a")
    code = (
        "import atexit, os, sys\n"
        f"atexit.register(lambda: print('heavy', [name for name in {HEAVY} if name in sys.modules], flush=True))\n"
        "from cluster.cli import main; sys.argv[0] = 'muster'; main()"
    )
    command = [sys.executable, "-c", code, "dashboard", "--root", str(tmp_path / "runs"), "--port", "0"]
    environment = os.environ | {"MUSTER_DASHBOARD_TOKEN": str(tmp_path / "token")}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    link = process.stdout.readline().strip()
    found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/login#([0-9a-f]{64})", link)
    assert found, link
    url, token = found.groups()
    assert (tmp_path / "token").read_text() == token
    request = urllib.request.Request(f"{url}/api/runs", headers={"authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert b'"a"' in answer.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert err == ""
    assert "heavy []" in out
    assert token not in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--root", "nowhere"], "--root nowhere: there is no such folder"),
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
        (["--root", "nowhere"], "--root nowhere: there is no such folder"),
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
