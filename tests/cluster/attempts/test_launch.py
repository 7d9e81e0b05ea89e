"""`muster train` through Ray, end to end: stopped by a signal, continued, a worker killed, finished."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from trainer.record.lines import read_events, read_metrics, summary

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 100
CONFIG = """
run: {{name: story}}
model: {{num_layers: 2, hidden_size: 32, num_heads: 2, num_experts: 4, expert_size: 32}}
train: {{steps: {steps}, global_batch: 4, seq_len: 32, precision: fp32, eval_sequences: 4, sample_tokens: 4}}
data: {{path: {data}}}
checkpoint: {{every: 20}}
parallel: {{dp: 2}}
tracking: {{export_model: false}}
plugins: [users_own]
"""


@dataclass
class Command:
    """One `muster train` that has ended."""

    code: int
    out: str
    err: str
    left_over: list[int]
    """Its processes that are still alive after it."""


@dataclass
class Story:
    run_dir: Path
    too_early: Command
    stopped: Command
    events_when_stopped: list[dict]
    continued: Command
    repeated: Command
    temporary: list[str]
    """What is left in the folder for temporary files."""


class Launch:
    """A running `muster train`."""

    def __init__(self, folder: Path, run_dir: Path, temporary: str) -> None:
        self.run_dir, self.seen = run_dir, set()
        self.before = len(read_metrics(run_dir))
        command = [sys.executable, "-P", "-m", "cluster.cli", "train", "story.yaml"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "TORCHINDUCTOR_"))}
        environment["TMPDIR"] = temporary
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def wait_for_steps(self, count: int) -> None:
        """Return once this many more steps are recorded."""
        while len(read_metrics(self.run_dir)) < self.before + count:
            assert self.process.poll() is None, self.process.communicate()
            self.watch()
            time.sleep(0.1)

    def signal_group(self) -> None:
        """As `timeout` and schedulers do: signal the command and then all processes of its group, itself included."""
        self.watch()
        self.process.send_signal(signal.SIGTERM)
        os.killpg(self.process.pid, signal.SIGTERM)

    def watch(self) -> None:
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def end(self) -> Command:
        out, err = self.process.communicate(timeout=300)
        psutil.wait_procs(self.seen, timeout=60)  # what sends the record is nice
        return Command(self.process.returncode, out, err, [each.pid for each in self.seen if each.is_running()])


@pytest.fixture(scope="module")
def story(tiny_data, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("user")
    (folder / "story.yaml").write_text(CONFIG.format(steps=STEPS, data=tiny_data))
    for name in ("configs", "models", "trainer", "cluster"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the user has a folder of this name')")
    (folder / "users_own.py").write_text("open('plugin_was_here', 'w').close(); print('a word of the plugin')")
    run_dir = folder / "runs" / "story"

    with tempfile.TemporaryDirectory(prefix="ml-", dir="/tmp") as temporary:  # Ray's sockets want a short path
        return tell(folder, run_dir, temporary)


def tell(folder: Path, run_dir: Path, temporary: str) -> Story:
    early = Launch(folder, run_dir, temporary)
    while not list(Path(temporary).glob("muster-*/ray/session_*/logs/gcs_server.out")):
        time.sleep(0.05)
        assert early.process.poll() is None, early.process.communicate()
    early.signal_group()
    too_early = early.end()

    first = Launch(folder, run_dir, temporary)
    first.wait_for_steps(5)
    first.signal_group()
    stopped = first.end()
    events = read_events(run_dir)

    second = Launch(folder, run_dir, temporary)
    second.wait_for_steps(1)
    second.watch()
    os.kill([event for event in read_events(run_dir) if event["event"] == "attempt_started"][-1]["pid"], signal.SIGKILL)
    continued = second.end()

    repeated = Launch(folder, run_dir, temporary).end()
    return Story(run_dir, too_early, stopped, events, continued, repeated, os.listdir(temporary))


def test_a_signal_while_ray_starts_ends_it_at_once(story):
    assert story.too_early.code == 75, story.too_early
    assert story.too_early.err == "muster: stopped at once; run the same command to start again\n"
    assert not story.too_early.left_over
    ends = [event for event in story.events_when_stopped if event["event"] == "attempt_ended"]
    assert [(end["attempt"], end["status"]) for end in ends] == [(0, "STOPPED"), (1, "STOPPED")]


def test_a_signal_stops_it_with_a_checkpoint_and_exit_code_75(story):
    """Ray's processes do not get the signal, and live until the checkpoint is written."""
    assert story.stopped.code == 75, story.stopped
    _, end = [event for event in story.events_when_stopped if event["event"] == "attempt_ended"]
    assert end["status"] == "STOPPED"
    saved = [event["step"] for event in story.events_when_stopped if event["event"] == "checkpoint"]
    assert saved[-1] == end["step"] < STEPS
    assert f"run the same command to continue from step {saved[-1]}" in story.stopped.out
    assert "Traceback" not in story.stopped.err


def test_the_same_command_goes_on_and_survives_a_killed_worker(story):
    assert story.continued.code == 0, story.continued
    events = read_events(story.run_dir)
    assert sum(event["event"] == "attempt_started" for event in events) == 3
    lost = [event["rank"] for event in events if event["event"] == "worker_lost"]
    assert lost == [0]
    _, stopped_at = [event["step"] for event in story.events_when_stopped if event["event"] == "attempt_ended"]
    assert next(event["step"] for event in events if event["event"] == "resumed") == stopped_at
    assert "worker lost" in story.continued.out
    assert f"finished at step {STEPS}" in story.continued.out


def test_the_record_is_whole(story):
    row = summary(story.run_dir)
    assert (row["status"], row["step"]) == ("FINISHED", STEPS)
    assert [record["step"] for record in read_metrics(story.run_dir) if "loss" in record] == list(range(1, STEPS + 1))
    assert (story.run_dir / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").exists()


def test_a_finished_run_is_left_alone(story):
    assert story.repeated.code == 0
    assert "finished" in story.repeated.out
    assert not story.repeated.left_over
    assert read_events(story.run_dir)[-1]["event"] == "attempt_ended"


def test_the_tracker_has_one_run_with_every_step_once(story):
    state = json.loads((story.run_dir / "tracking.json").read_text())
    with closing(sqlite3.connect(story.run_dir.parent / "mlflow.db")) as store:
        assert store.execute("select run_uuid, status from runs").fetchall() == [(state["run_id"], "FINISHED")]
        steps = store.execute("select step from metrics where key = 'loss' order by step").fetchall()
        tags = dict(store.execute("select key, value from tags").fetchall())
    assert [step for (step,) in steps] == list(range(1, STEPS + 1))
    assert tags["muster.policy"].startswith("retry: 1 infrastructure failure")
    assert tags["muster.worker_lost"].startswith("rank 0, after step ")


def test_the_users_folders_do_not_shadow_ours_and_plugins_are_found(story):
    assert (story.run_dir.parent.parent / "plugin_was_here").exists()


def test_nothing_is_left_behind(story):
    assert story.stopped.left_over == story.continued.left_over == story.temporary == []
    assert not {path.name for path in story.run_dir.iterdir()} & {".ray", "stacks"}


def test_the_run_has_what_every_process_printed(story):
    logs = sorted((story.run_dir / "logs").iterdir())
    assert [path.name for path in logs] == [f"attempt-0{a}-rank-000{r}.log" for a in (1, 2, 3) for r in (0, 1)]
    assert all("a word of the plugin\n" in path.read_text() for path in logs)
