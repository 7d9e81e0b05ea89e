"""One watcher for all pages: it looks at the runs, and tells every page that listens which have changed."""

import asyncio
import contextlib
import json
import time
from typing import Any

from .auth import Receive, Scope, Send
from .index.runs_index import RunsIndex

EVERY = 2.0
"""Seconds between two looks while somebody watches."""
IDLE = 10.0
"""The same while nobody does."""
WATCHED = 60.0
"""Seconds after a request in which somebody is said to watch."""
HEARTBEAT = 15.0
AT_MOST_EVERY = 1.0
"""Seconds between two messages to one page."""
PATIENCE = 30.0
"""Seconds that a page may take to receive a message; one that takes longer is let go, and connects again."""
MOST_LISTENERS = 1500
"""Of `serving.MOST_CONNECTIONS`: the others are for what the pages ask."""
MOST_NAMED = 1000
"""Runs that a message names; of more it names none, which means all."""


class Changes:
    """Looks at an index again and again. As an ASGI app it sends `changed` to whoever asks (server-sent events)."""

    def __init__(self, index: RunsIndex) -> None:
        self.index = index
        self._listeners: set[_Listener] = set()
        self._asked = time.monotonic()
        self._wanted = asyncio.Event()
        self._ending = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def asked(self) -> None:
        """Somebody has asked for something."""
        idle = not self._watched()
        self._asked = time.monotonic()
        if idle and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wanted.set)

    def _watched(self) -> bool:
        return bool(self._listeners) or time.monotonic() - self._asked < WATCHED

    async def watch(self) -> None:
        """Until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            began = time.monotonic()
            changed = await asyncio.to_thread(self.index.look)
            if changed:
                self.tell(changed)
            pause = 0.02 if self.index.unread else EVERY if self._watched() else IDLE
            # A look that takes long, on a slow disk, is not begun again at once.
            pause = max(pause, min(4 * (time.monotonic() - began), 30.0) if not self.index.unread else 0.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), pause)
            self._wanted.clear()

    def tell(self, changed: set[str]) -> None:
        """Tell every page that these runs have changed."""
        for listener in self._listeners:
            listener.tell(changed)

    def tell_soon(self, changed: set[str]) -> None:
        """As `tell`, from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.tell, changed)

    def end(self) -> None:
        """Let all pages go."""
        self._ending = True
        for listener in self._listeners:
            listener.changed.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._listeners) >= MOST_LISTENERS:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        listener = _Listener()
        self._listeners.add(listener)
        sending = asyncio.ensure_future(self._send(listener, send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._listeners.discard(listener)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, listener: "_Listener", send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            await asyncio.wait_for(send(message), PATIENCE)

        headers = [(b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # What a page was told before it listened may be of an earlier version by now.
        await write(f"retry: 2000\nevent: version\ndata: {self.index.view.version}\n\n")
        while not self._ending:
            try:
                await asyncio.wait_for(listener.changed.wait(), HEARTBEAT)
            except TimeoutError:
                await write(": still here\n\n")
                continue
            if self._ending:
                break
            data: dict[str, Any] = {"runs": listener.take()}
            await write(f"event: changed\ndata: {json.dumps(data)}\n\n")
            await asyncio.sleep(AT_MOST_EVERY)
        await write("", more=False)


class _Listener:
    """One page: what has changed since it was told."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._runs: set[str] = set()

    def tell(self, runs: set[str]) -> None:
        self._runs |= runs
        self.changed.set()

    def take(self) -> list[str]:
        runs, self._runs = sorted(self._runs), set()
        self.changed.clear()
        return runs if len(runs) <= MOST_NAMED else []


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
