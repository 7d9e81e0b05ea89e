"""How the ends of workers read, and what the supervisor does about them."""

import pickle

import pytest
from support import resolved

from cluster.failures import Failed, Failure, Final, cause
from configs import to_yaml

ERROR = Failure(1, "RuntimeError: CUDA error")
GONE = Failure(1, "the process is gone", lost=True)
PEER = Failure(0, "DistBackendError: Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize("failures", [[PEER, ERROR], [ERROR, PEER]])
def test_cause_is_not_the_collateral_failure(failures):
    assert cause(failures) is ERROR
    assert cause([*failures, GONE]) is GONE


@pytest.mark.parametrize("error", [Final("mistake", "lower it"), Failed("ValueError: no", "Traceback")])
def test_errors_cross_process_borders(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.reason == error.reason


def test_supervisor_reads_ray_errors_and_vetoes(tmp_path):
    import ray.exceptions
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from cluster.supervise import Supervisor, explain
    from trainer.record import Record, read_events

    dead = WorkerHealthCheckFailedError("health check failed", failure=ray.exceptions.RayActorError())
    assert explain(1, dead).lost
    assert explain(0, Failed("ValueError: no", "trace")) == Failure(0, "ValueError: no", "trace")

    (tmp_path / "config.yaml").write_text(to_yaml(resolved()))
    Record(tmp_path, 1).event("attempt_started")
    supervisor = Supervisor(tmp_path, cpu=True)
    supervisor.after_exception(None, {1: dead, 0: Failed("Connection closed by peer", "trace")})
    supervisor.after_exception(None, {0: Failed("ValueError: no", "trace")})
    with pytest.raises(Final, match="failed twice"):
        supervisor.after_exception(None, {0: Failed("ValueError: no", "trace")})
    with pytest.raises(Final, match="lower it"):
        supervisor.after_exception(None, {1: Final("mistake", "lower it")})
    recorded = [(event["event"], event.get("kind", event.get("action"))) for event in read_events(tmp_path)[1:]]
    assert recorded == [
        ("worker_lost", "infrastructure"), ("policy", "retry"), ("worker_failed", "error"), ("policy", "retry"),
        ("worker_failed", "error"), ("policy", "stop"),
    ]  # fmt: skip
    with pytest.raises(Final, match=r"out of memory after step 0; the plan was .* GB per device.*CUDA out of memory"):
        supervisor.after_exception(None, {0: Failed("OutOfMemoryError: CUDA out of memory", "trace")})


def test_the_supervisor_takes_the_reason_of_a_hang_from_the_record(tmp_path):
    import ray.exceptions

    from cluster.supervise import Supervisor
    from trainer.record import Record, read_events

    (tmp_path / "config.yaml").write_text(to_yaml(resolved()))
    for attempt in (1, 2):
        record = Record(tmp_path, attempt)
        record.event("attempt_started")
        if attempt == 1:
            record.event("hang", step=7, suspects=[1], reason="no progress for 30 s in step 7", stacks=[])
        Supervisor(tmp_path, cpu=True).after_exception(None, {0: ray.exceptions.RayActorError()})
    ends = [event for event in read_events(tmp_path) if event["event"] == "worker_lost"]
    assert [(end["rank"], end["kind"]) for end in ends] == [(1, "hang"), (0, "infrastructure")]
    assert ends[0]["reason"] == "no progress for 30 s in step 7"
    policies = [event["reason"] for event in read_events(tmp_path) if event["event"] == "policy"]
    assert "2 infrastructure failures (1 of them hung)" in policies[1]
