"""What the API tells of runs that were really trained, and what it does to them."""

import gzip
import json
import math
import shutil
import threading
import time

import numpy as np
import pytest
from dashboards import serving, write_run
from support import tiny, train_in_process

from cluster.server.web.pages import columns_of_runs, details
from trainer.record.goodput import goodput, productive, total
from trainer.record.lines import Record, read_events, read_metrics, summary
from trainer.run.folder import prepare_run

STEPS = 8


def config_of(root, data, name, **train):
    sections = {"run": {"name": name, "root": str(root)}, "data": {"path": str(data)}, "checkpoint": {"every": 4}}
    return tiny(**sections, train={"steps": STEPS, "eval_every": 4, "sample_tokens": 4} | train)


@pytest.fixture(scope="module")
def trained(root, tiny_data):
    run_dir = prepare_run(config_of(root, tiny_data, "trained"))
    assert train_in_process(run_dir) == 0
    (run_dir / "logs").mkdir()  # as `trainer.processes.output` does, which is not asked here
    (run_dir / "logs" / "attempt-01-rank-0000.log").write_text("first line\n2026-11-27 host pid 7\nlast line\n")
    return run_dir


@pytest.fixture(scope="module")
def dashboard(root, trained):
    write_run(root / "failed", 3, status="FAILED", of=9, lr=0.5)
    with serving([root]) as server:
        server.look()
        yield server


def test_the_row_is_that_of_muster_runs(dashboard, trained):
    row = dashboard.rows()["trained"]
    known = summary(trained)
    assert {key: row[key] for key in known} == known
    assert (row["steps"], row["family"], row["data"], row["attempts"]) == (STEPS, "decoder", "prepared", 1)
    plan = next(event for event in read_events(trained) if event["event"] == "plan")
    assert row["parameters"] == plan["parameters"]
    assert row["started"] <= read_events(trained)[0]["time"]


