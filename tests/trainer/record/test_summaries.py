"""The rows of many runs: kept from one look to the next, and never those of a record that has changed since."""

import json
import os
import subprocess
import sys

import pytest

from trainer.record import summaries as module
from trainer.record.lines import Record, summary
from trainer.record.summaries import KEPT, summaries


def ended(run_dir, steps=3):
    record = Record(run_dir, 1)
    record.event("attempt_started")
    for step in range(1, steps + 1):
        record.metrics({"step": step, "loss": 1.0 / step, "tokens": 8 * step})
    record.metrics({"step": steps, "eval_loss": 2.0})
    record.event("attempt_ended", status="FINISHED", reason="reached train.steps", step=steps)
    record.close()


@pytest.fixture
def folders(tmp_path):
    found = [tmp_path / name for name in ("a", "b", "never-began")]
    for folder in found[:2]:
        ended(folder)
    found[2].mkdir()
    return found


@pytest.fixture
def read(monkeypatch):
    """The runs whose record was read."""
    names = []
    monkeypatch.setattr(module, "summary", lambda folder: (names.append(folder.name), summary(folder))[1])
    return names


def test_a_record_that_is_as_it_was_is_not_read_again(tmp_path, folders, read):
    rows = summaries(tmp_path, folders)
    assert rows == [summary(folder) for folder in folders]
    assert read == ["a", "b", "never-began"]
    assert summaries(tmp_path, folders) == rows
    assert read == ["a", "b", "never-began"]


@pytest.mark.parametrize("grown", ["metrics", "event", "lost", "replaced"])
def test_a_record_that_has_changed_is(tmp_path, folders, read, grown):
    summaries(tmp_path, folders)
    record = Record(folders[0], 2)
    if grown == "metrics":
        record.metrics({"step": 4, "loss": 9.0})
    elif grown == "event":
        record.event("attempt_ended", status="FAILED", reason="x", step=3)
    elif grown == "lost":  # with the machine, after it had been listed
        os.truncate(folders[0] / "metrics.jsonl", 90)
    else:
        data = (folders[0] / "metrics.jsonl").read_bytes()
        (folders[0] / "metrics.jsonl").write_bytes(data.replace(b'"loss": 1.0', b'"loss": 7.0'))
    del read[:]
    assert summaries(tmp_path, folders) == [summary(folder) for folder in folders]
    assert read == ["a"]


def test_a_run_in_training_is_looked_at_each_time(tmp_path, read):
    """Its process may be killed without a word, and nothing of its files changes."""
    code = "import sys, time; from trainer.record.lines import Record; Record(sys.argv[1], 1).event('attempt_started')"
    process = subprocess.Popen([sys.executable, "-c", code + "; print(flush=True); time.sleep(60)", tmp_path / "run"],
                               stdout=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    assert summaries(tmp_path, [tmp_path / "run"])[0]["status"] == "RUNNING"
    process.kill()
    process.wait()
    assert summaries(tmp_path, [tmp_path / "run"])[0]["status"] == "FAILED"
    assert read == ["run", "run"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": {"signature": [1, 2, 3, 4], "row": {"name": 3}}}', b"\xff" * 9]
)
def test_a_damaged_file_is_as_none(tmp_path, folders, content):
    (tmp_path / KEPT).write_bytes(content)
    assert summaries(tmp_path, folders) == [summary(folder) for folder in folders]
    assert json.loads((tmp_path / KEPT).read_bytes()).keys() == {"a", "b", "never-began"}


def test_a_folder_that_cannot_be_written_and_no_link_is_followed(tmp_path, folders, monkeypatch):
    (tmp_path / f".{KEPT}.new").symlink_to(tmp_path / "target")
    assert len(summaries(tmp_path, folders)) == 3
    assert not (tmp_path / "target").exists()
    (tmp_path / KEPT).unlink(missing_ok=True)
    monkeypatch.setattr(module, "replace_text", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert len(summaries(tmp_path, folders)) == 3


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path, folders, capsys):
    (folders[0] / "events.jsonl").unlink()
    (folders[0] / "events.jsonl").symlink_to(folders[1] / "events.jsonl")
    assert [row["name"] for row in summaries(tmp_path, folders)] == ["b", "never-began"]
    assert "a/events.jsonl: " in capsys.readouterr().err
