"""A replaced file is either the old or the new one, complete, private to its owner, and durable."""

import errno
import fcntl
import multiprocessing
import os
import signal

import pytest

from trainer.files.durable import replace_text, replacing


def test_a_reader_during_a_write_finds_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    replace_text(path, "old")
    with replacing(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text() == "old"
        file.write(b"w")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "state.json"
    replace_text(path, "old")

    def fail():
        with replacing(path) as file:
            file.write(b"ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_only_the_owner_has_access_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        replace_text(tmp_path / "state.json", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600


def test_file_is_synced_before_the_rename_and_folder_after(tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def renamed(source, target) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    replace_text(tmp_path / "state.json", "x")
    temporary = str(tmp_path / ".state.json.new")
    assert order == [temporary, "rename", str(tmp_path)]


def test_a_link_in_its_place_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "state.json").symlink_to(tmp_path / "other")
    replace_text(tmp_path / "state.json", "x")
    assert (tmp_path / "other").read_text() == "kept"
    assert not (tmp_path / "state.json").is_symlink()


def write_until_killed(path, ready):
    with replacing(path) as file:
        file.write(b"half of it, and more than the next one has")
        file.flush()
        ready.set()
        signal.pause()


@pytest.fixture
def writer(tmp_path):
    """A process that writes `state.json` until it is killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=write_until_killed, args=(tmp_path / "state.json", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_what_a_killed_writer_left_is_taken_over(tmp_path, writer):
    writer.kill()
    writer.join()
    assert os.listdir(tmp_path) == [".state.json.new"]
    replace_text(tmp_path / "state.json", "x")
    assert (tmp_path / "state.json").read_text() == "x"
    assert os.listdir(tmp_path) == ["state.json"]


def test_what_a_live_process_writes_is_left_alone(tmp_path, writer):
    replace_text(tmp_path / "state.json", "x")
    assert (tmp_path / "state.json").read_text() == "x"
    assert (tmp_path / ".state.json.new").read_text().startswith("half of it")
    assert set(os.listdir(tmp_path)) == {"state.json", ".state.json.new"}


def test_two_writers_of_one_file_at_once(tmp_path):
    path = tmp_path / "state.json"
    with replacing(path) as first:
        first.write(b"first")
        replace_text(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_file_that_has_been_moved_to_its_place_since_it_was_opened_is_not_written(tmp_path, monkeypatch):
    path, lock, others = tmp_path / "state.json", fcntl.flock, []

    def moved_before(descriptor, how):
        if not others:
            others.append("x")
            os.replace(tmp_path / ".state.json.new", path)
        lock(descriptor, how)

    (tmp_path / ".state.json.new").write_text("of the other")
    monkeypatch.setattr(fcntl, "flock", moved_before)
    with replacing(path) as file:
        assert path.read_text() == "of the other"
        file.write(b"x")
    assert path.read_text() == "x"
    assert os.listdir(tmp_path) == ["state.json"]


def test_where_nothing_can_be_locked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = [tmp_path / name for name in (".state.json.4711", ".state.json.4712", ".state.json.old", ".other.json.4711")]
    for path in left:
        path.write_text("half of it")
        os.utime(path, (1e9, 1e9))
    os.utime(left[1])  # somebody may still be writing it
    replace_text(tmp_path / "state.json", "x")
    assert (tmp_path / "state.json").read_text() == "x"
    assert set(os.listdir(tmp_path)) == {"state.json", *(path.name for path in left[1:])}


def test_a_hard_link_at_the_temporary_name_is_not_written_through(tmp_path):
    (tmp_path / "other").write_text("kept")
    os.link(tmp_path / "other", tmp_path / ".state.json.new")
    replace_text(tmp_path / "state.json", "x")
    assert (tmp_path / "other").read_text() == "kept"
    assert (tmp_path / "state.json").read_text() == "x"
