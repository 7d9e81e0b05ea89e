"""`muster runs rm`, `note`, `tag`: confirmation, refusals, and that nothing outside the run's folder is touched."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.commands import keep
from configs import ConfigError, from_dict, to_yaml
from trainer.record.lines import Record
from trainer.run.folder import run_lock
from trainer.run.notes import NOTES, Notes, read_notes, write_notes
from trainer.tracking.shipper import only_one

ROOT = Path(__file__).parents[3]


def make_run(root: Path, name: str, status: str = "FINISHED") -> Path:
    run_dir = root / name
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(from_dict({})))
    record = Record(run_dir, 1)
    record.event("attempt_started")
    if status:
        record.event("attempt_ended", status=status, step=1)
    record.close()
    return run_dir


def test_rm_deletes_the_named_runs(muster, tmp_path):
    one, two, three = (make_run(tmp_path, name) for name in ("one", "two", "three"))
    code, _, err = muster("runs", "rm", "one", "--root", str(tmp_path))
    assert (code, one.exists()) == (2, True)
    assert "--yes" in err
    assert "3 files" in err
    code, _, err = muster("runs", "rm", "one", "nosuch", "--yes", "--root", str(tmp_path))
    assert (code, one.exists()) == (2, True)  # all or none
    assert muster("runs", "rm", "one", str(two), "--yes", "--root", str(tmp_path))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["three"]
    assert muster("runs", "--root", str(tmp_path), "rm", "three", "-y")[0] == 0  # the root may stand before it
    assert not three.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "there"), [("y\n", False), ("n\n", True)])
def test_rm_asks_on_a_terminal(tmp_path, answer, there):
    run_dir = make_run(tmp_path, "one")
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    command = [sys.executable, "-P", "-m", "cluster.cli", "runs", "rm", "one", "--root", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdin=theirs, env=environment, capture_output=True, text=True, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert "Delete" in done.stdout
    assert run_dir.exists() is there


def refuses(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        keep.remove([name], yes=True, root=tmp_path)
    assert (tmp_path / name).exists()


def test_rm_refuses_a_run_in_training(tmp_path):
    make_run(tmp_path, "trains", status="")
    refuses(tmp_path, "trains", f"process {os.getpid()} on")
    held = make_run(tmp_path, "held")
    with run_lock(held):
        refuses(tmp_path, "held", "is being trained by")
    with only_one(held, 0.0):
        refuses(tmp_path, "held", "is being sent")
    starts = make_run(tmp_path, "starts")
    Record(starts, 1).event("resolved")
    refuses(tmp_path, "starts", "is being trained by")
    Record(starts, 1).event("worker_failed", rank=0, step=1, reason="x")
    refuses(tmp_path, "starts", "is being trained by")  # its supervisor is deciding what to do
    Record(starts, 1).event("policy", action="stop", reason="twice")
    keep.remove(["starts"], yes=True, root=tmp_path)
    assert not starts.exists()


def test_rm_follows_no_link_and_takes_no_other_folder(tmp_path):
    elsewhere = make_run(tmp_path / "elsewhere", "one")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(elsewhere)
    refuses(root, "link", "is a link to")
    inner = make_run(root, "inner")
    (inner / "checkpoints" / "out").symlink_to(elsewhere)
    keep.remove(["inner"], yes=True, root=root)
    assert not inner.exists()
    assert (elsewhere / "config.yaml").exists()
    (root / "project").mkdir()
    (root / "project" / "config.yaml").write_text("base: quickstart")
    refuses(root, "project", "is not a run's folder")


def test_notes_and_tags_are_kept_and_listed(muster, tmp_path):
    run_dir = make_run(tmp_path, "one")
    assert muster("runs", "note", "one", "for the paper", "--root", str(tmp_path))[:2] == (0, "noted\n")
    assert muster("runs", "tag", "one", "project=a b", "who=me", "--root", str(tmp_path))[0] == 0
    assert muster("runs", "tag", "one", "who=", "--root", str(tmp_path))[0] == 0
    assert muster("runs", "tag", "one", "--root", str(tmp_path))[1] == "project=a b\n"
    assert muster("runs", "note", "one", "--root", str(tmp_path))[1] == "for the paper\n"
    assert "project=a b for the paper" in muster("runs", "--root", str(tmp_path))[1]
    [listed] = json.loads(muster("runs", "--root", str(tmp_path), "--json")[1])
    assert (listed["note"], listed["tags"]) == ("for the paper", {"project": "a b"})
    assert muster("runs", "note", "one", "", "--root", str(tmp_path))[0] == 0
    assert read_notes(run_dir) == Notes("", {"project": "a b"})


@pytest.mark.parametrize("tag", ["novalue", "=x", "mlflow.note.content=x", "reason=x", "a/b=x", "k=" + "v" * 2000])
def test_an_invalid_tag_is_refused(muster, tmp_path, tag):
    run_dir = make_run(tmp_path, "one")
    code, _, err = muster("runs", "tag", "one", "good=1", tag, "--root", str(tmp_path))
    assert (code, read_notes(run_dir).tags) == (2, {})
    assert err.startswith("muster: ")


def test_notes_are_not_written_through_links_and_damaged_ones_are_ignored(tmp_path):
    run_dir, secret = make_run(tmp_path, "one"), tmp_path / "secret"
    secret.write_text('{"note": "of another file"}')
    (run_dir / NOTES).symlink_to(secret)
    assert read_notes(run_dir) == Notes()
    with pytest.raises(ConfigError, match="is a link"):
        write_notes(run_dir, Notes("x"))
    assert "another" in secret.read_text()
    (run_dir / NOTES).unlink()
    for text in ("[", "[]", '{"note": 1, "tags": []}', "x" * (1 << 20), '{"tags": {"reason": "r", "n": 1}}'):
        (run_dir / NOTES).write_text(text)
        assert read_notes(run_dir) == Notes()
    (run_dir / NOTES).unlink()
    os.mkfifo(run_dir / NOTES)
    assert read_notes(run_dir) == Notes()
