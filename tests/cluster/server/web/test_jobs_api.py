"""The queue's part of the API, over HTTP: many clients, slow clients, output piece by piece, what the pages show."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dashboards import TOKEN, serving, write_run
from hostile_messages import GOOD, submit, zipped
from queues import Queue

from cluster.gangs.ray_nodes import Machine
from cluster.gangs.share import Node
from cluster.server import pack
from cluster.server.jobs.ray_link import Hello
from cluster.server.jobs.ray_process import RayProcess
from cluster.server.web import auth, jobs_api

ZIP = {"authorization": f"Bearer {TOKEN}", "content_type": "application/zip"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.gangs.ray_nodes.machines", lambda: [Machine("a", "10.0.0.1", FREE, FREE, "one")])
    monkeypatch.setattr(RayProcess, "ask", lambda self, gangs: None)
    monkeypatch.setattr(RayProcess, "_places", lambda self: [])
    return Queue(tmp_path)


FREE = Node(0.5, 0)
"""A machine that no job of these tests fits on."""


@pytest.fixture
def server(here):
    with serving([], board=here.board) as found:
        yield found


def wait_for(reached, seconds=60.0):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_comes_in_and_is_stopped_and_retried(server, here):
    first = server.ask("POST", "/api/jobs", GOOD, **ZIP)
    assert (first.status, first.json["id"], first.json["state"], first.json["ahead"]) == (200, "job-a", "QUEUED", 0)
    wait_for(lambda: not here.queue.unsettled())
    again = server.ask("POST", "/api/jobs", GOOD, **ZIP).json
    assert {**again, "outlook": None} == {**first.json, "outlook": None}
    assert server.post("/api/jobs/job-a/priority", {"priority": 4}).json["priority"] == 4
    assert server.post("/api/jobs/job-a/stop", {"now": False}).json["state"] == "CANCELLED"
    assert server.post("/api/jobs/job-a/retry", {"new": "job-b"}).json["retry_of"] == "job-a"
    assert [row["id"] for row in server.get("/api/jobs").json["jobs"]] == ["job-a", "job-b"]
    for path, body, status, words in (
        ("job-none/stop", {"now": True}, 404, "there is no job job-none"),
        ("job-b/retry", {"new": "job-c"}, 409, "job-b is QUEUED: stop it first"),
        ("job-a/priority", {"priority": 1}, 409, "job-a is CANCELLED"),
        ("job-b/stop", {"now": "yes"}, 400, "now: "),
        ("job-b/retry", {"new": "../x"}, 400, "new: "),
        ("job-b/priority", {"priority": 2**40}, 400, "priority: "),
        ("job-b/stop", {"now": True, "user": "root"}, 400, "user: "),
    ):
        answer = server.post(f"/api/jobs/{path}", body)
        assert (answer.status, words in answer.json["error"]) == (status, True), answer.json
    assert server.get("/api/jobs/job-none").status == server.get("/api/jobs/job-none/log").status == 404


def test_what_is_answered_is_on_the_disk(server, here):
    """As a server finds it that is started after this one was killed."""
    for number in range(5):
        job = server.ask("POST", "/api/jobs", zipped(submit(f"job-{number}")), **ZIP).json
        last = json.loads((here.queue.here / "journal.jsonl").read_text().splitlines()[-1])
        assert (last["id"], last["submitted"]) == (job["id"], job["submitted"])


def test_a_page_and_a_strange_body_bring_no_job(server):
    cookie = {"cookie": f"muster_dashboard={auth.session_of(TOKEN)}", "content_type": "application/zip"}
    assert server.ask("POST", "/api/jobs", GOOD, **cookie).status == 403
    assert server.ask("POST", "/api/jobs", GOOD, **cookie, origin="http://evil.example").status == 403
    assert server.ask("POST", "/api/jobs", GOOD, **ZIP | {"content_type": "application/json"}).status == 415
    assert server.ask("POST", "/api/jobs", GOOD, **ZIP | {"authorization": None}).status == 403
    assert server.get("/api/jobs").json["jobs"] == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_package_has_a_limit_that_the_server_holds(server, here, monkeypatch, chunked):
    monkeypatch.setattr(jobs_api, "LIMIT", len(GOOD) - 1)
    monkeypatch.setitem(auth.BODIES, "/api/jobs", ("application/zip", len(GOOD) + (0 if chunked else -1)))
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD) if chunked else GOOD
    more = {"content_length": None, "transfer_encoding": "chunked"} if chunked else {}
    assert server.ask("POST", "/api/jobs", body, **ZIP, **more).status == 413
    assert [path.name for path in here.queue.here.iterdir()] == ["journal.jsonl"]
    monkeypatch.setattr(pack, "LIMIT", len(GOOD) - 1)
    monkeypatch.setattr(jobs_api, "LIMIT", len(GOOD))
    monkeypatch.setitem(auth.BODIES, "/api/jobs", ("application/zip", len(GOOD)))
    assert "the limit is" in server.ask("POST", "/api/jobs", body, **ZIP, **more).json["error"]


def begin_upload(server) -> socket.socket:
    """A client that says that it sends a job, and sends half of it."""
    own = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /api/jobs HTTP/1.1\r\nhost: {server.host}\r\nauthorization: Bearer {TOKEN}\r\n"
    head += f"content-type: application/zip\r\ncontent-length: {len(GOOD)}\r\n\r\n"
    own.sendall(head.encode() + GOOD[:50])
    return own


def test_slow_clients_hold_up_nobody(server, here):
    """Those that send half a package, those that do not read what they asked for, those that wait for output."""
    for number in range(300):
        here.send(zipped(submit(f"job-{number}", run_dir="/r" + "x" * 4000)))
    slow = [begin_upload(server) for _ in range(10)]
    for _ in range(30):
        own = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.sendall(f"GET /api/jobs HTTP/1.1\r\nhost: {server.host}\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode())
        slow.append(own)
    for number in range(100):
        own = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        path = f"/api/jobs/job-{number}/log?wait=30"
        own.sendall(f"GET {path} HTTP/1.1\r\nhost: {server.host}\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode())
        slow.append(own)
    assert server.get("/api/machines").status == 200
    assert len(server.get("/api/jobs").json["jobs"]) == 300
    assert server.ask("POST", "/api/jobs", zipped(submit("job-quick")), **ZIP).status == 200
    slow[0].sendall(GOOD[50:])
    assert slow[0].recv(12) == b"HTTP/1.1 200"
    for own in slow:
        own.close()
    wait_for(lambda: not list(here.queue.here.glob(".upload-*")))  # what nobody will send is not kept


def test_too_many_uploads_are_told_to_come_again(server, here, monkeypatch):
    monkeypatch.setattr(jobs_api, "MOST_UPLOADS", 2)
    slow = [begin_upload(server) for _ in range(2)]
    wait_for(lambda: len(list(here.queue.here.glob(".upload-*"))) == 2)
    answer = server.ask("POST", "/api/jobs", GOOD, **ZIP)
    assert (answer.status, "try again" in answer.json["error"]) == (503, True)
    for own in slow:
        own.close()


def test_who_sends_nothing_more_is_let_go(server, here, monkeypatch):
    monkeypatch.setattr(jobs_api, "SILENCE", 0.05)
    with begin_upload(server) as own:
        assert own.recv(12) == b"HTTP/1.1 408"
    wait_for(lambda: not list(here.queue.here.glob(".upload-*")))


def test_two_hundred_clients_at_once(server, here):
    for number in range(200):
        here.send(zipped(submit(f"job-{number}")))
    meet = threading.Barrier(200)

    def ask(number: int) -> tuple[int, int]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.connect()
        meet.wait(120)
        connection.request("GET", "/api/jobs", headers={"authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        return answer.status, len(json.loads(answer.read())["jobs"])

    with ThreadPoolExecutor(200) as clients:
        assert set(clients.map(ask, range(200))) == {(200, 200)}


# Output.


@pytest.fixture
def printed(here, tmp_path) -> Path:
    """The file of what job-a's driver prints."""
    logs = tmp_path / "logs"
    logs.mkdir()
    hello = here.scheduler.link.connected = Hello(logs, "http://127.0.0.1:8265")
    here.scheduler.link.connect = lambda: hello
    here.scheduler._logs = logs

    def silent(id):
        raise ConnectionError("nobody there")

    here.scheduler.link.process.client.get_job_info = silent
    here.send(GOOD)
    here.queue.begin("job-a")
    here.queue.settle("job-a", started=True)
    return logs / "job-driver-job-a.log"


