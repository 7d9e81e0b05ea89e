"""Runs of strangers: texts stay texts, no path leads out of a root, what is broken is shown as far as it goes."""

import json
import os
import shutil
from urllib.parse import quote

import pytest
from dashboards import serving, write_run

from trainer.record.lines import Record
from trainer.run.notes import Notes, write_notes

SECRET = "a secret outside of the roots"
TEXTS = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "ansi": "\x1b[31mred\x1b[0m\x07",
    "bidi": "gnp.\u202eexe\u2066",
    "c1": "\x9b31m\x85",
    "halves": "\ud800 and \udfff",
    "quotes": "\"';--\\ ${7*7} {{7*7}} %s \n",
}
PAGES = ("", "/series?metric=loss", "/experts", "/log", "/events", "/stacks")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path / "runs"


@pytest.fixture
def dashboard(root):
    with serving([root]) as server:
        yield server


def whole(dashboard, id):
    """Everything that is told of a run."""
    answers = [dashboard.get(f"/api/runs/{quote(id, safe='')}{page}") for page in PAGES]
    answers += [dashboard.get("/api/runs"), dashboard.get("/api/now"), dashboard.get("/metrics")]
    answers.append(dashboard.get(f"/api/compare?run={quote(id, safe='')}"))
    assert [answer.status for answer in answers] == [200] * len(answers)
    return "\n".join(answer.body.decode("ascii" if answer.headers["content-type"][-4:] == "json" else "utf-8")
                     for answer in answers)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_are_texts(root, dashboard, text):
    """JSON of plain text without a control character; what makes it safe on the page is that it stays text there."""
    run = write_run(root / "run", status=None, of=9)
    record = Record(run, 1)
    record.event("failure", reason=text, traceback=text, step=2)
    record.event("straggler", rank=0, host=text, step=3, times_median=2.0)
    record.event("config_changed", changed={text: [text, text]})
    record.event("attempt_ended", status="FAILED", reason=text, step=4)
    record.close()
    write_notes(run, Notes(text.replace("\ud800", "").replace("\udfff", ""), {"project": text}))
    (run / "config.yaml").write_text(json.dumps({"train": {"steps": 9, "x": text}, "model": {text: 1}}))
    for folder, name in (("samples", "step-00000004.txt"), ("logs", "attempt-01-rank-0000.log")):
        (run / folder).mkdir()
        (run / folder / name).write_bytes(text.encode(errors="surrogatepass"))
    dashboard.look()
    told = json.loads(dashboard.get("/api/runs/run").body)
    for found in (whole(dashboard, "run"), json.dumps(told, ensure_ascii=False)):
        assert not any(c in found for c in "\x1b\x07\x9b\x85\u202e\u2066\ud800\udfff")
    assert told["row"]["status"] == "FAILED"
    answer = dashboard.get("/api/runs/run")
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "name",
    [
        b"<b>x<b>", b"a b", b"a%2fb", b"x..", b"a\xff\xfe", b"\x1b[31m", "\u202eb".encode(), b"a:b", b"?a=1#b", b"'\"`",
        b"x" * 200, b"-", b"con",
    ],
)  # fmt: skip
def test_folders_with_any_name_are_found_by_their_ids(root, dashboard, name):
    shutil.copytree(write_run(root / "plain"), root / os.fsdecode(name))
    rows = dashboard.rows()
    (id,) = rows.keys() - {"plain"}
    assert id.isprintable()
    assert json.loads(dashboard.get(f"/api/runs/{quote(id, safe='')}").body)["row"]["id"] == id
    assert SECRET not in whole(dashboard, id)


