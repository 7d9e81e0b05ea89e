"""Pages are told what has changed: soon, at most once a second, all of them, and a slow one holds up nobody."""

import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from dashboards import TOKEN, serving, write_run

from cluster.server.web import changes
from trainer.record.lines import Record


@pytest.fixture
def dashboard(tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "EVERY", 0.05)
    monkeypatch.setattr(changes, "AT_MOST_EVERY", 0.05)
    monkeypatch.setattr(changes, "HEARTBEAT", 0.2)
    for name in ("a", "b"):
        write_run(tmp_path / name, status=None, of=1000)
    with serving([tmp_path]) as server:
        server.look()
        yield server


class Page:
    """A connection that listens."""

    def __init__(self, dashboard):
        self.socket = socket.create_connection(("127.0.0.1", dashboard.port), 20)
        asked = f"GET /api/changes HTTP/1.1\r\nhost: {dashboard.host}\r\nauthorization: Bearer {TOKEN}\r\n\r\n"
        self.socket.sendall(asked.encode())
        self.told = b""

    def until(self, text):
        while text not in self.told:
            got = self.socket.recv(65536)
            assert got, self.told
            self.told += got
        found, self.told = self.told, b""
        return found

    def __enter__(self):
        self.until(b"retry:")
        return self

    def __exit__(self, *_):
        self.socket.close()


def test_a_change_is_told_to_every_page(dashboard, tmp_path):
    with Page(dashboard) as one, Page(dashboard) as two:
        record = Record(tmp_path / "a", 1)
        record.metrics({"step": 5, "loss": 3.0})
        for page in (one, two):
            assert b'event: changed\ndata: {"runs": ["a"]}\n\n' in page.until(b"changed")
        one.until(b": still here")
        assert dashboard.get("/api/runs").json["columns"]["loss"][0] == 3.0
        dashboard.post("/api/runs/b/note", {"note": "x"})
        assert b'["b"]' in two.until(b"changed")
        record.close()


def test_messages_are_put_together(dashboard, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "AT_MOST_EVERY", 0.5)
    with Page(dashboard) as page:
        record = Record(tmp_path / "a", 1)
        began = time.monotonic()
        for step in range(5, 30):
            record.metrics({"step": step, "loss": 3.0})
            time.sleep(0.02)
        record.close()
        while dashboard.get("/api/runs").json["columns"]["step"][0] < 29:
            time.sleep(0.02)
        page.until(b"changed")
        rest = page.until(b": still here")  # which is sent when there is nothing to tell
        assert 1 + rest.count(b"event: changed") <= 2 + (time.monotonic() - began) / 0.5


def test_a_page_that_does_not_read_holds_up_nobody_and_is_let_go(dashboard, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "PATIENCE", 0.3)
    feed = dashboard.app.state.changes
    slow = Page(dashboard)
    slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    with Page(dashboard) as quick:
        until = time.monotonic() + 30
        while len(feed._listeners) > 1:  # it is let go once its buffers are full
            feed.tell_soon({f"run-{number:0>900}" for number in range(900)})
            quick.until(b"changed")
            assert time.monotonic() < until
        assert dashboard.get("/health").status == 200
        record = Record(tmp_path / "a", 1)
        record.metrics({"step": 5, "loss": 3.0})
        quick.until(b'"a"')
        record.close()
    slow.socket.close()


def test_pages_that_leave_are_forgotten(dashboard):
    feed = dashboard.app.state.changes
    pages = [Page(dashboard).__enter__() for _ in range(5)]
    assert len(feed._listeners) == 5
    for page in pages:
        page.socket.close()
    until = time.monotonic() + 10
    while feed._listeners:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_hundred_at_once(dashboard):
    """They are answered, all the same, by a server with a bounded number of threads."""
    paths = ["/api/runs", "/api/now", "/api/runs/a", "/api/runs/a/series?metric=loss"]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda number: dashboard.get(paths[number % len(paths)]), range(200)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for number, answer in enumerate(answers) if number % len(paths) == 3}) == 1
    assert threading.active_count() < 100


def merged(table, answer):
    """The table of a page that takes an answer in, as static/js/api.js does."""
    changed = answer["columns"]
    gone = {*answer["gone"], *changed["id"]}
    kept = [place for place, id in enumerate(table["id"]) if id not in gone]
    rows = {
        place: {name: values[number] for name, values in changed.items()}
        for number, place in enumerate(answer["places"])
    }
    others = iter(kept)
    for place in range(answer["count"]):
        if place not in rows:
            old = next(others)
            rows[place] = {name: values[old] for name, values in table.items()}
    assert next(others, None) is None
    return {name: [rows[place][name] for place in range(answer["count"])] for name in table}


def test_of_a_table_only_what_has_changed_is_sent(dashboard, tmp_path):
    for name in "cdefghi":
        write_run(tmp_path / name)
    dashboard.look()
    first = dashboard.get("/api/runs").json
    table, version = first["columns"], first["version"]
    assert "places" not in first
    record = Record(tmp_path / "b", 1)
    record.metrics({"step": 5, "loss": 3.0})
    dashboard.look()
    answer = dashboard.get(f"/api/runs?since={version}").json
    assert (answer["columns"]["id"], answer["places"], answer["gone"]) == (["b"], [table["id"].index("b")], [])
    table = merged(table, answer)
    write_run(tmp_path / "0")
    dashboard.look()
    shutil.rmtree(tmp_path / "c")
    dashboard.look()
    for since, before in ((answer["version"], table), (version, first["columns"])):
        later = dashboard.get(f"/api/runs?since={since}").json
        assert later["gone"] == ["c"]
        assert len(later["places"]) < 3
        assert merged(before, later) == dashboard.get("/api/runs").json["columns"]
    same = dashboard.get(f"/api/runs?since={later['version']}").json
    assert (same["places"], same["gone"], same["columns"]["id"]) == ([], [], [])
    assert dashboard.get("/api/runs?since=of-another-server").json == dashboard.get("/api/runs").json
    record.close()


def test_a_client_that_reads_no_answer_holds_up_nobody(dashboard, tmp_path):
    """Nor do a hundred of them, for which there is no thread each."""
    write_run(tmp_path / "long", 3000, **{f"metric_{number}": float(number) for number in range(3)})
    dashboard.look()
    metrics = "&".join(f"metric=metric_{number}" for number in range(3))
    path = f"/api/runs/long/series?{metrics}&points=5000"
    whole = dashboard.get(path)
    assert len(whole.body) > 100_000
    asked = f"GET {path} HTTP/1.1\r\nhost: {dashboard.host}\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
    before = threading.active_count()
    slow = []
    for _ in range(100):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", dashboard.port))
        client.sendall(asked)
        slow.append(client)
    assert dashboard.get("/api/runs").status == 200
    assert dashboard.get(path).body == whole.body
    assert threading.active_count() < before + 50  # those that Starlette has for all requests
    told = b""
    while not told.endswith(whole.body[-20:]):  # it is still sent whole to one that begins to read
        told += slow[0].recv(1 << 16)
    assert told.endswith(whole.body)
    for client in slow:
        client.close()
