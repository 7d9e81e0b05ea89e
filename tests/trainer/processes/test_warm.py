"""A warm process forks attempts that train as any other process does, and says how each ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support import tiny, train_in_process

from cluster.gangs.worker import ENVIRONMENT
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.manifest import folder as checkpoint
from trainer.processes.protocol import Began, Done, Failed, Order, Outcome, read_outcome
from trainer.processes.warm import _forks_may_use_gpus
from trainer.record.lines import read_metrics
from trainer.run.folder import prepare_run

OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

FAILS = """
import torch

def fail(*_):
    raise RuntimeError("no kernel for this")

torch.nn.modules.module.register_module_forward_hook(fail)
"""


class Warm:
    """A warm process and its two pipes."""

    def __init__(self, environment: dict[str, str]) -> None:
        kept = {key: value for key, value in os.environ.items() if key not in OF_A_GROUP}
        command, pipe = [sys.executable, "-P", "-m", "trainer.processes.warm"], subprocess.PIPE
        self.process = subprocess.Popen(command, env=kept | environment, text=True, stdin=pipe, stdout=pipe)

    def start(self, run_dir: Path) -> int:
        """Returns the process's id."""
        order = Order(run_dir=str(run_dir), folder="/", environment={"RANK": "0"}, patience=0.0)
        self.process.stdin.write(order.model_dump_json() + "\n")
        self.process.stdin.flush()
        return Began.model_validate_json(self.process.stdout.readline()).pid

    def outcome(self) -> Outcome:
        return read_outcome(self.process.stdout.readline())


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    found = Warm(ENVIRONMENT)
    yield found
    found.process.stdin.close()
    assert found.process.wait(30) == 0


@pytest.fixture
def run(tmp_path, tiny_data):
    def prepare(name: str, **train) -> Path:
        train = {"steps": 4} | train
        return prepare_run(tiny(run={"name": name, "root": str(tmp_path)}, data={"path": str(tiny_data)}, train=train))

    return prepare


def result(run_dir: Path) -> tuple:
    manifest = json.loads((checkpoint(run_dir, 4) / MANIFEST).read_text())
    return [m["loss"] for m in read_metrics(run_dir) if "loss" in m], manifest["files"]


def wait_for_steps(run_dir: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(read_metrics(run_dir)) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_attempts_equal_those_of_separate_processes(warm, run):
    own = run("own")
    assert train_in_process(own) == 0
    for name in ("first", "second"):
        one = run(name)
        warm.start(one)
        assert warm.outcome() == Done(status="FINISHED")
        assert result(one) == result(own)


def test_it_says_how_an_attempt_ended(warm, run, tmp_path):
    (tmp_path / "nothing").mkdir()
    warm.start(tmp_path / "nothing")
    mistake = warm.outcome()
    assert mistake.kind == "mistake"
    assert "is not a run" in mistake.reason

    bad = run("bad")
    config = bad / "config.yaml"
    config.write_text(config.read_text().replace("plugins: []", f"plugins: [{tmp_path / 'fault.py'}]"))
    (tmp_path / "fault.py").write_text("import os; os.abort()")
    warm.start(bad)
    assert warm.outcome() == Failed(kind="lost", reason="the process is gone (signal SIGABRT)")
    (tmp_path / "fault.py").write_text(FAILS)
    warm.start(bad)
    error = warm.outcome()
    assert (error.kind, error.reason) == ("error", "RuntimeError: no kernel for this")
    assert "in train" in error.traceback

    long = run("long", steps=100000)
    pid = warm.start(long)
    wait_for_steps(long, 2)
    os.kill(pid, signal.SIGTERM)
    assert warm.outcome() == Done(status="STOPPED")
    pid = warm.start(long)
    os.kill(pid, signal.SIGKILL)
    assert warm.outcome() == Failed(kind="lost", reason="the process is gone (signal SIGKILL)")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "killed"])
def test_nothing_outlives_it(run, how):
    found = Warm(ENVIRONMENT)
    long = run("long", steps=100000)
    attempt = psutil.Process(found.start(long))
    wait_for_steps(long, 1)
    if how == "closed":
        found.process.stdin.close()
    else:
        found.process.kill()
    found.process.wait(30)
    psutil.wait_procs([attempt], timeout=10)
    assert not attempt.is_running() or attempt.status() == psutil.STATUS_ZOMBIE


STARTS_NO_CUDA = """
import torch
def start(*_): raise AssertionError("CUDA was started")
torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = start
import trainer.loop, deepspeed
assert deepspeed.accelerator.get_accelerator().device_name() == "cuda"
"""


@pytest.mark.slow
def test_imports_start_no_cuda():
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    subprocess.run([sys.executable, "-c", STARTS_NO_CUDA], env=environment, check=True)


@pytest.mark.slow
def test_imports_leave_one_thread_however_many_an_attempt_may_have():
    check = "from trainer.processes.warm import _alone; assert _alone()"
    subprocess.run([sys.executable, "-c", check], env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "4"}, check=True)


@pytest.mark.parametrize("started", [False, True])
def test_no_fork_where_cuda_was_started(monkeypatch, started):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: started)
    assert _forks_may_use_gpus() is not started


@pytest.mark.slow
def test_a_process_that_may_not_fork_executes_itself_again(run):
    one = run("one")
    found = Warm({"JE_ARROW_MALLOC_CONF": "background_thread:true"})  # a second thread, which no fork would have
    found.start(one)
    assert found.outcome() == Done(status="FINISHED")
    found.process.stdin.close()
    assert found.process.wait(30) == 0


@pytest.mark.parametrize(
    "line",
    ["", "{}", '{"status": "NEW"}', '{"kind": "lost"}', '{"kind": "odd", "reason": ""}', '{"status": "STOPPED"'],
)
def test_a_malformed_answer_is_not_taken_for_one(line):
    with pytest.raises(ValueError, match="validation error"):
        read_outcome(line)