def test_a_table_that_is_as_it_was_is_not_sent_again(dashboard):
    first = dashboard.get("/api/runs")
    again = dashboard.get("/api/runs", if_none_match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    plain = dashboard.get("/api/runs/trained")
    packed = dashboard.get("/api/runs/trained", accept_encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body


def test_curves_are_the_record(dashboard, trained):
    told = dashboard.get("/api/runs/trained/series?metric=loss&metric=eval_loss&metric=nothing").json
    records = read_metrics(trained)
    for name in ("loss", "eval_loss"):
        own = [record for record in records if name in record]
        line = told["metrics"][name]
        assert line["x"] == [record["step"] for record in own]
        assert line["y"] == [record[name] for record in own]
        assert line["last"] == [own[-1]["step"], own[-1][name]]
    assert told["metrics"]["nothing"] == {"x": [], "y": [], "last": None, "n": 0, "infinite": []}
    part = dashboard.get("/api/runs/trained/series?metric=loss&from=3&to=5").json["metrics"]["loss"]
    assert part["x"] == [3, 4, 5]


def test_curves_over_other_axes(dashboard, trained):
    records = [record for record in read_metrics(trained) if "loss" in record]
    evaluated = [record for record in read_metrics(trained) if "eval_loss" in record]
    flops = next(event for event in read_events(trained) if event["event"] == "plan")["flops_per_token"]
    tokens = {record["step"]: record["tokens"] for record in records}

    def x(axis, metric="loss"):
        return dashboard.get(f"/api/runs/trained/series?metric={metric}&x={axis}").json["metrics"][metric]["x"]

    assert x("examples") == [record["sequences"] for record in records]
    assert x("tokens") == [record["tokens"] for record in records]
    assert x("tokens", "eval_loss") == [tokens[record["step"]] for record in evaluated]
    assert x("flops") == pytest.approx([flops * record["tokens"] for record in records])
    assert x("time") == pytest.approx([record["time"] - records[0]["time"] for record in records])
    assert dashboard.get("/api/runs/trained/series?metric=loss&x=moon").status == 400
    answer = dashboard.get("/api/runs/failed/series?metric=loss&x=flops")
    assert (answer.status, "FLOPs" in answer.json["error"]) == (400, True)


def test_lists_have_curves_of_what_they_come_to(dashboard, trained):
    names = dashboard.get("/api/runs/trained").json["metrics"]
    assert {"loss", "eval_loss", "router_entropy.mean", "router_entropy.min"} <= set(names)
    line = dashboard.get("/api/runs/trained/series?metric=router_entropy.mean").json["metrics"]["router_entropy.mean"]
    own = [record for record in read_metrics(trained) if "router_entropy" in record]
    assert line["y"] == pytest.approx([float(np.mean(record["router_entropy"])) for record in own])


def test_the_load_of_experts(dashboard, trained):
    known = dashboard.get("/api/runs/trained").json["experts"]
    assert known == {"layers": 2, "experts": 4}
    records = [record for record in read_metrics(trained) if "expert_load" in record]
    told = dashboard.get("/api/runs/trained/experts?layer=1").json
    assert told["steps"] == [record["step"] for record in records]
    for expert, row in enumerate(told["load"]):
        assert row == pytest.approx([4 * record["expert_load"][1][expert] for record in records])
    assert dashboard.get("/api/runs/trained/experts?layer=7").json["load"] == []


def test_a_run_whole(dashboard, trained):
    told = dashboard.get("/api/runs/trained").json
    events = read_events(trained)
    assert told["config"]["train.steps"] == STEPS
    assert told["config"]["parallel.dp"] == 1
    assert told["header"]["parameters"] == next(e for e in events if e["event"] == "plan")["parameters"]
    assert (told["header"]["device"], told["header"]["world_size"]) == ("cpu", 1)
    (attempt,) = told["attempts"]
    assert (attempt["n"], attempt["status"], attempt["to_step"]) == (1, "FINISHED", STEPS)
    marks = [(mark["kind"], mark["step"]) for mark in told["marks"]]
    assert {("checkpoint", 4), ("checkpoint", 8), ("evaluation", 4)} <= set(marks)
    books = goodput(trained)
    assert told["goodput"]["fraction"] == pytest.approx(productive(total(books)))
    assert sum(seconds for _, seconds in told["goodput"]["parts"]) == pytest.approx(sum(total(books).values()))
    assert dashboard.get("/api/runs/trained/goodput").json == told["goodput"]
    measured = next(event for event in events if event["event"] == "measured")
    rows = {row["what"]: row for row in told["planned"]}
    assert rows["step time"]["measured"] == measured["step_time"]
    assert rows["peak memory"]["planned"] == measured["predicted_peak_memory"]
    assert [sample["step"] for sample in told["samples"]] == [4, 8]
    assert told["ranks"] == [0]
    assert {"config.yaml", "metrics.jsonl", "logs/attempt-01-rank-0000.log"} <= {file["name"] for file in told["files"]}
    assert told["references"]["unigram_entropy"] > 1
    assert told["problems"] == []


def test_links_to_the_run_in_mlflow_and_to_ray(dashboard, root, monkeypatch):
    run = write_run(root / "linked", 1)
    state = {"uri": "https://user:secret@tracker.example/mlflow/", "run_id": "0f" * 16, "experiment_id": "12"}

    def links():
        tracking = dashboard.get("/api/runs/linked").json["tracking"]
        return tracking["mlflow"], tracking["ray"]

    (run / "tracking.json").write_text(json.dumps(state))
    dashboard.look()
    assert links() == (f"https://tracker.example/mlflow/#/experiments/12/runs/{'0f' * 16}", None)
    monkeypatch.setenv("RAY_ADDRESS", "http://head.example:8265")
    (run / "tracking.json").write_text(json.dumps(state | {"experiment_id": "../x"}))
    assert links() == ("https://tracker.example/mlflow/", "http://head.example:8265")
    monkeypatch.setenv("RAY_ADDRESS", "javascript:alert(1)")
    (run / "tracking.json").write_text(json.dumps(state | {"uri": "sqlite:///runs/mlflow.db"}))
    assert links() == (None, None)
    shutil.rmtree(run)
    dashboard.look()


def test_logs_and_their_search(dashboard, trained):
    whole = (trained / "logs" / "attempt-01-rank-0000.log").read_text()
    assert dashboard.get("/api/runs/trained/log").json["text"] == whole
    end = dashboard.get("/api/runs/trained/log?tail=9").json
    assert (end["text"], end["truncated"]) == (whole[-9:], True)
    found = dashboard.get("/api/runs/trained/log?search=PID").json["text"]
    assert found.splitlines() == [line for line in whole.splitlines() if "pid" in line.lower()]
    assert found
    assert dashboard.get("/api/runs/trained/log?rank=7").json["attempt"] is None


def test_events(dashboard, trained):
    events = read_events(trained)
    told = dashboard.get("/api/runs/trained/events").json
    assert [event["event"] for event in told["events"]] == [event["event"] for event in events]
    later = dashboard.get(f"/api/runs/trained/events?after={len(events) - 2}").json
    assert (later["events"], later["next"]) == (told["events"][-2:], len(events))


def test_keys_and_columns(dashboard, trained):
    keys = dashboard.get("/api/keys").json
    assert {"optim.lr", "train.steps", "parallel.zero_stage"} <= set(keys["keys"])
    assert {"loss", "eval_loss", "grad_norm"} <= set(keys["metrics"])
    asked = (
        "key=optim.lr&key=nothing&key=metric:loss&key=metric:loss:best&key=metric:loss:mean10&key=metric:grad_norm:best"
        "&key=metric:loss:mean3&key=metric:loss:max&key=metric:loss:mean0&key=metric:loss:mean&key=metric:loss:mean10000"
    )
    whole = dashboard.get(f"/api/columns?{asked}").json
    assert (whole["ids"], whole["gone"], whole["late"]) == (None, [], 0)
    told = whole["columns"]
    order = dashboard.get("/api/runs").json["columns"]["id"]
    mine, other = order.index("trained"), order.index("failed")
    losses = [record["loss"] for record in read_metrics(trained) if "loss" in record]
    assert told["optim.lr"][other] == 0.5
    assert told["nothing"] == [None, None]
    assert told["metric:loss"][mine] == losses[-1]
    assert told["metric:loss:best"][mine] == min(losses)
    assert told["metric:loss:mean10"][mine] == pytest.approx(np.mean(losses[-10:]))
    assert told["metric:loss:mean3"][mine] == pytest.approx(np.mean(losses[-3:]))
    assert told["metric:loss:max"][mine] == max(losses)
    for unknown in ("mean0", "mean", "mean10000"):
        assert told[f"metric:loss:{unknown}"] == [None, None]
    assert told["metric:grad_norm:best"][other] is None
    one = dashboard.get(f"/api/columns?{asked}&run=failed").json
    assert (one["ids"], one["columns"]) == (["failed"], {key: [values[other]] for key, values in told.items()})
    none = dashboard.get(f"/api/columns?{asked}&since={whole['version']}").json
    assert (none["ids"], none["columns"]) == ([], {key: [] for key in told})


def test_columns_of_what_has_changed(tmp_path, monkeypatch):
    for number in range(5):
        write_run(tmp_path / f"run-{number}", lr=0.1 * number)
    with serving([tmp_path]) as server:
        server.look()
        asked = "/api/columns?key=optim.lr&key=metric:loss:best"
        before = server.get(asked).json
        assert before["columns"]["optim.lr"] == [0.1 * number for number in range(5)]
        shutil.rmtree(tmp_path / "run-1")
        write_run(tmp_path / "new", lr=7.0)
        record = Record(tmp_path / "run-3", 1)
        record.metrics({"step": 5, "loss": 0.01})
        record.close()
        server.look()
        after = server.get(f"{asked}&since={before['version']}").json
        values = dict(zip(after["ids"], zip(*after["columns"].values(), strict=True), strict=True))
        assert values == {"new": (7.0, 0.25), "run-3": (pytest.approx(0.3), 0.01)}
        assert after["gone"] == ["run-1"]
        assert after["version"] == server.get("/api/runs").json["version"]
        for unknown in ("x", before["version"] + "9"):
            assert server.get(f"{asked}&since={unknown}").json["ids"] is None
        monkeypatch.setattr(columns_of_runs, "PATIENCE", -1.0)
        late = server.get("/api/columns?key=metric:loss:max").json
        assert (late["columns"]["metric:loss:max"], late["late"]) == ([None] * 5, 5)


def test_comparison(dashboard):
    told = dashboard.get("/api/compare?run=trained&run=failed&metric=loss&x=tokens").json
    assert list(told["runs"]) == ["trained", "failed"]
    assert told["runs"]["failed"]["y"] == [1.0, 1 / 2, 1 / 3]
    differs = {row["key"]: row["values"] for row in told["differs"]}
    assert differs["train.steps"] == [STEPS, 9]
    assert "model.family" not in differs
    assert dashboard.get("/api/compare?run=trained&run=nothing").status == 404
    assert dashboard.get("/api/compare?run=trained&run=failed&x=flops").json["without"] == ["failed"]


def test_now_says_what_needs_a_person(dashboard, root):
    told = dashboard.get("/api/now").json
    failed = [problem for problem in told["problems"] if problem["run"] == "failed"]
    assert [(each["level"], each["what"], each["why"]) for each in failed] == [
        ("failed", "failed at step 3", "why failed ended")
    ]
    assert {row["id"] for row in told["ended"]} == {"trained", "failed"}
    assert told["disks"][0]["total"] > told["disks"][0]["free"] > 0
    assert told["goodput"]["seconds"] == pytest.approx(sum(seconds for _, seconds in told["goodput"]["parts"]))


def test_notes_and_tags(dashboard, trained):
    assert dashboard.post("/api/runs/trained/note", {"note": "the <b>first</b>"}).status == 200
    assert dashboard.post("/api/runs/trained/tags", {"tags": ["project=x", "kept"]}).status == 200
    row = dashboard.rows()["trained"]
    assert (row["note"], row["tags"]) == ("the <b>first</b>", ["project=x", "kept"])
    dashboard.post("/api/runs/trained/tags", {"tags": ["kept"]})
    assert dashboard.rows()["trained"]["tags"] == ["kept"]
    for tags in (["status=x"], ["a" * 200], ["=x"], ["a" * 3000], ["x"] * 51, "x", [1]):
        assert dashboard.post("/api/runs/trained/tags", {"tags": tags}).status in (400, 409)
    assert dashboard.post("/api/runs/trained/note", {"note": "x" * 6000}).status == 400
    assert dashboard.post("/api/runs/trained/note", {"note": "x", "more": 1}).status == 400
    assert dashboard.rows()["trained"]["tags"] == ["kept"]


def test_a_run_is_stopped_after_a_checkpoint(dashboard, root, tiny_data):
    """And it is live until then: its row, its curve and what Prometheus is told grow."""
    assert dashboard.post("/api/runs/trained/stop", {}).status == 409
    run_dir = prepare_run(config_of(root, tiny_data, "live", steps=100_000, eval_every=0, sample_tokens=0))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train_in_process(run_dir)))
    thread.start()
    try:
        until = time.monotonic() + 120
        while not (row := dashboard.rows().get("live", {"step": 0}))["step"] > 2:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.1)
        assert row["status"] == "RUNNING"
        now = dashboard.get("/api/now").json["running"]
        assert [each["id"] for each in now] == ["live"]
        assert now[0]["left"] > 0
        assert all(math.isfinite(loss) for loss in now[0]["spark"])
        text = dashboard.get("/metrics").body.decode()
        assert 'muster_run_step{run="live"}' in text
        assert 'muster_run_rate{run="live",unit="tokens"}' in text
        assert 'muster_runs{status="RUNNING"} 1' in text
    finally:
        assert dashboard.post("/api/runs/live/stop", {}).status == 200
        thread.join(60)
    assert codes == [75]
    row = dashboard.rows()["live"]
    assert row["status"] == "STOPPED"
    checkpoints = [event["step"] for event in read_events(run_dir) if event["event"] == "checkpoint"]
    assert checkpoints[-1] == row["step"]
    told = dashboard.get("/api/runs/live/series?metric=loss").json["metrics"]["loss"]
    assert told["last"][0] == row["step"]


