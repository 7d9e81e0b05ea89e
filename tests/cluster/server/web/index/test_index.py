"""The rows of many runs: always those of the records as they are, and read only where something has changed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from dashboards import write_run

from cluster.server.web.index import runs_index
from cluster.server.web.index.config_values import Configs, flat_config
from cluster.server.web.index.kept_rows import KEPT
from cluster.server.web.index.rows import refresh
from cluster.server.web.index.runs_index import TURNS, RunsIndex
from configs import flatten, load, preset_names, to_yaml
from configs.reading.parse import parse_yaml
from trainer.record.lines import Record, summary


@pytest.fixture
def root(tmp_path):
    for name in ("a", "b", "c"):
        write_run(tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.fixture
def read(monkeypatch):
    """The runs whose record was read."""
    names = []
    monkeypatch.setattr(runs_index, "refresh", lambda run, *more: (names.append(run.id), refresh(run, *more))[1])
    return names


def looked(index):
    """All that is found once every run has had its turn."""
    return set().union(*(index.look(patience=60.0) for _ in range(TURNS)))


def rows(index):
    return {entry.row.id: entry.row for entry in index.view.entries}


def test_a_new_server_reads_no_record_that_has_not_changed(root, read):
    first = RunsIndex([root])
    assert looked(first) == {"a", "b", "c"}
    del read[:]
    second = RunsIndex([root])
    assert looked(second) == {"a", "b", "c"}
    assert read == []
    assert rows(second) == rows(first)
    for mine, theirs in zip(first.view.entries, second.view.entries, strict=True):
        assert flat_config(mine.config) == flat_config(theirs.config)
        assert mine.metrics == theirs.metrics
    assert looked(second) == set()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 1}', b"\xff" * 9, "shape", "row", "link"])
def test_a_damaged_file_of_rows_is_as_none(root, read, damage, tmp_path):
    first = RunsIndex([root])
    looked(first)
    kept = root / KEPT
    if isinstance(damage, bytes):
        kept.write_bytes(damage)
    elif damage == "link":
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    else:
        tree = json.loads(kept.read_text())
        if damage == "shape":
            tree["sections"][0][0] = 9999
        else:
            tree["runs"]["a"]["row"]["step"] = "x"
        kept.write_text(json.dumps(tree))
    second = RunsIndex([root])
    del read[:]
    looked(second)
    assert sorted(read) == ["a", "b", "c"]
    assert rows(second) == rows(first)


def test_what_has_changed_is_read(root, read):
    index = RunsIndex([root])
    looked(index)
    del read[:]
    record = Record(root / "a", 2)
    record.event("attempt_started")
    record.metrics({"step": 5, "loss": 9.0, "tokens": 40})
    assert looked(index) == {"a"}
    assert (rows(index)["a"].status, rows(index)["a"].loss, rows(index)["a"].attempts) == ("RUNNING", 9.0, 2)
    record.metrics({"step": 6, "loss": 8.0, "tokens": 48})
    record.metrics({"step": 6, "eval_loss": 7.0})
    record.event("attempt_ended", status="STOPPED", reason="asked", step=6)
    record.close()
    assert looked(index) == {"a"}
    row = rows(index)["a"]
    assert {key: getattr(row, key) for key in summary(root / "a")} == summary(root / "a")
    assert set(read) == {"a"}
    (root / "b" / "config.yaml").write_text("train: {steps: 77}")
    assert looked(index) == {"b"}
    assert rows(index)["b"].steps == 77


def test_a_run_that_somebody_waits_for_is_read_first(root, read):
    index = RunsIndex([root])
    index.look(patience=0.0)
    assert (read, index.view.left) == ([], 3)
    assert index.read_next("b")
    assert not index.read_next("none")
    index.look(patience=60.0)
    assert read[0] == "b"
    assert not index.read_next("b")


def test_runs_come_and_go(root):
    index = RunsIndex([root])
    looked(index)
    write_run(root / "d")
    (root / "later").mkdir()
    assert looked(index) == {"d"}
    shutil.rmtree(root / "a")
    write_run(root / "later")
    assert looked(index) == {"a", "later"}
    assert rows(index).keys() == {"b", "c", "d", "later"}
    assert index.find("a") is None


def test_they_stand_in_the_order_in_which_they_began(root):
    index = RunsIndex([root])
    looked(index)
    write_run(root / "0")
    looked(index)
    assert [entry.row.id for entry in index.view.entries] == ["a", "b", "c", "0"]


def test_a_run_that_is_killed_has_failed_though_no_file_changes(root):
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; from pathlib import Path; from dashboards import write_run\n"
        "write_run(Path(sys.argv[1]), status=None); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root / "x"), *sys.path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    index = RunsIndex([root])
    looked(index)
    assert rows(index)["x"].status == "RUNNING"
    process.kill()
    process.wait()
    assert index.look() == {"x"}
    assert rows(index)["x"].status == "FAILED"


def test_the_curve_and_pace_of_a_live_run_follow_its_record(root):
    run = write_run(root / "live", 300, of=2000, status=None)
    index = RunsIndex([root])
    looked(index)
    record = Record(run, 1)
    for step in range(301, 1201):
        record.metrics({"step": step, "loss": float(step)}, at=2e9 + step / 2)
        if step % 7 == 0:
            index.look()
    index.look()
    entry = index.find("live")
    steps = [step for step, _ in entry.run.live.spark]
    assert steps == sorted(steps)
    assert 50 <= len(steps) < 120
    assert steps[0] <= 60
    assert steps[-1] == entry.row.step == 1200
    assert entry.run.pace() == pytest.approx(0.5)
    record.metrics({"step": 600, "loss": 1.0})  # it went back
    index.look()
    assert [step for step, _ in index.find("live").run.live.spark][-1] == 600
    record.close()


def test_trials_of_sweeps_and_several_roots(tmp_path, root):
    sweep = root / "sweep"
    for name in ("small", "large"):
        write_run(sweep / "trials" / name)
    (sweep / "plan.json").write_text("{}")
    other = tmp_path / "other"
    write_run(other / "a")
    index = RunsIndex([root, other])
    looked(index)
    found = rows(index)
    assert found.keys() == {"a", "b", "c", "sweep:small", "sweep:large", "other:a"}
    assert (found["sweep:small"].name, found["sweep:small"].sweep) == ("small", "sweep")
    write_run(sweep / "trials" / "new")
    assert looked(index) == {"sweep:new"}


def test_a_root_that_cannot_be_written(root, monkeypatch):
    monkeypatch.setattr(
        "cluster.server.web.index.kept_rows.replace_text", lambda *_: (_ for _ in ()).throw(PermissionError("no"))
    )
    index = RunsIndex([root])
    assert looked(index) == {"a", "b", "c"}
    index.keep()
    assert not os.path.exists(root / KEPT)


def flat_by_yaml(text):
    def walk(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(parse_yaml(text), ""))


@pytest.mark.parametrize("preset", preset_names())
def test_a_config_in_sections_is_the_config(tmp_path, preset):
    path = tmp_path / "config.yaml"
    text = to_yaml(load(preset))
    path.write_text(text)
    configs = Configs()
    assert flat_config(configs.read(path)) == flat_by_yaml(text)
    assert flat_config(configs.read(path)) == flat_config(configs.read(path))
    known = flatten(load(preset))
    assert {key: value for key, value in flat_config(configs.read(path)).items() if value != {}} == known


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {c: [1, 2]}\n", "a: &x {b: 1}\nc: *x\n", "a: |\n  b: 1\n  c\nd: 2\n", 'a: "x\n\n  b: 1"\nc: 2\n',
        "# a\na:\n- 1\n- b: 2\nc:\n  d:\n    e: x\n", "a: 'x\n  y'\nb: >\n  z\n", "---\na: 1\n", "a: {}\nb: []\n", "",
        '"a": 1\nb: 2\n', "1: 2\n",
    ],
)  # fmt: skip
def test_any_yaml_in_sections_is_that_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    try:
        known = flat_by_yaml(text) if text else {}
    except ValueError:
        with pytest.raises(ValueError, match="key"):
            Configs().read(path)
        return
    assert flat_config(Configs().read(path)) == known
