"""A replaced file is either the old or the new one, complete, private to its owner, and durable."""

import os

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
    temporary = str(tmp_path / f".state.json.{os.getpid()}")
    assert order == [temporary, "rename", str(tmp_path)]


def test_a_link_in_its_place_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "state.json").symlink_to(tmp_path / "other")
    replace_text(tmp_path / "state.json", "x")
    assert (tmp_path / "other").read_text() == "kept"
    assert not (tmp_path / "state.json").is_symlink()
