"""The colours of runs: unlike their neighbours', and the same for ever."""

import os
import shutil

import pytest
from dashboards import write_run

from cluster.server.web.index.colours import COLOUR
from cluster.server.web.index.kept_rows import KEPT
from cluster.server.web.index.runs_index import RunsIndex
from trainer.record.lines import Record


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def colours(root):
    """Of each run in the order in which they began, as a new server sees them."""
    index = RunsIndex([root])
    for _ in range(3):
        index.look(patience=60.0)
    index.keep()
    return {entry.row.id: entry.row.colour for entry in index.view.entries}


def test_neighbours_differ_and_nothing_changes_a_colour(root):
    for number in range(9):
        write_run(root / f"run-{number}", 1)
    first = colours(root)
    values = list(first.values())
    assert set(values) == {1, 2, 3, 4, 5, 6}
    assert all(len(set(values[at : at + 3])) == 3 for at in range(len(values) - 2))
    (root / KEPT).unlink()
    shutil.rmtree(root / "run-0")
    shutil.rmtree(root / "run-4")
    write_run(root / "run-9", 1)
    later = colours(root)
    assert {id: later[id] for id in first.keys() & later.keys()} == {
        id: first[id] for id in later.keys() & first.keys()
    }
    values = list(later.values())
    assert values[-1] not in values[-3:-1]
    assert colours(root) == later


def test_a_run_that_goes_on_keeps_its_colour(root):
    for number in range(3):
        run = write_run(root / f"run-{number}", 1, status=None)
    index = RunsIndex([root])
    index.look()
    before = index.find("run-2")
    record = Record(run, 1)
    record.metrics({"step": 2, "loss": 0.5, "tokens": 16})
    record.close()
    index.look()
    after = index.find("run-2")
    assert (before.row.step, after.row.step) == (1, 2)
    assert before.row.colour == after.row.colour != 0


def test_two_servers_agree(root):
    for number in range(4):
        write_run(root / f"run-{number}", 1)
    first, second = RunsIndex([root]), RunsIndex([root])
    first.look()
    shutil.rmtree(root / "run-0")
    (root / KEPT).unlink(missing_ok=True)
    second.look()
    kept = {number: int((root / f"run-{number}" / COLOUR).read_text()) for number in (1, 2, 3)}
    for index in (first, second):
        assert {number: index.find(f"run-{number}").row.colour for number in kept} == kept


def test_nothing_is_read_or_written_elsewhere(root, tmp_path):
    runs = [write_run(root / f"run-{number}", 1) for number in range(5)]
    (tmp_path / "other").write_text("5 is another's")
    (runs[0] / COLOUR).symlink_to(tmp_path / "other")
    os.link(tmp_path / "other", runs[1] / COLOUR)
    os.mkfifo(runs[2] / COLOUR)
    (runs[3] / COLOUR).write_text("7")
    (runs[4] / COLOUR).write_bytes(b"")
    found = colours(root)
    assert sorted(found.values()) == [1, 2, 3, 4, 5]
    assert (tmp_path / "other").read_text() == "5 is another's"
    for run in runs:
        assert (run / COLOUR).read_text() == f"{found[run.name]}\n"
        assert not (run / COLOUR).is_symlink()


def test_the_folder_of_another_user_is_left_alone(root, monkeypatch):
    run = write_run(root / "run", 1)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert colours(root) == {"run": 1}
    assert not (run / COLOUR).exists()
