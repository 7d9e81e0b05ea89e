"""metrics.jsonl and events.jsonl: what is written is what is read, whatever was killed in between."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from trainer.record import lines as record_module
from trainer.record.lines import MetricsIndex, Record, in_use, pace, read_events, read_metrics, status_of, summary


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]

    class Clock:
        @staticmethod
        def time():
            now[0] += 1
            return now[0]

    monkeypatch.setattr(record_module, "time", Clock)
    return now


def steps(run_dir, evaluation=False):
    return [r["step"] for r in read_metrics(run_dir) if ("eval_loss" in r) == evaluation]


def test_numbers_come_back_exactly_and_non_finite_ones_as_null(tmp_path):
    values = {
        "step": np.int64(7),
        "loss": 0.1 + 0.2,
        "lr": np.float32(0.1),
        "grad_norm": math.nan,
        "z_loss": np.float32(math.inf),
        "expert_load": np.array([[0.25, math.nan]], np.float32),
        "skipped": np.bool_(True),
    }
    Record(tmp_path, 3).metrics(values)
    (read,) = read_metrics(tmp_path)
    assert read.pop("time") > 1.6e9
    assert read == {
        "step": 7,
        "attempt": 3,
        "loss": 0.1 + 0.2,
        "lr": float(np.float32(0.1)),
        "grad_norm": None,
        "z_loss": None,
        "expert_load": [[0.25, None]],
        "skipped": True,
    }


def test_torch_scalars_are_numbers_and_the_module_imports_no_torch(tmp_path):
    torch = pytest.importorskip("torch")
    Record(tmp_path, 1).metrics({"step": torch.tensor(1), "loss": torch.tensor(2.5), "expert_load": torch.ones(1, 2)})
    assert read_metrics(tmp_path)[0]["expert_load"] == [[1.0, 1.0]]
    heavy = "{'torch', 'mlflow', 'matplotlib'}"
    code = f"import sys, trainer.record.lines, trainer.tracking; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_what_cannot_be_recorded_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="object"):
        Record(tmp_path, 1).metrics({"step": 1, "loss": object()})
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_torn_last_line_is_left_out_and_the_next_writer_starts_afresh(tmp_path, cut):
    first = Record(tmp_path, 1)
    for step in (1, 2, 3):
        first.metrics({"step": step, "loss": 1.0 / step})
        first.event("checkpoint", step=step)
    whole = {}
    for name in ("metrics.jsonl", "events.jsonl"):
        path = tmp_path / name
        whole[name] = path.read_bytes().splitlines()
        path.write_bytes(path.read_bytes()[:-cut])
    read = steps(tmp_path)
    assert read == [1, 2]  # without its newline a line may still be on its way
    second = Record(tmp_path, 2)
    second.metrics({"step": 4, "loss": 0.5})
    second.event("checkpoint", step=4)
    kept = [1, 2, 3, 4] if cut == 1 else [1, 2, 4]
    assert steps(tmp_path) == kept
    assert [event["step"] for event in read_events(tmp_path)] == kept
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2] == whole["metrics.jsonl"][:2]


def test_lines_that_an_editor_ended_otherwise_are_read(tmp_path):
    record = Record(tmp_path, 1)
    for step in (1, 2):
        record.metrics({"step": step, "loss": 3.0 - step})
    record.event("rollback", to_step=1)
    record.close()
    before = read_metrics(tmp_path), read_events(tmp_path), summary(tmp_path)["step"]
    for name in ("metrics.jsonl", "events.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(before[0]) == len(before[1]) == 1
    assert (read_metrics(tmp_path), read_events(tmp_path), summary(tmp_path)["step"]) == before


def test_after_a_restart_the_later_attempt_counts(tmp_path):
    first, second = Record(tmp_path, 1), Record(tmp_path, 2)
    for step in range(1, 11):
        first.metrics({"step": step, "loss": 1.0})
        if step % 5 == 0:
            first.metrics({"step": step, "eval_loss": 1.0})
    for step in (6, 7):
        second.metrics({"step": step, "loss": 2.0})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(tmp_path, evaluation=True) == [5]
    assert [r["attempt"] for r in read_metrics(tmp_path) if "loss" in r] == [1] * 5 + [2] * 2


def test_a_rollback_undoes_later_records(tmp_path, clock):
    record = Record(tmp_path, 1)
    for step in range(1, 9):
        record.metrics({"step": step, "loss": float(step)})
    record.metrics({"step": 8, "eval_loss": 8.0})
    record.event("rollback", from_step=8, to_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4]  # also before anything is recorded in their place
    assert steps(tmp_path, evaluation=True) == []
    record.metrics({"step": 5, "loss": 50.0})
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 50]
    clock[0] = 0  # the next attempt runs on a machine whose clock is behind
    Record(tmp_path, 2).metrics({"step": 6, "loss": 60.0})
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 50, 60]


def test_evaluations_stand_beside_their_step_and_the_last_counts(tmp_path):
    record = Record(tmp_path, 1)
    for values in ({"loss": 3.0}, {"eval_loss": 4.0}, {"eval_loss": 5.0}):
        record.metrics({"step": 1, **values})
    assert [(r.get("loss"), r.get("eval_loss")) for r in read_metrics(tmp_path)] == [(3.0, None), (None, 5.0)]


def test_an_index_that_grows_sees_what_one_pass_sees(tmp_path):
    record, index = Record(tmp_path, 1), MetricsIndex(tmp_path)
    for step in (1, 2, 3, 2, 3, 4):
        record.metrics({"step": step, "loss": 1.0})
        index.update()
    assert list(index.read(index.lines)) == read_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "attempt": 1')
        file.flush()
        index.update()
        file.write(', "time": 1.5, "loss": 1}\n')
    index.update()
    assert [line.step for line in index.lines] == [1, 2, 3, 4, 5]


def test_a_launch_that_was_stopped_before_its_first_attempt_is_stopped(tmp_path):
    record = Record(tmp_path, 0)
    record.event("resolved")
    assert in_use(read_events(tmp_path))
    record.event("attempt_ended", status="STOPPED", reason="asked to", step=0)
    assert status_of(read_events(tmp_path)) == ("STOPPED", "asked to")
    assert not in_use(read_events(tmp_path))
    record.event("resolved")
    assert status_of(read_events(tmp_path)) == ("NEW", None)  # launched again


def test_summary(tmp_path, clock):
    assert summary(tmp_path)["status"] == "NEW"
    Record(tmp_path, 0).event("resolved")
    assert summary(tmp_path)["status"] == "NEW"
    first = Record(tmp_path, 1)
    first.event("attempt_started")
    assert summary(tmp_path)["status"] == "RUNNING"
    first.metrics({"step": 1, "loss": 3.0, "tokens": 10, "expert_load": [[0.1] * 64] * 300})
    first.metrics({"step": 1, "eval_loss": 3.5})
    first.metrics({"step": 2, "loss": 2.0, "tokens": 20, "expert_load": [[0.1] * 64] * 300})
    first.event("attempt_ended", status="STOPPED", reason="SIGTERM", step=2)  # 1003 to 1007
    first.event("config_changed")
    Record(tmp_path, 2).event("attempt_started")
    second = Record(tmp_path, 2)
    second.metrics({"step": 3, "loss": 1.0, "tokens": 30})
    found = summary(tmp_path)
    expected = {"status": "RUNNING", "step": 3, "loss": 1.0, "eval_loss": 3.5, "tokens": 30, "attempts": 2}
    assert found.items() >= expected.items()
    assert found["updated"] == clock[0]
    second.event("attempt_ended", status="FINISHED", reason="all steps done", step=3)
    assert summary(tmp_path)["status"] == "FINISHED"
    assert summary(tmp_path)["wall_time"] == 4 + 2


def test_a_process_that_is_gone_without_a_word_has_failed(tmp_path):
    code = "import sys; from trainer.record.lines import Record; Record(sys.argv[1], 1).event('attempt_started')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert summary(tmp_path)["status"] == "FAILED"
    event = json.loads((tmp_path / "events.jsonl").read_text()) | {"host": "elsewhere"}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert summary(tmp_path)["status"] == "RUNNING"  # of a process on another machine nothing is known


def test_lines_of_concurrent_writers_do_not_mix(tmp_path):
    code = (
        "import sys; from trainer.record.lines import Record; r = Record(sys.argv[1], int(sys.argv[2]))\n"
        "for i in range(300): r.event('checkpoint', step=i, pruned=['x' * 5000])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in (1, 2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(read_events(tmp_path)) == 600


def test_older_records_called_a_run_that_was_stopped_killed(tmp_path):
    record = Record(tmp_path, 1)
    record.event("attempt_started")
    record.event("attempt_ended", status="KILLED", reason="stopped by request", step=3)
    assert summary(tmp_path)["status"] == "STOPPED"
    assert read_events(tmp_path)[-1]["status"] == "STOPPED"


def test_the_recent_pace_of_a_run(tmp_path):
    assert pace(tmp_path) is None
    record = Record(tmp_path, 1)
    record.metrics({"step": 1, "loss": 1.0}, at=0.0)
    assert pace(tmp_path) is None
    for step in range(2, 300):
        record.metrics({"step": step, "loss": 1.0}, at=1000.0 + 2.0 * step)
    assert pace(tmp_path) == pytest.approx(2.0)
    record = Record(tmp_path, 2)
    record.metrics({"step": 250, "loss": 1.0}, at=9000.0)
    assert pace(tmp_path) is None  # of this attempt nothing is known yet
    record.metrics({"step": 260, "loss": 1.0}, at=9005.0)  # train.log_every=10
    assert pace(tmp_path) == pytest.approx(0.5)