def log(server, offset=0, wait=0):
    return server.get(f"/api/jobs/job-a/log?offset={offset}&wait={wait}").json


def test_output_comes_piece_by_piece(server, here, printed, monkeypatch):
    assert log(server) == {"text": "", "next": 0, "there": False, "ended": False, "state": "RUNNING"}
    printed.write_bytes("one\nzwölf".encode()[:-3])  # half of a character
    assert log(server) == {"text": "one\nzw", "next": 6, "there": True, "ended": False, "state": "RUNNING"}
    printed.write_bytes("one\nzwölf\n".encode() + b"\xff\x1b[2J\n")
    assert log(server, 6)["text"] == "ölf\n\ufffd\x1b[2J\n"
    monkeypatch.setattr(jobs_api, "PIECE", 7)
    here.queue.end("job-a", state="FINISHED", exit_code=0)
    at, text, ended = 0, "", False
    while not ended:
        piece = log(server, at)
        at, text, ended = piece["next"], text + piece["text"], piece["ended"]
    assert text == "one\nzwölf\n\ufffd\x1b[2J\n"
    assert log(server, 10**9) == {"text": "", "next": 10**9, "there": True, "ended": True, "state": "FINISHED"}


def test_output_that_is_not_there_yet_is_waited_for(server, here, printed):
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(lambda: log(server, 0, 30))
        printed.write_text("now\n")
        assert waiting.result(60)["text"] == "now\n"
        waiting = other.submit(lambda: log(server, 4, 30))
        here.queue.end("job-a", state="FAILED", exit_code=1)
        assert waiting.result(60)["ended"] is True
    assert server.get("/api/jobs/job-a/log?wait=31").status == 400


