"""A run whose tracker answers 500, does not answer or is gone trains as if untracked, and is complete in it later."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import wait_at_gates
from ranks import free_port
from support import tiny, train_in_process
from tracker import assert_all_shown, faulty_server, shown

from trainer.record.lines import read_metrics
from trainer.run.folder import prepare_run
from trainer.tracking import read_state, shipper
from trainer.tracking.shipper import ship

STEPS = 40


@pytest.fixture
def make(tmp_path, tiny_data, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(shipper, "PATIENCE", 100.0)

    def make(name, **tracking):
        train = {"steps": STEPS, "eval_every": 20}
        run = {"name": name, "root": str(tmp_path)}
        sections = {"run": run, "data": {"path": str(tiny_data)}, "train": train, "checkpoint": {"every": 10}}
        return prepare_run(
            tiny(**sections, tracking={"enabled": True, "interval": 0.1, "export_model": False} | tracking)
        )

    return make


@pytest.fixture
def gates(tmp_path):
    folder = tmp_path / "gates"
    folder.mkdir()
    return folder


def losses(run_dir):
    return [(record["step"], record.get("loss"), record.get("eval_loss")) for record in read_metrics(run_dir)]


def wait_for_step(run_dir, step):
    wait_for(lambda: any(record["step"] >= step for record in read_metrics(run_dir)))


def wait_for_giving_up(run_dir):
    """Training may end before its shipper, which starts slowly on a busy machine."""
    wait_for(lambda: "and the end of the run are not sent to" in str(read_state(run_dir).get("error")))


def wait_for(condition, seconds=100.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_broken_server_delays_no_step_and_misses_none(tmp_path, make, gates):
    """Healthy; then 500; then a request is held while ten steps are taken; then nobody listens, the training process is
    killed, and its second attempt ends before the server is back."""
    clean = make("clean", enabled=False)
    assert train_in_process(clean) == 0
    with faulty_server(tmp_path) as server, ThreadPoolExecutor(1) as pool:
        run_dir = make("run", uri=server.uri)
        refused, held, answered, release = [], [], [], threading.Event()

        def refuse(path):
            refused.append(path)
            return "before"

        def hold(path):
            held.append(path)
            release.wait(100)
            answered.append(path)
            return "after"

        first = pool.submit(train_in_process, run_dir, wait_at_gates, gates, (11, 21, 31), 1.0, 35)
        wait_for(lambda: read_state(run_dir).get("offset"))
        server.fault = refuse
        (gates / "11").touch()
        wait_for_step(run_dir, 20)
        wait_for(lambda: refused)
        wait_for(lambda: str(read_state(run_dir)["error"]).startswith(f"cannot send to {server.uri}: "))
        server.fault = hold
        wait_for(lambda: held)
        (gates / "21").touch()
        wait_for_step(run_dir, 30)
        assert answered == [], "ten steps were taken while the tracker had not answered"
        server.down()
        release.set()
        (gates / "31").touch()
        assert first.result() == -signal.SIGKILL

        assert train_in_process(run_dir, wait_at_gates, gates, (), 1.0) == 0
        assert losses(run_dir) == losses(clean)
        wait_for_giving_up(run_dir)
        before, points = shown(tmp_path, run_dir)
        assert 1 <= len(points) < STEPS

        server.fault = lambda path: None
        server.up()
        done = ship(run_dir)
        assert (done.records, done.missing) == (STEPS + 2 - len(points), None)
    run = assert_all_shown(tmp_path, run_dir)
    assert run.info.run_id == before.info.run_id
    assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", "2")


@pytest.mark.slow
def test_a_server_process_that_is_killed_and_started_again(tmp_path, make, gates):
    """MLflow's own server process, which takes most of a minute to start; the run ends while it is gone."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination"]
    command += [str(tmp_path / "served")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def start():
        with (tmp_path / "server.log").open("ab") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), 120)
        return server

    server = start()
    try:
        run_dir = make("run", uri=f"http://127.0.0.1:{port}")
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(train_in_process, run_dir, wait_at_gates, gates, (11,), 1.0)
            wait_for(lambda: read_state(run_dir).get("offset"))
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            (gates / "11").touch()
            assert ended.result() == 0
        wait_for_giving_up(run_dir)
        before, points = shown(tmp_path, run_dir)
        assert 1 <= len(points) < STEPS
        server = start()
        assert ship(run_dir).missing is None
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    run = assert_all_shown(tmp_path, run_dir)
    assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
