"""MLflow holds the record, each step once, whatever was killed, restarted, rolled back or answered with an error."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tracker import assert_all_shown, end, faulty_server, kept_files, make_run, recorded, shown, started, take_steps

from configs import ConfigError, from_dict, to_yaml
from trainer.record.columns import parts, read_columns
from trainer.record.lines import read_events
from trainer.tracking import Input, RunInfo, inputs_of, read_state, shipper, start_shipper, tracking_uri, unsent
from trainer.tracking.flat import scalars
from trainer.tracking.mlflow import MlflowClient, MlflowTracker
from trainer.tracking.shipper import ship
from trainer.tracking.start import sqlite_path, sqlite_uri

pytestmark = pytest.mark.usefixtures("quiet_shipper")


def test_the_whole_record_is_shown(root):
    run_dir, config = make_run(root, "whole")
    inputs = [Input("text", "training", "/data/text", "ab" * 32, {"tokens": 5})._asdict()]
    record = started(run_dir, 1, inputs=inputs)
    take_steps(record, range(1, 31))
    record.metrics({"step": 31, "loss": float("nan"), "tokens": 248, "skipped": True})
    (run_dir / "samples").mkdir()
    (run_dir / "samples" / "step-00000010.txt").write_text("def")
    end(record)
    assert ship(run_dir).missing is None

    run, points = shown(root, run_dir)
    assert points == recorded(run_dir)[:-1]  # a loss that is not a number is a gap
    assert shown(root, run_dir, "router_entropy_worst")[1][4][2] == 0.5
    assert shown(root, run_dir, "tokens")[1] == recorded(run_dir, "tokens")
    assert (run.info.status, run.data.tags["reason"]) == ("FINISHED", "said so")
    assert (run.data.tags["world_size"], run.data.tags["versions.torch"]) == ("2", "2.13")
    assert run.data.params["train.steps"] == str(config.train.steps)
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.tags[0].value) == ("text", "ab" * 18, "training")
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(root / "mlartifacts")
    assert set(kept_files(run)) == {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "samples/step-00000010.txt",
    }

    assert ship(run_dir).missing is None  # a second time adds nothing
    again, points_again = shown(root, run_dir)
    assert (again.info.run_id, points_again) == (run.info.run_id, points)


def test_a_restart_repeats_no_step_and_keeps_the_run(root):
    run_dir, config = make_run(root, "restarted")
    record = started(run_dir, 1)
    take_steps(record, range(1, 26))
    end(record, "FAILED")
    assert ship(run_dir).missing is None
    before, first_points = shown(root, run_dir)
    assert before.info.status == "FAILED"

    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp": 2})})
    (run_dir / "config.yaml").write_text(to_yaml(changed))
    record = started(run_dir, 2)
    take_steps(record, range(21, 41))
    assert ship(run_dir).missing is None
    running, _ = shown(root, run_dir)
    assert (running.info.status, running.data.tags.get("reason")) == ("RUNNING", None)
    end(record)
    assert ship(run_dir).missing is None
    after, points = shown(root, run_dir)
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert after.data.tags["attempt"] == "2"
    assert (after.data.params["parallel.dp"], after.data.tags["changed.parallel.dp"]) == ("1", "2")
    assert [(step, value) for step, _, value in points] == [(step, 1.0 / step) for step in range(1, 41)]
    assert points[:25] == first_points
    assert [step for step, *_ in shown(root, run_dir, "eval_loss")[1]] == [10, 20, 30, 40]


def test_nothing_is_sent_twice_when_the_state_is_lost(root):
    run_dir, _ = make_run(root, "forgetful")
    record = started(run_dir, 1)
    take_steps(record, range(1, 13))
    ship(run_dir)
    before, _ = shown(root, run_dir)
    (run_dir / "tracking.json").unlink()
    take_steps(record, range(8, 16))  # with other times
    end(record)
    assert ship(run_dir).missing is None
    after, points = shown(root, run_dir)
    assert after.info.run_id == before.info.run_id
    assert [step for step, *_ in points] == list(range(1, 16))


@pytest.mark.slow
def test_killed_between_sending_and_saving_the_state(root):
    run_dir, _ = make_run(root, "killed")
    take_steps(started(run_dir, 1), range(1, 26))
    killer = """if True:
        import os, sys
        from trainer.tracking import mlflow, shipper
        send = mlflow.MlflowTracker.log
        def log(self, points):
            send(self, points)
            os.kill(os.getpid(), 9)
        mlflow.MlflowTracker.log = log
        shipper.ship(sys.argv[1])
        """
    assert subprocess.run([sys.executable, "-c", killer, str(run_dir)]).returncode == -signal.SIGKILL
    assert read_state(run_dir)["offset"] == 0
    assert len(shown(root, run_dir)[1]) == 25
    record = started(run_dir, 2)
    take_steps(record, range(21, 31))  # training was killed too, and repeats what the tracker already has
    end(record)
    assert ship(run_dir).missing is None
    for key, steps in (("loss", range(1, 31)), ("eval_loss", range(10, 31, 10))):
        assert [step for step, *_ in shown(root, run_dir, key)[1]] == list(steps)


def test_a_step_that_a_rollback_may_change_is_held_back(root):
    run_dir, _ = make_run(root, "rolled-back", train={"spike": {"action": "rollback"}})
    record = started(run_dir, 1)
    take_steps(record, range(1, 16))
    end(record, "FAILED")
    assert "5 records" in ship(run_dir, attempt=1, once=False).missing
    assert [step for step, *_ in shown(root, run_dir)[1]] == list(range(1, 11))
    record = started(run_dir, 2)
    take_steps(record, range(11, 18))
    record.event("rollback", from_step=17, to_step=10)
    take_steps(record, range(11, 26), loss=lambda step: 5.0 + step)
    end(record)
    assert ship(run_dir, attempt=2, once=False).missing is None
    assert_all_shown(root, run_dir)
    assert shown(root, run_dir)[1][10][2] == 16.0


def test_an_earlier_attempts_shipper_makes_way(root):
    run_dir, _ = make_run(root, "superseded")
    take_steps(started(run_dir, 1), [1])
    take_steps(started(run_dir, 2), [2])
    assert ship(run_dir, attempt=1, parent=1, once=False).missing is None
    assert not (run_dir / "tracking.json").exists()


def test_one_at_a_time(root, monkeypatch):
    monkeypatch.setattr(shipper, "PATIENCE", 0.0)
    run_dir, _ = make_run(root, "taken")
    take_steps(started(run_dir, 1), [1])
    with (run_dir / "tracking.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is sending taken" in ship(run_dir).missing


def test_two_at_once_take_turns(root):
    run_dir, _ = make_run(root, "twice")
    record = started(run_dir, 1)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(ship, run_dir, attempt=1, once=False) for _ in range(2)]
        for step in range(1, 21):
            take_steps(record, [step])
            time.sleep(0.02)
        end(record)
        assert [one.result(60).missing for one in both] == [None, None]
    assert_all_shown(root, run_dir)


@pytest.fixture(scope="module")
def server(root):
    with faulty_server(root) as server:
        yield server


@pytest.mark.slow
def test_a_server_that_fails_loses_and_repeats_nothing(root, server, monkeypatch):
    monkeypatch.setattr(shipper, "FIRST_BACKOFF", 0.05)
    run_dir, _ = make_run(root, "faulty", tracking={"uri": server.uri, "experiment": "served"})
    record = started(run_dir, 1)
    take_steps(record, range(1, 41))
    end(record)
    # What befalls the first, second, ... request of a kind: refused, or carried out and the answer lost.
    faults = {
        "experiments/create": ["after"],
        "runs/create": ["before", "after"],
        "runs/log-batch": [None, "before", None, "after"],
        "mlflow-artifacts/": ["before", "after"],
        "runs/update": ["after"],
    }

    def fault(path):
        kind = next((kind for kind in faults if kind in path), None)
        return faults[kind].pop(0) if kind and faults[kind] else None

    server.fault = fault
    assert ship(run_dir, grace=20.0).missing is None
    assert not any(faults.values())
    run = assert_all_shown(root, run_dir, "served")
    assert run.info.status == "FINISHED"
    client = MlflowClient(tracking_uri=server.uri)
    assert "metrics.jsonl" in {item.path for item in client.list_artifacts(run.info.run_id)}
    assert (root / "served").is_dir()


def test_a_server_that_stays_down_is_named_and_gets_the_rest_later(root, server, monkeypatch):
    monkeypatch.setattr(shipper, "FIRST_BACKOFF", 0.05)
    run_dir, _ = make_run(root, "down", tracking={"uri": server.uri})
    record = started(run_dir, 1)
    take_steps(record, range(1, 10))
    end(record, "STOPPED")
    server.fault = lambda path: "before"
    message = ship(run_dir, attempt=1, once=False, grace=0.2).missing
    assert "9 records" in message
    assert server.uri in message
    assert read_state(run_dir)["error"] == message
    server.fault = lambda path: None
    assert ship(run_dir).missing is None
    run = assert_all_shown(root, run_dir)
    assert (run.info.status, run.data.tags["muster.status"]) == ("KILLED", "STOPPED")
    assert read_state(run_dir)["error"] is None


def test_a_failing_tracker_is_recorded_while_training_goes_on(root, server, monkeypatch):
    monkeypatch.setattr(shipper, "FIRST_BACKOFF", 0.05)
    run_dir, _ = make_run(root, "said", tracking={"uri": server.uri, "interval": 0.05})
    record = started(run_dir, 1)
    take_steps(record, [1])
    server.fault = lambda path: "before"
    with ThreadPoolExecutor(1) as pool:
        live = pool.submit(ship, run_dir, attempt=1, once=False)
        wait_for(lambda: told(run_dir, "tracker_failed"))
        [event] = told(run_dir, "tracker_failed")
        assert event["reason"].startswith(f"cannot send to {server.uri}: ")
        assert f"`muster sync {run_dir}` sends what is missing" in event["reason"]
        assert unsent(run_dir).endswith(f"; `muster sync {run_dir}` sends what is missing")
        server.fault = lambda path: None
        wait_for(lambda: told(run_dir, "tracker_recovered"))
        end(record)
        assert live.result(60).missing is None
    assert len(told(run_dir, "tracker_failed")) == 1
    assert unsent(run_dir) is None
    assert_all_shown(root, run_dir)


def told(run_dir, name):
    return [event for event in read_events(run_dir) if event["event"] == name]


def test_unsent_records_are_known_without_an_error(root):
    run_dir, _ = make_run(root, "unsent")
    record = started(run_dir, 1)
    assert unsent(run_dir) is None
    take_steps(record, [1])
    assert "part of the record is not sent" in unsent(run_dir)
    assert ship(run_dir).missing is None
    assert unsent(run_dir) is None


def test_a_run_that_was_killed_on_purpose_has_not_failed(root, monkeypatch):
    """Whatever killed it records that a moment after its process is gone."""
    monkeypatch.setattr(shipper, "LAST_WORD", 60.0)  # the machine may be busy
    monkeypatch.setattr(shipper.signal, "signal", lambda *_: None)  # a thread may not
    run_dir, _ = make_run(root, "purpose", tracking={"interval": 0.05})
    record = started(run_dir, 1)
    take_steps(record, [1])
    with ThreadPoolExecutor(1) as pool:
        live = pool.submit(ship, run_dir, attempt=1, parent=-1, once=False)
        wait_for(lambda: read_state(run_dir).get("offset"))
        end(record, "STOPPED")
        assert live.result(60).missing is None
    run, _ = shown(root, run_dir)
    assert (run.info.status, run.data.tags["muster.status"]) == ("KILLED", "STOPPED")


@pytest.mark.slow
def test_two_runs_start_a_store_at_once_and_outlive_signals(tmp_path):
    """The processes as training starts them; both runs meet a database that is not there yet."""
    runs = [make_run(tmp_path, name) for name in ("left", "right")]
    records = [started(run_dir, 1) for run_dir, _ in runs]
    handles = [start_shipper(*run) for run in runs]
    for step in range(1, 31):
        for record in records:
            take_steps(record, [step])
        if step == 15:
            wait_for(lambda: all((run_dir / "tracking.json").exists() for run_dir, _ in runs))
            for handle in handles:
                handle.process.send_signal(signal.SIGTERM)
                handle.process.send_signal(signal.SIGINT)
    for record in records:
        end(record)
    assert [handle.finish(120) for handle in handles] == [None, None]
    for run_dir, _ in runs:
        assert assert_all_shown(tmp_path, run_dir).info.status == "FINISHED"
        assert (run_dir / "plots" / "loss.png").stat().st_size > 10_000
        assert "Traceback" not in (run_dir / "tracking.log").read_text()


@pytest.mark.slow
def test_a_training_process_that_is_killed_leaves_a_failed_run(root):
    run_dir, _ = make_run(root, "shot")
    trainer = """if True:
        import os, sys
        from pathlib import Path
        from configs import load
        from trainer.record.lines import Record
        from trainer.tracking import start_shipper
        run_dir = Path(sys.argv[1])
        record = Record(run_dir, 1)
        record.event("attempt_started")
        print(start_shipper(run_dir, load(run_dir / "config.yaml")).process.pid, flush=True)
        record.metrics({"step": 1, "loss": 2.0, "tokens": 8})
        os.kill(os.getpid(), 9)
        """
    done = subprocess.run([sys.executable, "-c", trainer, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: is_over(int(done.stdout)))
    run = assert_all_shown(root, run_dir)
    assert run.info.status == "FAILED"
    assert "without a message" in run.data.tags["reason"]


def is_over(pid):
    """True for a zombie too, whose command line is empty."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return True


