"""When failed workers are started again, and how Ray's errors read."""

import pickle

import pytest

from cluster.failures import Failed, Failure, Final, cause, verdict

ERROR = Failure(1, "RuntimeError: CUDA error")
GONE = Failure(1, "the process is gone", lost=True)
PEER = Failure(0, "DistBackendError: Connection closed by peer [127.0.0.1]:1234")


def test_a_lost_process_is_always_started_again():
    assert verdict([GONE, PEER], step=0, failed_at=0) is None


def test_an_error_gets_a_second_chance_and_more_while_there_is_progress():
    assert verdict([ERROR], step=0, failed_at=None) is None
    assert verdict([ERROR], step=40, failed_at=30) is None
    final = verdict([ERROR, PEER], step=30, failed_at=30)
    assert final
    assert final.kind == "failure"
    assert "CUDA error" in final.reason
    assert "step 30" in final.reason


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

    Record(tmp_path, 1).event("attempt_started")
    supervisor = Supervisor(tmp_path)
    supervisor.after_exception(None, {1: dead, 0: Failed("Connection closed by peer", "trace")})
    supervisor.after_exception(None, {0: Failed("ValueError: no", "trace")})
    with pytest.raises(Final, match="failed twice"):
        supervisor.after_exception(None, {0: Failed("ValueError: no", "trace")})
    with pytest.raises(Final, match="lower it"):
        supervisor.after_exception(None, {1: Final("mistake", "lower it")})
    recorded = [(event["event"], event["rank"]) for event in read_events(tmp_path)[1:]]
    assert recorded == [("worker_lost", 1), ("worker_failed", 0), ("worker_failed", 0)]
