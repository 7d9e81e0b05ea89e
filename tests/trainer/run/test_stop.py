"""Requests to stop a run, by its user and by muster itself."""

import errno
import os

import pytest

from trainer.run.stop import request_stop, stop_requested, take_stop


@pytest.fixture(params=["links", "no links"])
def folder(request, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)
    return tmp_path


def test_the_users_request_overrules_and_is_not_overwritten(folder):
    request_stop(folder, "growing")
    request_stop(folder)
    request_stop(folder, "a machine will go")
    assert stop_requested(folder)
    assert take_stop(folder) == ""
    assert take_stop(folder) is None
    assert not list(folder.iterdir())


def test_the_first_of_our_own_requests_stays(folder):
    request_stop(folder, "growing")
    request_stop(folder, "a machine will go")
    assert take_stop(folder) == "growing"
    assert not list(folder.iterdir())


def test_a_long_reason_is_cut_between_characters(folder):
    request_stop(folder, "x" + "é" * 5000)
    assert take_stop(folder) == "x" + "é" * 2047


def test_a_link_is_the_users_request_and_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("a word")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").symlink_to(tmp_path / "secret")
    assert take_stop(tmp_path / "run") == ""
    assert not stop_requested(tmp_path / "run")
    assert (tmp_path / "secret").read_text() == "a word"