def wait_for(condition, seconds=400.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_uri(tmp_path, monkeypatch):
    config = from_dict({})
    assert tracking_uri(tmp_path / "run", config) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(tmp_path / "run", config) == "http://host:5000"
    for uri in ("./mlruns", "file:///mlruns"):
        with pytest.raises(ConfigError, match=r"tracking\.uri"):
            tracking_uri(tmp_path / "run", from_dict({"tracking": {"uri": uri}}))
    with pytest.raises(ConfigError, match="not a run"):
        ship(tmp_path)


@pytest.mark.parametrize("name", ["plain", "a b", "50%", "a%20b", "a?b", "a#b", "a?b=c&d#%41", "ü;'"])
def test_a_folders_name_is_not_read_as_a_uri(name):
    path = Path("/runs", name, "mlflow.db")
    uri = sqlite_uri(path)
    assert sqlite_path(uri) == path
    assert not {"?", "#"} & set(uri)


def test_the_record_of_a_folder_with_an_odd_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a b?c=d#e%20f"
    run_dir, config = make_run(folder, "odd")
    tracker = MlflowTracker(tracking_uri(run_dir, config), "x", folder / "mlartifacts")
    tracker.open(RunInfo(name="odd", key="k", run_id=None, started=time.time()))
    (tmp_path / "text").write_text("kept")
    tracker.artifact(tmp_path / "text", "")
    assert (folder / "mlflow.db").stat().st_size
    assert [path.read_text() for path in folder.glob("mlartifacts/**/text")] == ["kept"]
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "text"}, "nothing lies elsewhere"


