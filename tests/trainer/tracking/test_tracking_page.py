"""MLflow's page of a run: what comes first, what it says of the run, the machine, and the times."""

import time

import pytest
from tracker import end, make_run, shown, started, take_steps

from trainer.record.lines import Record
from trainer.run.notes import set_note, set_tags
from trainer.tracking.mlflow import MlflowClient
from trainer.tracking.shipper import ship
from trainer.tracking.system import SystemMetrics

pytestmark = pytest.mark.usefixtures("quiet_shipper")


def as_mlflow_sorts(names):
    """The charts of a run's page (getBaseChartAndSectionConfigs of MLflow 3.17): sections by the part of a name
    before the last /, sorted, then names without one, then system metrics."""
    section = {name: name.rpartition("/")[0] for name in names}
    last = {"": 1, "system": 2}
    return sorted(names, key=lambda name: (last.get(section[name], 0), section[name], name))


@pytest.mark.slow
def test_mlflows_page_of_a_run(root, monkeypatch):
    """Losses first, experts after them, the machine last; where the time went; its real times, however late it is sent;
    what it is; and a page for training."""
    run_dir, _ = make_run(root, "page", train={"steps": 40})
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "loss.png").write_bytes(b"a picture")
    began = time.time() - 86400
    with monkeypatch.context() as patch:
        patch.setattr("trainer.record.lines.time.time", lambda: began)
        (run_dir / "events.jsonl").unlink()
        Record(run_dir, 0).event("resolved", began=began - 60, command="muster train quickstart run.name=page")
        record = started(run_dir, 1)
        values = {"tokens_per_second": 1.0, "data_wait": 0.1, "step_time": 2.0, "aux_loss": 0.1, "z_loss": 0.1}
        values |= {"grad_norm": 1.0, "lr": 0.1, "tflops": 1.0, "memory_gb": 1.0, "sequences": 3, "mfu": 0.5}
        values |= {"expert_load": [[0.5, 0.5]], "expert_maxvio": [0.5], "expert_dead": [0], "router_entropy": [1.0]}
        values |= {"router_confidence": [0.5], "dropped": [0.1], "rank_time": [1.0, 2.0], "loss_scale": 2.0}
        for step in range(1, 31):
            record.metrics({"step": step, "loss": 1.0 / step, "tokens": step} | values, at=began + 2 * step)
        record.metrics({"step": 30, "eval_loss": 0.5, "eval_tokens": 4}, at=began + 70)
    set_note(run_dir, "the one for the paper")
    set_tags(run_dir, {"project": "x", "gone": "y"})
    monkeypatch.setattr("trainer.record.lines._alive", lambda pid: False)  # killed, and sent a day later
    assert ship(run_dir).missing is None

    run, _ = shown(root, run_dir)
    assert run.info.start_time == pytest.approx(1000 * (began - 60), abs=2)
    assert run.info.end_time == pytest.approx(1000 * (began + 70), abs=2)
    metrics = run.data.metrics
    order = as_mlflow_sorts(metrics)
    assert order[:4] == ["eval_loss", "grad_norm", "loss", "loss_scale"]
    assert not [name for name in metrics if "/" in name and not name.startswith("system/")]
    assert metrics["run_seconds_step"] == pytest.approx(30 * 1.9)
    assert metrics["run_goodput"] == pytest.approx(metrics["run_seconds_step"] / 120, abs=0.01)
    tags = run.data.tags
    assert (tags["step"], tags["project"], tags["gone"]) == ("30/40", "x", "y")
    note = tags["mlflow.note.content"]
    assert note.startswith("the one for the paper\n\n`muster train quickstart run.name=page`\n\n40 steps of ")
    assert f"![loss](get-artifact?path=plots%2Floss.png&run_uuid={run.info.run_id})" in note
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"

    set_tags(run_dir, {"gone": ""})
    set_note(run_dir, "another")
    assert ship(run_dir).missing is None
    tags = shown(root, run_dir)[0].data.tags
    assert "gone" not in tags
    assert tags["mlflow.note.content"].startswith("another\n\n")
    client.set_tag(run.info.run_id, "mlflow.note.content", "typed on MLflow's page")
    client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "finetuning")
    set_note(run_dir, "a third")
    assert ship(run_dir).missing is None
    assert shown(root, run_dir)[0].data.tags["mlflow.note.content"] == "typed on MLflow's page"
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "finetuning"
    client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "custom_model_development")


def test_the_machine_is_shown_while_a_run_trains(root):
    run_dir, _ = make_run(root, "machine")
    record = started(run_dir, 1)
    take_steps(record, [1])
    end(record)
    assert ship(run_dir, attempt=1, once=False).missing is None
    run, _ = shown(root, run_dir)
    system = {name for name in run.data.metrics if name.startswith("system/")}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= system
    assert as_mlflow_sorts(run.data.metrics)[-1] in system


def test_samples_of_the_machine_wait_for_a_tracker_that_fails():
    system, sent = SystemMetrics(1000.0), []

    def refuse(points):
        raise OSError("down")

    for now in (1000.0, 1003.0, 1010.0):
        system.sample(now)
    with pytest.raises(OSError, match="down"):
        system.send(refuse)
    system.send(sent.extend)
    system.send(sent.extend)
    assert [(point.step, point.time) for point in sent] == [(0, 1000.0), (10, 1010.0)]


def test_a_run_that_began_under_an_older_version_repeats_no_step(root):
    """Its metrics had the record's names."""
    run_dir, _ = make_run(root, "older")
    record = started(run_dir, 1)
    take_steps(record, range(1, 11))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.tracking.flat.NAMES", {})
        assert ship(run_dir).missing is None
    (run_dir / "tracking.json").unlink()
    take_steps(record, range(8, 13))
    end(record)
    assert ship(run_dir).missing is None
    assert [step for step, *_ in shown(root, run_dir)[1]] == list(range(1, 13))