@pytest.mark.parametrize(
    "id",
    [
        "..", "../secret", "..%2fsecret", "%2e%2e%2fsecret", "%252e%252e%252fsecret", "a/../../secret", "a%00", "%ff",
        "/etc/passwd", "%2fetc%2fpasswd", "C:%5c", ".", "", "data", ".dashboard.json", "a%0d%0aset-cookie:x",
    ],
)  # fmt: skip
def test_no_path_leads_out(root, dashboard, id):
    write_run(root / "a")
    (root / "data").mkdir()
    (root / "data" / "x.txt").write_text(SECRET)
    dashboard.look()
    for page in PAGES:
        answer = dashboard.get(f"/api/runs/{id}{page}")
        assert answer.status in (400, 404, 307)
        assert SECRET.encode() not in answer.body
        assert b"root:" not in answer.body
        assert "set-cookie" not in answer.headers


def test_static_files_are_those_of_the_front_end(dashboard):
    for name in ("../auth.py", "..%2fauth.py", "%2e%2e/auth.py", "js/../../auth.py", "/etc/passwd", ".", ""):
        assert dashboard.get(f"/static/{name}").status == 404


def test_no_link_is_followed(tmp_path, root, dashboard):
    outside = write_run(tmp_path / "outside", loss=77.0)
    (outside / "notes.json").write_text(json.dumps({"note": SECRET}))
    (root / "linked").symlink_to(outside)
    for name in ("events.jsonl", "metrics.jsonl", "notes.json"):
        run = write_run(root / name.replace(".", "-"))
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
    run = write_run(root / "config-yaml")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(tmp_path / "secret")
    for folder, name in (
        ("logs", "attempt-01-rank-0000.log"),
        ("samples", "step-00000004.txt"),
        ("stacks", "attempt-1-rank-0.txt"),
    ):
        run = write_run(root / f"{folder}-linked")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(SECRET)
        (run / folder).symlink_to(tmp_path / folder)
        run = write_run(root / f"{folder}-file")
        (run / folder).mkdir()
        (run / folder / name).symlink_to(tmp_path / "secret")
    rows = dashboard.rows()
    assert "linked" not in rows
    for id in rows:
        for page in (*PAGES, "/samples/4.png"):
            body = dashboard.get(f"/api/runs/{id}{page}").body
            assert SECRET.encode() not in body
            assert b"77.0" not in body
    assert all(row["note"] == "" for row in rows.values())


def test_a_pipe_is_not_waited_for(root, dashboard):
    run = write_run(root / "run")
    for name in ("notes.json", "stop"):
        os.mkfifo(run / name)
    (run / "logs").mkdir()
    os.mkfifo(run / "logs" / "attempt-01-rank-0000.log")
    assert dashboard.rows()["run"]["status"] == "FINISHED"
    assert dashboard.get("/api/runs/run/log").json["text"] == ""
    (run / "events.jsonl").unlink()
    os.mkfifo(run / "events.jsonl")
    assert dashboard.rows()["run"]["status"] == "UNREADABLE"
    assert dashboard.get("/api/runs/run").json["problems"] != []
    assert "cannot be read" in dashboard.get("/api/now").body.decode()