def test_a_link_in_place_of_output_is_not_followed(server, printed, tmp_path):
    (tmp_path / "secret").write_text("secret")
    printed.symlink_to(tmp_path / "secret")
    assert log(server)["text"] == ""


# What the pages and Prometheus are told.


def test_now_tells_of_the_queue_and_the_machines(server, here):
    here.send(zipped(submit("job-low")))
    here.send(zipped(submit("job-high", priority=5)))
    wait_for(lambda: server.get("/api/now").json["cluster"]["reachable"])
    told = server.get("/api/now").json
    assert [job["id"] for job in told["waiting"]] == ["job-high", "job-low"]
    assert told["waiting"][0]["why"].startswith("no room even on an empty cluster: 1 x (1 CPU)")
    assert told["waiting"][0]["priority"] == 5
    [machine] = told["machines"]
    assert (machine["name"], machine["cpus"], machine["cpus_free"], machine["uses"]) == ("one", 0.5, 0.5, [])
    here.queue.begin("job-low")
    here.queue.settle("job-low", started=True)
    here.queue.end("job-low", state="LOST", reason="the cluster that ran it is gone")
    told = server.get("/api/now").json
    assert [(job["id"], job["state"]) for job in told["jobs"]] == [("job-low", "LOST")]
    assert [problem["what"] for problem in told["problems"]] == ["job-low is lost"]
    answer = server.get("/api/machines").json
    assert (answer["machines"], answer["dashboard"]) == (told["machines"], "http://127.0.0.1:8265")
    server.post("/api/jobs/job-low/retry", {"new": "job-again"})
    assert server.get("/api/now").json["problems"] == []


def test_runs_of_jobs_are_shown_wherever_their_root_is(tmp_path, monkeypatch):
    """And a job is told to be that run's."""
    (tmp_path / "queue").mkdir()
    here = Queue(tmp_path / "queue")
    first, second = write_run(tmp_path / "one" / "runs" / "a"), write_run(tmp_path / "two" / "runs" / "a")
    write_run(tmp_path / "elsewhere" / "b")
    with serving([tmp_path / "one" / "runs"], board=here.board) as server:
        assert list(server.rows()) == ["a"]
        for id, run_dir in (("job-1", first), ("job-2", second), ("job-3", tmp_path / "nowhere" / "c")):
            here.send(zipped(submit(id, run_dir=str(run_dir))))
        assert {job["id"]: job["run_id"] for job in server.get("/api/now").json["waiting"]}["job-1"] == "a"
        assert list(server.rows()) == ["a", "runs1:a"]
        told = {job["id"]: job["run_id"] for job in server.get("/api/now").json["waiting"]}
        assert told == {"job-1": "a", "job-2": "runs1:a", "job-3": None}


def test_prometheus_counts_jobs_by_state(server, here):
    here.send(GOOD)
    lines = server.get("/metrics").body.decode().splitlines()
    assert 'muster_jobs{state="QUEUED"} 1' in lines
    assert 'muster_jobs{state="LOST"} 0' in lines


def test_a_dashboard_without_a_queue_has_none_of_it(tmp_path):
    with serving([tmp_path]) as server:
        assert server.get("/api/jobs").status == server.get("/api/machines").status == 404
        assert server.ask("POST", "/api/jobs", GOOD, **ZIP).status in (404, 405)
        told = server.get("/api/now").json
        assert (told["cluster"], told["waiting"], told["jobs"], told["machines"]) == (None, [], [], [])
        assert b"muster_jobs" not in server.get("/metrics").body


def test_the_routes_are_in_openapi(server):
    paths = server.get("/api/openapi.json").json["paths"]
    told = {path: sorted(methods) for path, methods in paths.items() if path.startswith(("/api/jobs", "/api/machines"))}
    assert told == {
        "/api/jobs": ["get", "post"], "/api/jobs/{id}": ["get"], "/api/jobs/{id}/log": ["get"],
        "/api/jobs/{id}/stop": ["post"], "/api/jobs/{id}/retry": ["post"], "/api/jobs/{id}/priority": ["post"],
        "/api/machines": ["get"],
    }  # fmt: skip
    assert "application/zip" in paths["/api/jobs"]["post"]["requestBody"]["content"]
