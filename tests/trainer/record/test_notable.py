"""A run's notable events are in MLflow's tags, once for each kind, even if they are sent again."""

import json
from pathlib import Path

import pytest
from tracker import kept_files, shown

from configs import from_dict, to_yaml
from trainer.record.lines import Record, read_events
from trainer.record.notable import LONGEST, notable
from trainer.tracking.shipper import ship

pytestmark = pytest.mark.usefixtures("quiet_shipper")


def start(run_dir: Path, attempt: int) -> Record:
    record = Record(run_dir, attempt)
    if attempt == 1:
        run_dir.joinpath("config.yaml").write_text(to_yaml(from_dict({"run": {"name": run_dir.name}})))
        record.event("resolved")
    record.event("attempt_started", git_commit="c0ffee", git_dirty=True)
    record.metrics({"step": 10 * attempt, "loss": 1.0, "tokens": 8})
    return record


def fail(record: Record, reason: str, action: str) -> None:
    record.event("worker_lost", rank=1, kind="infrastructure", step=12, reason=reason, traceback="")
    record.event("policy", action=action, reason="1 infrastructure failure, cluster.max_failures is 3", failures=1)


def slow(record: Record, step: int, *ranks: int, name: str = "straggler") -> None:
    for rank in ranks:
        measured = {"times_median": 1.25 + rank, "steps": 50} if name == "straggler" else {}
        record.event(name, step=step, rank=rank, host=f"node-{rank}", **measured)


def told(run_dir: Path) -> dict[str, tuple[int, int, str]]:
    return {kind: (each.times, each.attempt, each.text) for kind, each in notable(read_events(run_dir)).items()}


def test_each_kind_by_its_last_with_its_count(tmp_path):
    record = start(tmp_path, 1)
    assert told(tmp_path) == {}
    slow(record, 50, 1, 3)
    slow(record, 100, 3, name="straggler_recovered")
    record.event("experts_collapsed", step=120, experts={"0": [1, 2], "4": [7]}, collapsed=3)
    record.event("experts_recovered", step=130, experts={"4": [7]}, collapsed=2)
    record.event("spike", step=131, cursor=9, loss=8.25, deviations=6.125)
    fail(record, "the process is gone", "retry")
    record = start(tmp_path, 2)
    record.event("hang", step=14, phase="step", suspects=[0], reason="no progress for 60 s in step 14", stacks=[])
    fail(record, "no progress", "stop")
    assert told(tmp_path) == {
        "policy": (2, 2, "stop: 1 infrastructure failure, cluster.max_failures is 3"),
        "hang": (1, 2, "no progress for 60 s in step 14"),
        "worker_lost": (2, 2, "rank 1, after step 12: no progress"),
        "straggler": (2, 1, "rank 1 on node-1 2.25x its peers' median own time, at step 100"),
        "experts_collapsed": (
            1, 1, "2 collapsed after step 130, where these receive tokens again: layer 4: 7",
        ),
        "spike": (1, 1, "step 131: cursor 9, loss 8.25, deviations 6.125"),
    }  # fmt: skip
    slow(record, 50, 2)
    assert told(tmp_path)["straggler"] == (3, 2, "rank 2 on node-2 3.25x its peers' median own time, at step 50")
    slow(record, 100, 2, name="straggler_recovered")
    assert told(tmp_path)["straggler"] == (3, 2, "none since step 100; the last was rank 2 on node-2")


def test_an_event_without_a_text_of_its_own():
    event = {"time": 1.0, "attempt": 1, "event": "not_written", "files": ["a"], "seconds": 2.0}
    assert notable([event])["not_written"].text == "files ['a'], seconds 2"
    assert notable([event | {"reason": "the disk is full"}])["not_written"].text == "the disk is full"


def test_machines_that_passed_preflight_are_not_notable():
    event = {"time": 1.0, "attempt": 1, "event": "preflight", "broken": [], "slow": [], "machines": [{"host": "a"}]}
    assert notable([event]) == {}
    bad = event | {"broken": ["node-3: wrong products"], "slow": ["node-1: link at 0.3 of its peers' median"]}
    assert notable([event, bad, event])["preflight"].times == 1
    assert notable([bad])["preflight"].text == "node-3: wrong products; node-1: link at 0.3 of its peers' median"


def test_mlflow_shows_them_once_after_every_attempt(tmp_path):
    """Sent after each attempt, sent again, and sent by a process that knows nothing of the first."""
    run_dir = tmp_path / "run"
    record = start(run_dir, 1)
    fail(record, "gone " * 2000, "retry")
    assert ship(run_dir).missing is None
    tags = shown(tmp_path, run_dir)[0].data.tags
    assert tags["muster.policy"].startswith(
        "retry: 1 infrastructure failure, cluster.max_failures is 3 (1 in all, the "
    )
    assert len(tags["muster.worker_lost"]) < LONGEST + 100
    assert (tags["mlflow.source.git.commit"], tags["mlflow.source.git.dirty"]) == ("c0ffee", "True")

    record = start(run_dir, 2)
    slow(record, 50, 1)
    fail(record, "again", "stop")
    (run_dir / "stacks").mkdir()
    (run_dir / "stacks" / "attempt-02-rank-0000.txt").write_text("here")
    (run_dir / "stacks" / "attempt-02-rank-0001.txt").touch()
    record.event("attempt_ended", status="FAILED", reason="x" * 20_000, step=20)
    assert ship(run_dir).missing is None
    run, points = shown(tmp_path, run_dir)
    always = ("muster.key", "muster.status")
    own = {key: value for key, value in run.data.tags.items() if key.startswith("muster.") and key not in always}
    assert set(own) == {"muster.policy", "muster.worker_lost", "muster.straggler"}
    assert "stop: " in own["muster.policy"]
    assert "(2 in all, the last in attempt 2, " in own["muster.policy"]
    assert run.data.tags["reason"] == "x" * 8000  # MLflow's own bound
    assert {name for name in kept_files(run) if name.startswith("stacks")} == {"stacks/attempt-02-rank-0000.txt"}

    done = ship(run_dir)
    assert (done.records, done.files) == (0, 0)
    (run_dir / "tracking.json").unlink()
    assert ship(run_dir).records == 0
    again, points_again = shown(tmp_path, run_dir)
    assert (again.data.tags, points_again) == (run.data.tags, points)


def test_events_are_there_while_it_trains(tmp_path):
    run_dir = tmp_path / "run"
    record = start(run_dir, 1)
    slow(record, 50, 1)
    assert ship(run_dir).missing is None
    slow(record, 100, 2)
    assert ship(run_dir).files == 1
    run, _ = shown(tmp_path, run_dir)
    assert run.info.status == "RUNNING"
    assert "rank 1 on node-1 2.25x, rank 2 on node-2 3.25x" in run.data.tags["muster.straggler"]
    lines = kept_files(run)["events.jsonl"].read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines][-2:] == ["straggler", "straggler"]