DAMAGE = {
    "torn": lambda run: os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 20),
    "torn events": lambda run: os.truncate(run / "events.jsonl", (run / "events.jsonl").stat().st_size - 9),
    "empty": lambda run: [os.truncate(run / name, 0) for name in ("events.jsonl", "metrics.jsonl")],
    "no events": lambda run: (run / "events.jsonl").unlink(),
    "no metrics": lambda run: (run / "metrics.jsonl").unlink(),
    "no yaml": lambda run: (run / "config.yaml").write_text("a: [1,\n b: }"),
    "not a mapping": lambda run: (run / "config.yaml").write_text("- 1"),
    "aliases": lambda run: (run / "config.yaml").write_text(
        "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n"
    ),
    "bytes": lambda run: [
        (run / name).write_bytes(bytes(range(256)) * 40) for name in ("events.jsonl", "metrics.jsonl")
    ],
    "nested": lambda run: (run / "metrics.jsonl").write_bytes(
        b'{"step": 1, "attempt": 1, "time": 1.0, "a": ' + b"[" * 9000
    ),
    "odd": lambda run: (run / "metrics.jsonl").write_text(
        '{"step": 1, "attempt": 1, "time": 1.0, "loss": NaN}\n'
        '{"step": 2, "attempt": 1, "time": 2.0, "loss": null, "expert_load": [[null, "x"], 3], "rank_time": [null]}\n'
        '{"step": 3, "attempt": 1, "time": 3.0, "loss": 1e999, "big": 1' + "0" * 400 + "}\n"
        '{"step": 4, "attempt": 1, "time": 4.0, "loss": 2.5, "a\\u0000b": 1, "__proto__": 2, "expert_load": []}\n'
    ),
    "state": lambda run: (run / "tracking.json").write_text('{"uri": "javascript:alert(1)", "run_id": 3, "error": {}}'),
    "older": lambda run: (run / "events.jsonl").write_text(
        '{"time": 5.0, "attempt": 1, "event": "attempt_started"}\n'
        '{"time": 6.0, "attempt": 1, "event": "unknown", "x": {}}\n'
        '{"time": 9.0, "attempt": 1, "event": "attempt_ended", "status": "KILLED"}\n'
    ),
    "odd fields": lambda run: (run / "events.jsonl").write_text(
        '{"time": 5.0, "attempt": 1, "event": "resolved", "derived": 3, "command": [1]}\n'
        '{"time": 5.0, "attempt": 1, "event": "attempt_started", "versions": 3, "inputs": [{"profile": [1]}, {}]}\n'
        '{"time": 5.0, "attempt": 1, "event": "plan", "parameters": "x", "memory": [], "flops_per_token": "x"}\n'
        '{"time": 5.0, "attempt": 1, "event": "measured", "peak_memory": "x", "step_time": {}}\n'
        '{"time": 6.0, "attempt": 1, "event": "evaluation"}\n'
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_broken_is_shown_as_far_as_it_goes(root, dashboard, damage):
    write_run(root / "sound")
    run = write_run(root / "run", loss=lambda step: float("nan") if step == 2 else 1.0)
    damage(run)
    rows = dashboard.rows()
    assert rows["sound"]["status"] == "FINISHED"
    told = whole(dashboard, "run")
    assert "javascript:" not in told
    assert "NaN" not in told.partition("# HELP")[0]
    assert "Infinity" not in told
    assert dashboard.get("/api/columns?key=metric:loss:best&key=metric:loss&key=train.steps").status == 200


def test_a_run_that_is_deleted_while_it_is_open(root, dashboard):
    write_run(root / "a")
    write_run(root / "b")
    dashboard.look()
    assert dashboard.get("/api/runs/a").status == 200
    shutil.rmtree(root / "a")
    for page in PAGES:
        assert dashboard.get(f"/api/runs/a{page}").status in (200, 404)
    assert dashboard.post("/api/runs/a/note", {"note": "x"}).status == 409
    assert not (root / "a").exists()
    assert dashboard.rows().keys() == {"b"}
    assert dashboard.get("/api/runs/a").status == 404


def test_nothing_is_written_through_a_link(tmp_path, root, dashboard):
    run = write_run(root / "run", status=None)
    target = tmp_path / "target"
    dashboard.look()
    (run / "stop").symlink_to(target)
    assert dashboard.post("/api/runs/run/stop", {}).status == 200
    assert not (run / "stop").is_symlink()
    (run / "stop").unlink()
    (run / "more").symlink_to(target)
    assert dashboard.post("/api/runs/run/note", {"note": "x"}).status == 409
    (run / "more").unlink()
    run.rename(tmp_path / "moved")
    run.symlink_to(tmp_path / "moved")
    for what, body in (("stop", {}), ("note", {"note": "x"}), ("tags", {"tags": ["x"]})):
        assert dashboard.post(f"/api/runs/run/{what}", body).status == 409
    assert not target.exists()
    assert not (tmp_path / "moved" / "stop").exists()
    assert dashboard.rows() == {}
