"""Who may ask the dashboard: nobody without the token, no page of a stranger, under no name that it was not given."""

import json
import stat
from collections.abc import Callable
from typing import Any

import pytest
from dashboards import TOKEN, serving, write_run

from cluster.server.web import auth
from cluster.server.web.auth import HEADERS, MOST_BODY, read_token, session_of


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "a")
    with serving([root], hosts=["runs.example"]) as server:
        server.look()
        yield server


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(auth, "PAUSE", 0.0)


PATHS = (
    "/api/now", "/api/runs", "/api/keys", "/api/columns?key=a", "/api/runs/a", "/api/runs/a/series?metric=loss",
    "/api/runs/a/experts", "/api/runs/a/log", "/api/runs/a/events", "/api/compare?run=a", "/api/changes",
    "/api/openapi.json", "/metrics", "/", "/runs", "/static/index.html", "/static/js/main.js", "/docs",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shown",
    [
        {}, {"authorization": "Bearer "}, {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"cookie": f"muster_dashboard={TOKEN}"}, {"cookie": "muster_dashboard=; other=1"}, {"cookie": "\xff=\xfe"},
    ],
)  # fmt: skip
def test_nothing_is_told_without_the_token(dashboard, path, shown):
    answer = dashboard.ask("GET", path, **shown)
    assert answer.status == 401
    assert b'"a"' not in answer.body
    assert TOKEN.encode() not in answer.body


@pytest.mark.parametrize("path", ["/api/runs/a/note", "/api/runs/a/tags", "/api/runs/a/stop", "/logout"])
def test_nothing_is_done_without_it(dashboard, path):
    assert dashboard.post(path, {}, authorization=None, origin=f"http://{dashboard.host}").status == 401
    assert dashboard.ask("GET", path, authorization=f"Bearer {TOKEN}").status in (404, 405)


def test_health_and_the_page_that_asks_for_the_token_are_open(dashboard):
    assert dashboard.ask("GET", "/health").json == {"status": "ok", "server": "muster", "queue": False, "proof": None}
    page = dashboard.ask("GET", "/login").body.decode()
    assert "<form" in page
    for name in ("login.js", "login.css"):
        assert f"/static/{name}" in page
        assert dashboard.ask("GET", f"/static/{name}").status == 200
    assert dashboard.ask("GET", "/runs").body.decode() == page


def log_in(dashboard, token=TOKEN, **headers):
    return dashboard.post("/login", {"token": token}, authorization=None, **headers)


def test_a_browser_logs_in(dashboard):
    answer = log_in(dashboard, origin=f"http://{dashboard.host}")
    assert answer.status == 200
    cookie, *attributes = [part.strip() for part in answer.headers["set-cookie"].split(";")]
    assert {each.lower() for each in attributes} == {"httponly", "samesite=strict", "path=/"}
    assert TOKEN not in cookie
    assert dashboard.ask("GET", "/api/runs", cookie=cookie).json["count"] == 1
    own = {"cookie": cookie, "authorization": None}
    assert dashboard.post("/api/runs/a/note", {"note": "x"}, origin=f"http://{dashboard.host}", **own).status == 200
    assert dashboard.post("/logout", {}, origin=f"http://{dashboard.host}", **own).status == 200


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN.upper(), session_of(TOKEN), "\u2028", "x" * 2000])
def test_a_wrong_token_logs_nobody_in(dashboard, token):
    answer = log_in(dashboard, token)
    assert answer.status in (400, 401)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": None}, {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}, {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"}, {"content_type": None},
    ],
)  # fmt: skip
def test_a_page_of_a_stranger_changes_nothing(dashboard, headers):
    given = {
        "authorization": None, "cookie": f"muster_dashboard={session_of(TOKEN)}", "origin": f"http://{dashboard.host}"
    }  # fmt: skip
    assert dashboard.post("/api/runs/a/note", {"note": "mine"}, **given).status == 200
    answer = dashboard.post("/api/runs/a/note", {"note": "a stranger's"}, **(given | headers))
    assert answer.status in (403, 415)
    assert dashboard.rows()["a"]["note"] == "mine"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8267", "127.0.0.1.evil.example", "", "[::2]:80", "a:b:c"]
)
def test_no_name_that_it_was_not_given(dashboard, host):
    """A page of a stranger may let its own name mean 127.0.0.1 (DNS rebinding)."""
    assert dashboard.get("/api/runs", host=host).status == 421
    assert dashboard.get("/health", host=host).status == 421


@pytest.mark.parametrize(
    "host", ["localhost:9000", "LOCALHOST", "[::1]:8267", "[::1]", "runs.example", "runs.example:80"]
)
def test_names_that_it_was_given(dashboard, host):
    """At whatever port: a tunnel has one of its own."""
    assert dashboard.get("/api/runs", host=host).status == 200


@pytest.mark.parametrize(
    "path", ["/health", "/login", "/", "/api/runs", "/api/nothing", "/nothing", "/static/login.js"]
)
@pytest.mark.parametrize("token", [TOKEN, None])
def test_every_answer_has_the_safe_headers(dashboard, path, token):
    answer = dashboard.ask("GET", path, authorization=token and f"Bearer {token}")
    assert {key: answer.headers.get(key) for key in HEADERS} == HEADERS
    assert "'unsafe" not in answer.headers["content-security-policy"]
    if path.startswith("/api"):
        assert answer.headers["cache-control"] == "no-store"


def test_a_body_is_bounded(dashboard):
    def refused(ask: Callable[[], Any], *statuses: int) -> bool:
        try:
            return ask().status in statuses
        except ConnectionError:  # it closes without having read the rest, which may overtake its answer, or this body
            return True

    note = "/api/runs/a/note"
    assert refused(lambda: dashboard.post(note, {"note": "x" * MOST_BODY}), 413)
    assert refused(lambda: dashboard.post(note, {"note": "x"}, content_length="-1"), 400, 413)
    body = json.dumps({"note": "x" * MOST_BODY}).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    how = {"content_type": "application/json", "content_length": None, "transfer_encoding": "chunked"}
    assert refused(lambda: dashboard.ask("POST", note, chunked, authorization=f"Bearer {TOKEN}", **how), 400)
    assert len(dashboard.rows()["a"]["note"]) < 100


def test_the_token_is_its_owners_alone(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "token"
    monkeypatch.setenv("MUSTER_DASHBOARD_TOKEN", str(path))
    token = read_token()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert read_token() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