def test_three_thousand_metrics_are_listed_and_each_has_its_curve(dashboard, root, monkeypatch):
    """Those too that are in hardly any record, and those that began late; what is left out is said."""
    record = Record(write_run(root / "wide", 30, of=60), 2)
    for step in range(31, 61):
        more = {f"metric_{number}": float(step * number) for number in range(2998)}
        record.metrics({"step": step, "loss": 1.0 / step} | more | ({"once": 7.0} if step == 33 else {}))
    record.close()
    dashboard.look()
    told = dashboard.get("/api/runs/wide").json
    assert set(told["metrics"]) > {"loss", "once", *(f"metric_{number}" for number in range(2998))}
    curves = dashboard.get("/api/runs/wide/series?metric=metric_2997&metric=once&metric=loss").json["metrics"]
    assert curves["metric_2997"]["x"] == list(range(31, 61))
    assert curves["metric_2997"]["last"] == [60.0, 60.0 * 2997]
    assert (curves["once"]["x"], curves["once"]["y"]) == ([33.0], [7.0])
    assert told["problems"] == []
    named = len(told["metrics"])
    monkeypatch.setattr(details, "MOST_NAMES", 2000)
    told = dashboard.get("/api/runs/wide").json
    assert len(told["metrics"]) == 2000
    assert told["problems"] == [f"{named - 2000:,} more metrics than the 2,000 that are read"]
