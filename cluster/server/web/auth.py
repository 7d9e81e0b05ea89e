"""Who may ask the dashboard: whoever shows its token, from a page of its own, under a name that it was given."""

import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from cluster.gangs.access_token import make_token_file

from ..pack import LIMIT

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_FILE = "MUSTER_DASHBOARD_TOKEN"
"""Variable with the path of the token's file."""
MOST_BODY = 64 << 10
"""Bytes of a request's body; the longest is a note."""
BODIES = {"/api/jobs": ("application/zip", LIMIT)}
"""Kind and most bytes of bodies that are not JSON, by path."""
OPEN = ("/health", "/login", "/favicon.ico", "/static/login.js", "/static/login.css", "/static/app.css")
OPEN_FOLDERS = ("/static/fonts/",)
"""What the page that asks for the token consists of."""
PAUSE = 0.3
"""Seconds before a wrong token is answered."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def token_file() -> Path:
    """Where the token is kept."""
    return Path(os.environ.get(TOKEN_FILE) or Path.home() / ".muster" / "dashboard_token")


def read_token() -> str:
    """The token, made where there is none, in a file that its owner alone reads.

    Raises:
        ConfigError: the file cannot be made or read, or is empty.
    """
    path = token_file()
    make_token_file(path, TOKEN_FILE)
    return path.read_text().strip()


def session_of(token: str) -> str:
    """What a browser's cookie holds: it opens the same door, but does not tell the token."""
    return hmac.new(token.encode(), b"muster dashboard, a browser's session", hashlib.sha256).hexdigest()


class Guard:
    """ASGI middleware: lets through what it may, and puts the safe headers on everything.

    Args:
        hosts: names, without a port, under which the server may be asked. Any other name is refused, as a page of a
            stranger may have made a name of its own mean this address (DNS rebinding).
        login_page: what a browser gets that has no session yet.
    """

    def __init__(self, app: App, token: str, hosts: Collection[str], cookie: str, login_page: Callable[[], bytes]):
        self._app, self._cookie, self._login_page = app, cookie, login_page
        self._token = _digest(token)
        self._session = _digest(session_of(token))
        self._hosts = {host.lower() for host in (*LOOPBACK, *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        api = scope["path"].startswith("/api/") or scope["path"] == "/metrics"

        async def safe_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                added = HEADERS | ({"cache-control": "no-store"} if api else {})
                headers = [(k.encode(), v.encode()) for k, v in added.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if refused := self._refused(scope, headers):
            status, why = refused
            if status == 401 and not api and scope["method"] == "GET":
                await _answer(safe_send, 401, self._login_page(), "text/html; charset=utf-8")
            else:
                extra = [(b"www-authenticate", b"Bearer")] if status == 401 else []
                await _answer(safe_send, status, json.dumps({"error": why}).encode(), "application/json", extra)
            return
        _, most = BODIES.get(scope["path"], ("", MOST_BODY))
        await self._app(scope, _bounded(receive, most), safe_send)

    def _refused(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if host.rpartition(":")[0] not in ("", "[:", "[::") and not host.endswith("]"):
            name = host.rpartition(":")[0]
        else:
            name = host
        if name.lower() not in self._hosts:
            return 421, "this server does not answer to that name: start it with --name, or use 127.0.0.1"
        bearer = self._bearer(headers)
        if bearer is False:
            return 401, "the token is not this server's"
        changes = scope["method"] not in ("GET", "HEAD")
        if changes:
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
            own = origin in (f"http://{host}", f"https://{host}")
            login = scope["path"] == "/login"
            if (origin is not None and not own) or site not in ("same-origin", "none"):
                return 403, "the request comes from a page of another origin"
            if origin is None and not (bearer or login):
                return 403, "the request does not say which origin it comes from"
            kind, most = BODIES.get(scope["path"], ("application/json", MOST_BODY))
            if headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
                return 415, f"the body should be {kind}, with that Content-Type"
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > most:
                return 413, f"the body has over {most:,} bytes"
        path = scope["path"]
        if bearer or path in OPEN or path.startswith(OPEN_FOLDERS):
            return None
        return None if self._has_session(headers) else (401, "log in first, with the server's token")

    def _bearer(self, headers: Mapping[str, str]) -> bool | None:
        """Whether the token that is shown is right; None: none is."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return None
        return self.is_token(token.strip())

    def is_token(self, given: str) -> bool:
        return hmac.compare_digest(_digest(given), self._token)

    def _has_session(self, headers: Mapping[str, str]) -> bool:
        for pair in headers.get("cookie", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self._cookie and hmac.compare_digest(_digest(value), self._session):
                return True
        return False


async def pause() -> None:
    """Before a wrong token is answered."""
    await asyncio.sleep(PAUSE)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _bounded(receive: Receive, most: int) -> Receive:
    """A body of unknown length ends where it is too long: what is parsed is then no JSON, and no zip."""
    left = most

    async def bounded() -> Message:
        nonlocal left
        message = await receive()
        if message["type"] == "http.request":
            left -= len(message.get("body", b""))
            if left < 0:
                return {"type": "http.request", "body": b"", "more_body": False}
        return message

    return bounded


async def _answer(send: Send, status: int, body: bytes, kind: str, extra: Collection[tuple[bytes, bytes]] = ()) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
