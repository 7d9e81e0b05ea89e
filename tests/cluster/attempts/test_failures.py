"""How workers' failures are recorded and judged."""

import pytest
from support import resolved

from cluster.attempts.failures import Failure, Final, cause
from cluster.attempts.supervise import judge
from configs import to_yaml
from trainer.record.lines import Record, read_events

ERROR = Failure(1, "RuntimeError: CUDA error")
GONE = Failure(1, "the process is gone", lost=True)
PEER = Failure(0, "DistBackendError: Connection closed by peer [127.0.0.1]:1234", fault="connection")


@pytest.mark.parametrize("failures", [[PEER, ERROR], [ERROR, PEER]])
def test_cause_is_not_the_collateral_failure(failures):
    assert cause(failures) is ERROR
    assert cause([*failures, GONE]) is GONE


def test_failures_are_recorded_and_judged(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(resolved()))
    Record(tmp_path, 1).event("attempt_started")
    error = Failure(0, "ValueError: no", "trace")
    judge(tmp_path, [GONE, PEER], cpu=True)
    judge(tmp_path, [error], cpu=True)
    with pytest.raises(Final, match=r"failed twice in a row after step 0; rank 0: ValueError: no"):
        judge(tmp_path, [error], cpu=True)
    recorded = [(event["event"], event.get("kind", event.get("action"))) for event in read_events(tmp_path)[1:]]
    assert recorded == [
        ("worker_lost", "infrastructure"), ("policy", "retry"), ("worker_failed", "error"), ("policy", "retry"),
        ("worker_failed", "error"), ("policy", "stop"),
    ]  # fmt: skip
    with pytest.raises(Final, match=r"out of memory after step 0; the planner expected .* [GM]B per device.*CUDA out"):
        judge(tmp_path, [Failure(0, "OutOfMemoryError: CUDA out of memory", fault="memory")], cpu=True)


def test_a_broken_connection_is_not_the_users_error(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(resolved()))
    for _ in range(3):
        judge(tmp_path, [PEER], cpu=True)
    policies = [event["reason"] for event in read_events(tmp_path) if event["event"] == "policy"]
    assert "3 infrastructure failures before the first checkpoint" in policies[-1]


def test_the_reason_of_a_hang_is_taken_from_the_record(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(resolved()))
    for attempt in (1, 2):
        record = Record(tmp_path, attempt)
        record.event("attempt_started")
        if attempt == 1:
            record.event("hang", step=7, suspects=[1], reason="no progress for 30 s in step 7", stacks=[])
        judge(tmp_path, [Failure(0, "the process is gone", lost=True)], cpu=True)
    ends = [event for event in read_events(tmp_path) if event["event"] == "worker_lost"]
    assert [(end["rank"], end["kind"]) for end in ends] == [(1, "hang"), (0, "infrastructure")]
    assert ends[0]["reason"] == "no progress for 30 s in step 7"
    policies = [event["reason"] for event in read_events(tmp_path) if event["event"] == "policy"]
    assert "2 infrastructure failures (1 of them hung)" in policies[1]
