"""Work in processes of its own: kept by what it rests on, one at a time, ended with the server."""

import os
import time

import pytest

from cluster.server.web.heavy import MOST_WAITING, Heavy

ECHO = "json.tool"
"""Writes the JSON that it reads."""


@pytest.fixture
def heavy():
    found = Heavy()
    yield found
    found.close()


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """A module that says which process it is, and waits."""
    (tmp_path / "sleeper.py").write_text(
        "import json, os, sys, time\nopen(json.load(sys.stdin), 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), path])))
    return "sleeper"


def until(done):
    end = time.monotonic() + 60
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def known(heavy, *asked):
    return until(lambda: (found := heavy.ask(*asked)).working is False and found)


def test_an_answer_is_kept_as_long_as_it_rests_on_the_same(heavy):
    assert heavy.ask("a", 1, ECHO, {"x": 1}) == (None, None, True)
    first = known(heavy, "a", 1, ECHO, {"x": 1})
    assert first.found == {"x": 1}
    assert heavy.ask("a", 1, ECHO, {"x": "nobody reads this"}) == first
    before = heavy.ask("a", 2, ECHO, {"x": 2})
    assert before == (first.found, first.at, True), "what was known is there until the new one is"
    assert known(heavy, "a", 2, ECHO, {"x": 2}).found == {"x": 2}


def test_what_fails_says_why_and_the_next_goes_on(heavy):
    assert "No module named no_such_module" in known(heavy, "a", 1, "no_such_module", {}).found["error"]
    assert known(heavy, "b", 1, ECHO, {"x": 3}).found == {"x": 3}


def test_one_at_a_time_and_no_endless_queue(heavy, sleeper, tmp_path):
    heavy.ask("busy", 1, sleeper, str(tmp_path / "pid"))
    until((tmp_path / "pid").exists)
    for number in range(MOST_WAITING):
        assert heavy.ask(number, 1, ECHO, {}).working
    assert heavy.ask(0, 2, ECHO, {}).working, "it takes the turn of the one that waits"
    assert "try again" in heavy.ask("one more", 1, ECHO, {}).found["error"]


def test_what_works_ends_with_the_server(heavy, sleeper, tmp_path):
    heavy.ask("busy", 1, sleeper, str(tmp_path / "pid"))
    pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    heavy.close()
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    assert heavy.ask("a", 1, ECHO, {}).working
    assert heavy._waiting == {}
