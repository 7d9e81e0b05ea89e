"""`muster sweep run`, end to end: stopped by a signal, continued, branches, trials that fail, one MLflow run above."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import train_in_process
from tracker import MlflowClient, kept_files, recorded

from configs import load
from trainer.record.lines import read_events, read_metrics, summary
from trainer.run.folder import prepare_run, read_config

BASE = """
train: {{global_batch: 4, seq_len: 32, precision: fp32, eval_sequences: 4}}
optim: {{lr: 2.0e-3}}
data: {{path: {data}}}
checkpoint: {{background: false}}
cluster: {{max_failures: 0}}
"""
SWEEP = """
name: story
base: base.yaml
ladder: {{parameters: [20e3, 40e3], tokens_per_parameter: [2, 4]}}
shape: {{head_dim: 16, aspect_ratio: 16, ffn_multiple: 16}}
rules: {{schedule: wsd_branches, lr: fixed, batch: fixed}}
variants:
  dense: {{}}
  bad: {{set: {{plugins: [{plugin}]}}}}
"""
PLUGIN = "import os\nif 'RANK' in os.environ: raise RuntimeError('the plugin is broken')\n"


@dataclass
class Story:
    folder: Path
    codes: list[int]
    outs: list[str]
    events_when_stopped: list[dict]

    @property
    def sweep_dir(self) -> Path:
        return self.folder / "runs" / "story"

    def run(self, name: str) -> Path:
        return self.sweep_dir / "trials" / name


def start(folder: Path, *command: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    whole = [sys.executable, "-P", "-m", "cluster.cli", "sweep", *command]
    return subprocess.Popen(
        whole, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def story(tiny_data, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "broken.py").write_text(PLUGIN)
    (folder / "base.yaml").write_text(BASE.format(data=tiny_data))
    (folder / "sweep.yaml").write_text(SWEEP.format(plugin=folder / "broken.py"))
    sweep_dir = folder / "runs" / "story"

    first = start(folder, "run", "sweep.yaml")
    while not (sweep_dir / "lock").exists() or not (sweep_dir / "lock").read_text():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    second = start(folder, "run", "sweep.yaml")
    refused = second.communicate(timeout=120)[0]
    while not any(len(read_metrics(path)) > 5 for path in (sweep_dir / "trials").glob("dense-*")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    stopped = first.communicate(timeout=300)[0]
    events = read_events(sweep_dir)
    third = start(folder, "run", "sweep.yaml")
    ended = third.communicate(timeout=600)[0]
    return Story(folder, [first.returncode, second.returncode, third.returncode], [stopped, refused, ended], events)


pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_it_stops_goes_on_and_is_run_once_at_a_time(story):
    stopped, refused, ended = story.outs
    assert story.codes == [75, 2, 1], "\n".join(story.outs)
    assert "run the same command to continue" in stopped
    assert "sweep story is being run by" in refused
    assert "4 of 8 trials finished" in ended
    assert "Traceback" not in stopped
    killed = [e for e in story.events_when_stopped if e["event"] == "trial_ended" and e["status"] == "STOPPED"]
    assert killed
    for name in {event["trial"] for event in killed}:
        run_dir = story.run(name)
        losses = [m["step"] for m in read_metrics(run_dir) if "loss" in m]
        assert losses == list(range(losses[0], read_config(run_dir).train.steps + 1))


def dense(story) -> dict[str, dict]:
    tree = json.loads((story.sweep_dir / "plan.json").read_text())
    return {item["name"]: item for item in tree["trials"] if item["variant"] == "dense"}


def test_every_good_trial_finished_in_as_many_attempts_as_sessions(story):
    items = dense(story)
    assert len(items) == 4
    for name in items:
        row = summary(story.run(name))
        assert (row["status"], row["step"]) == ("FINISHED", items[name]["steps"])
        assert row["eval_loss"] is not None
        assert row["attempts"] <= 2


def test_trials_that_fail_do_so_alone_and_say_why(story):
    ends = {e["trial"]: e for e in read_events(story.sweep_dir) if e["event"] == "trial_ended"}
    bad = {name: end for name, end in ends.items() if name.startswith("bad-")}
    assert {end["status"] for end in bad.values()} == {"FAILED"}
    trunks = [end["reason"] for end in bad.values() if "the plugin is broken" in end["reason"]]
    branches = [end["reason"] for end in bad.values() if "to start from" in end["reason"]]
    assert len(trunks) >= 2
    assert len(branches) == 2


def test_a_branch_is_the_run_that_it_stands_for(story, tmp_path):
    """From step 0, with its own config, it has the same losses to the last bit."""
    name, item = next((name, item) for name, item in dense(story).items() if item["after"])
    branch = [(m["step"], m["loss"]) for m in read_metrics(story.run(name)) if "loss" in m]
    assert branch[0][0] == item["from_step"] + 1
    config = load(story.run(name) / "config.yaml")
    alone = config.model_copy(update={
        "run": config.run.model_copy(update={"root": str(tmp_path)}),
        "tracking": config.tracking.model_copy(update={"enabled": False}),
    })  # fmt: skip
    assert train_in_process(prepare_run(alone)) == 0
    whole = [(m["step"], m["loss"]) for m in read_metrics(tmp_path / name) if "loss" in m]
    assert whole[item["from_step"] :] == branch


def test_the_tracker_has_the_sweep_and_its_runs_below_it(story):
    client = MlflowClient(tracking_uri=f"sqlite:///{story.folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("story")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id], max_results=50)}
    parent = runs.pop("story")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert set(dense(story)) <= set(runs)
    assert (parent.info.status, parent.data.tags["finished"], parent.data.tags["failed"]) == ("FINISHED", "4", "4")
    assert parent.data.params["ladder.tokens_per_parameter"] == "[2.0, 4.0]"
    assert {"sweep.yaml", "plan.json", "events.jsonl"} <= set(kept_files(parent))
    for name in dense(story):
        history = client.get_metric_history(runs[name].info.run_id, "loss")
        points = [(m.step, m.timestamp, m.value) for m in sorted(history, key=lambda m: m.step)]
        assert points == recorded(story.run(name))
        assert runs[name].info.status == "FINISHED"


def test_status_tells_where_the_time_went(story):
    out = start(story.folder, "status", "sweep.yaml", "--json").communicate(timeout=120)[0]
    found = json.loads(out)
    assert found["counts"] == {"waiting": 0, "running": 0, "stopped": 0, "finished": 4, "diverged": 0, "failed": 4}
    assert 0 < found["in_steps"] < 1
    assert sum(found["seconds"].values()) == pytest.approx(found["device_seconds"], rel=0.02)
