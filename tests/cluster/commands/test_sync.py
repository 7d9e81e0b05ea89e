"""`muster sync` sends what a tracker is missing, and says how much, or why it cannot; `muster status`."""

import json

import pytest
from ranks import free_port
from tracker import assert_all_shown, shown

from configs import from_dict, to_yaml
from trainer.record.lines import Record
from trainer.tracking import shipper


@pytest.fixture
def make_run(tmp_path, quiet_shipper):
    def make(name: str, steps: int, **tracking):
        run_dir = tmp_path / name
        record = Record(run_dir, 1)
        (run_dir / "config.yaml").write_text(to_yaml(from_dict({"run": {"name": name}, "tracking": tracking})))
        record.event("attempt_started")
        for step in range(1, steps + 1):
            record.metrics({"step": step, "loss": 1.0 / step, "tokens": 8 * step})
        record.metrics({"step": steps, "eval_loss": 0.5, "eval_tokens": 4})
        return run_dir, record

    return make


def test_it_sends_what_is_missing_and_says_how_much(muster, make_run, tmp_path):
    run_dir, record = make_run("run", 30)
    root = ("--root", str(tmp_path))
    assert muster("sync", "run", *root) == (0, "run: sent 31 records and 2 files\n", "")
    for step in range(31, 41):
        record.metrics({"step": step, "loss": 1.0 / step, "tokens": 8 * step})
    record.event("attempt_ended", status="FINISHED", reason="reached train.steps", step=40)
    assert muster("sync", "run", *root) == (0, "run: sent 10 records and 2 files\n", "")
    run = assert_all_shown(tmp_path, run_dir)
    assert run.info.status == "FINISHED"

    told = "run: no record or file was missing; its note, tags and description are up to date\n"
    assert muster("sync", str(run_dir)) == (0, told, "")
    again = assert_all_shown(tmp_path, run_dir)
    assert (again.info.run_id, again.data.tags) == (run.info.run_id, run.data.tags)

    code, _, err = muster("sync", "rum", *root)
    assert code == 2
    assert "did you mean run?" in err


def test_a_tracker_that_is_down_is_named_and_synced_later(muster, make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(shipper, "FIRST_BACKOFF", 0.05)
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_dir, record = make_run("run", 9)
    record.event("attempt_ended", status="STOPPED", reason="stopped by request", step=9)
    root = ("--root", str(tmp_path))
    code, out, err = muster("sync", "run", *root, "--wait", "0.1")
    assert (code, out) == (1, "")
    now, at_the_end, then = err.splitlines()
    assert now.startswith(f"cannot send to {uri}: ")
    assert at_the_end.startswith(f"muster: 10 records and the end of the run are not sent to {uri}: ")
    assert then == "Run `muster sync run` again to send the rest"
    assert f"tracking: 10 records and the end of the run are not sent to {uri}" in muster("status", "run", *root)[1]
    assert json.loads(muster("status", "run", *root, "--json")[1])["tracking"] in at_the_end

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert muster("sync", "run", *root)[:2] == (0, "run: sent 10 records and 3 files\n")
    assert shown(tmp_path, run_dir)[0].info.status == "KILLED"
    assert "tracking:" not in muster("status", "run", *root)[1]


def test_status_names_failures_decisions_and_slow_ranks(muster, make_run, tmp_path):
    run_dir, record = make_run("run", 60)
    record.event("straggler", step=50, rank=1, host="node-1", times_median=2.5, steps=50)
    for attempt in (1, 2):
        record = Record(run_dir, attempt)
        record.event("hang", step=61, phase="step", suspects=[1], reason="no progress for 60 s in step 61", stacks=[])
        record.event("policy", action="retry" if attempt == 1 else "stop", reason="word " * 200, failures=attempt)
    code, out, _ = muster("status", "run", "--root", str(tmp_path))
    assert code == 0
    lines = out.splitlines()
    assert lines[1].startswith("policy: stop: word word")
    assert lines[1].endswith("... (attempt 2, 0 s ago, 2 in all)")
    assert lines[2].startswith("hang: no progress for 60 s in step 61 (attempt 2, ")
    assert lines[3] == "straggler: rank 1 on node-1 2.50x its peers' median own time, at step 50 (attempt 1, 0 s ago)"
    found = json.loads(muster("status", "run", "--root", str(tmp_path), "--json")[1])
    assert {kind: each["times"] for kind, each in found["notable"].items()} == {"policy": 2, "hang": 2, "straggler": 1}