def test_scalars():
    few = scalars({"step": 3, "time": 1.0, "loss": None, "skipped": True, "expert_load": [[0.5, None]]})
    assert few == {"skipped": 1.0}
    routers = scalars({"step": 3, "router_entropy": [1.0, 0.5], "dropped": [0.0, 0.25], "expert_dead": [None, None]})
    assert routers == {
        "router_entropy_mean": 0.75, "router_entropy_worst": 0.5, "router_dropped_mean": 0.125,
        "router_dropped_worst": 0.25,
    }  # fmt: skip
    assert scalars({"step": 3, "rank_time": [1.0, 2.0, 6.0]}) == {"time_rank_max": 6.0, "time_rank_median": 2.0}


def test_inputs_of(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"train": {"tokens": 7}}, "shards": [1]}))
    (tmp_path / "tokenizer.json").write_text("{}")
    data, tokenizer = inputs_of(tmp_path)
    assert (data["profile"], len(data["digest"])) == ({"splits": {"train": {"tokens": 7}}}, 64)
    assert tokenizer["source"] == str(tmp_path / "tokenizer.json")


def test_the_columns_are_written_behind_the_run_also_while_the_tracker_is_down(root, monkeypatch):
    run_dir, _ = make_run(root, "columns", tracking={"uri": "http://127.0.0.1:1"})
    record = started(run_dir, 1)
    take_steps(record, range(1, 41))
    monkeypatch.setattr(parts, "TAIL", 1000)
    assert ship(run_dir, grace=0.0).missing
    assert list((run_dir / parts.COLUMNS).glob("0*.parquet"))
    assert read_columns(run_dir, ["loss"])["step"].tolist() == list(range(1, 41))
