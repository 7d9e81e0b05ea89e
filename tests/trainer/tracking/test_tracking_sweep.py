"""A sweep is one run of the tracker with its runs nested below; nothing is sent twice, and what is missing later."""

import json

import pytest
from ranks import free_port
from tracker import MlflowClient, kept_files, recorded

from configs import ConfigError, from_dict, to_yaml
from configs.sweep.definition import sweep_from_dict
from trainer.record.lines import Record
from trainer.tracking import shipper
from trainer.tracking.sweep import log_to_parent, ship_sweep, sweep_config


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of three runs: one finished, one failed, one never begun."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sweep_dir = tmp_path / "runs" / "small"
    record = Record(sweep_dir, 1)
    (sweep_dir / "sweep.yaml").write_text(
        to_yaml(sweep_from_dict({"name": "small", "grid": {}, "axes": {"a": [1, 2]}}))
    )
    record.event("attempt_started", tracking={"experiment": "small"})
    for name, status in (("one", "FINISHED"), ("two", "FAILED")):
        run_dir = sweep_dir / "trials" / name
        own = Record(run_dir, 1)
        tracking = {"experiment": "small", "parent": str(sweep_dir)}
        (run_dir / "config.yaml").write_text(to_yaml(from_dict({"run": {"name": name}, "tracking": tracking})))
        own.event("attempt_started")
        for step in range(1, 11):
            own.metrics({"step": step, "loss": 1.0 / step, "tokens": 8 * step})
        own.event("attempt_ended", status=status, reason="said so", step=10)
        own.close()
    never = Record(sweep_dir / "trials" / "never", 0)  # stopped before its first attempt
    (never.run_dir / "config.yaml").write_text(to_yaml(from_dict({"run": {"name": "never"}})))
    never.event("attempt_ended", status="STOPPED", reason="asked to", step=0)
    never.close()
    record.metrics({"step": 2, "failed": 1})
    record.event("attempt_ended", status="FINISHED", reason="all", step=0, totals={"finished": 1, "failed": 1})
    record.close()
    return sweep_dir


def shown(sweep_dir):
    """The sweep's run, and those below it by their names."""
    client = MlflowClient(tracking_uri=f"sqlite:///{sweep_dir.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("small")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    return client, parent, runs


@pytest.mark.slow
def test_the_sweep_is_the_parent_of_its_runs(sweep):
    done = ship_sweep(sweep)
    assert (done.missing, done.records) == (None, 21)
    client, parent, runs = shown(sweep)
    assert (parent.info.status, parent.data.tags["failed"]) == ("FINISHED", "1")
    assert parent.data.params["axes.a.values"] == "[1, 2]"
    assert parent.data.metrics["failed"] == 1
    assert set(kept_files(parent)) == {"sweep.yaml", "events.jsonl", "metrics.jsonl"}
    assert {name: run.info.status for name, run in runs.items()} == {"one": "FINISHED", "two": "FAILED"}
    history = client.get_metric_history(runs["one"].info.run_id, "loss")
    assert sorted((m.step, m.timestamp, m.value) for m in history) == recorded(sweep / "trials" / "one")
    assert (sweep.parent / "mlartifacts").is_dir()

    assert ship_sweep(sweep) == (0, 0, None)
    (sweep / "fit.json").write_text("{}")
    assert log_to_parent(sweep, [sweep / "fit.json"]) is None
    assert "fit.json" in kept_files(shown(sweep)[1])


@pytest.mark.slow
def test_a_run_that_goes_on_is_taken_up_again(sweep):
    assert ship_sweep(sweep).missing is None
    own = Record(sweep / "trials" / "two", 2)
    own.event("attempt_started")
    own.metrics({"step": 11, "loss": 0.05, "tokens": 88})
    own.event("attempt_ended", status="FINISHED", reason="done", step=11)
    assert ship_sweep(sweep).records == 1
    _, _, runs = shown(sweep)
    assert (len(runs), runs["two"].info.status, runs["two"].data.metrics["loss"]) == (2, "FINISHED", 0.05)


@pytest.mark.slow
def test_a_tracker_that_is_down_gets_the_rest_later(sweep, muster, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(shipper, "FIRST_BACKOFF", 0.05)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert "not sent to http" in str(ship_sweep(sweep, grace=0.1).missing)
    assert "missing" in json.loads((sweep / "tracking.json").read_text())
    assert "`muster sync" in str(log_to_parent(sweep))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    code, out, _ = muster("sync", "small", "--root", str(sweep.parent))
    assert (code, out) == (0, "small: sent 21 records and 9 files\n")
    assert (
        muster("sync", str(sweep))[1]
        == "small: no record or file was missing; its note, tags and description are up to date\n"
    )


def test_a_sweep_that_never_ran_has_nothing_to_send(tmp_path):
    with pytest.raises(ConfigError, match="is not the folder of a sweep that has run"):
        sweep_config(tmp_path)
    assert log_to_parent(tmp_path) is None
