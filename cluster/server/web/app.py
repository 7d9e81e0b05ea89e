"""The dashboard's HTTP server: its routes. It reads only runs of the index, found by their ids."""

import asyncio
import contextlib
import gzip
import os
import time
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError

from cluster.gangs.access_token import proof_of
from configs import ConfigError
from configs.reading.parse import clip
from trainer.files.plain_json import dump
from trainer.record.lines import read_events
from trainer.record.terminal import visible
from trainer.run.notes import read_notes, set_note, set_tags
from trainer.run.stop import request_stop

from ..jobs.board import Board
from . import responses
from .auth import Guard, pause, session_of
from .changes import Changes
from .index.config_values import differing_keys, flat_config
from .index.runs_index import Entry, RunsIndex, View
from .jobs_api import jobs_router
from .pages.columns_of_runs import ColumnsOfRuns
from .pages.details import Books, details, events_after, experts, training_flops, where_time_went
from .pages.logs import log
from .pages.now import Glance
from .pages.prometheus import exposition
from .pages.samples import picture
from .pages.series import AXES, MOST_METRICS, MOST_POINTS, Columns, Line, NoAxis, lines
from .pages.stacks import stacks
from .plan_routes import plan_routes
from .static_files import StaticFiles

PAGES = ("", "now", "runs", "run", "compare", "sweep", "plan")
"""Beginnings of the paths that the front end shows by itself."""
SMALL = 1 << 10
"""Bytes of an answer below which it is not compressed."""
FIRST_LOOK = 10.0
"""Seconds that a request waits for the first look at the runs."""
ROOTS_EVERY = 5.0
"""Seconds between two looks for roots of jobs, which a job may make as it begins."""
MOST_COMPARED = 20
COOKIE = "muster_dashboard"
WRONG: dict[int | str, dict[str, Any]] = {"4XX": {"model": responses.Failure}}
Metrics = Annotated[list[str], Query(max_length=MOST_METRICS)]
Points = Annotated[int, Query(ge=2, le=MOST_POINTS)]


def create_app(roots: Sequence[Path], token: str, hosts: Collection[str] = (), board: Board | None = None) -> FastAPI:
    """The server of these roots of runs.

    Args:
        token: required of every request.
        hosts: host names that it answers to, beside those of loopback.
        board: of the queue that it serves; its scheduler runs as long as the server does.
    """
    index = RunsIndex([root.resolve() for root in roots])
    columns, books, static = Columns(), Books(), StaticFiles()
    glance, of_runs = Glance(books), ColumnsOfRuns(columns)
    changes = Changes(index)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(changes.watch())
        if board:
            board.scheduler.start()
        yield
        if board:
            board.scheduler.end()
        changes.end()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await asyncio.to_thread(index.keep)

    app = FastAPI(
        title="muster", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json",
        responses=WRONG,
    )  # fmt: skip
    app.state.index, app.state.changes = index, changes

    def login_page() -> bytes:
        page = static.get("login.html")
        return page.content if page else b"log in at /login"

    guard = Guard(app, token, hosts, COOKIE, login_page)  # to ask it whether a token is right
    app.add_middleware(Guard, token=token, hosts=hosts, cookie=COOKIE, login_page=login_page)  # type: ignore[arg-type]

    known: list[float] = [-1, 0.0]
    """Version of the queue whose jobs' roots were looked for, and when."""

    def view() -> View:
        changes.asked()
        if board and (board.queue.version != known[0] or time.monotonic() - known[1] > ROOTS_EVERY):
            known[:] = board.queue.version, time.monotonic()
            for root in board.roots():
                index.add(root.resolve())
        index.ready.wait(FIRST_LOOK)
        return index.view

    def found(id: str) -> Entry:
        view()
        if (entry := index.find(id)) is None and index.unread and index.read_next(id):
            until = time.monotonic() + FIRST_LOOK
            while (entry := index.find(id)) is None and time.monotonic() < until:
                time.sleep(0.05)
        if entry or (entry := index.find(id)):
            return entry
        raise HTTPException(404, f"there is no run {clip(id, 100)} here")

    def curves(entry: Entry, names: Sequence[str], axis: str, **range: Any) -> dict[str, Line]:
        flops = training_flops(read_events(entry.run.folder)) if axis == "flops" else None
        return lines(columns, entry.run.folder, names, axis=axis, unit=entry.row.unit, flops=flops, **range)

    @app.get("/health", response_model=responses.Health)
    def health(request: Request, prove: Annotated[str, Query(max_length=100)] = "") -> dict[str, Any]:
        """Whether the server runs; if asked, it proves that it has the token without revealing it."""
        proof = proof_of(token, prove, *request.scope["server"]) if prove else None
        return {"status": "ok", "server": "muster", "queue": board is not None, "proof": proof}

    @app.get("/api/now", response_model=responses.Now)
    def now(request: Request) -> Response:
        told = glance.now(view(), index.roots)
        if board:
            runs = {entry.run.folder: entry.row.id for entry in index.view.entries}
            told |= board.now(runs) | {"problems": [*board.problems(), *told["problems"]]}
        return _json(request, told)

    @app.get("/api/runs", response_model=responses.Runs)
    def runs(request: Request, since: Annotated[str, Query(max_length=50)] = "") -> Response:
        seen = view()
        etag = f'"{seen.version}"'
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": etag})
        if since and (changes_since := of_runs.changes(seen, since)) is not None:
            return _json(request, changes_since)
        plain, packed = of_runs.table(seen)
        return _sent(request, plain, packed, {"etag": etag})

    @app.get("/api/keys", response_model=responses.Keys)
    def keys(request: Request) -> Response:
        return _json(request, of_runs.keys(view()))

    @app.get("/api/columns", response_model=responses.RunColumns)
    def more_columns(
        request: Request,
        key: Annotated[list[str], Query(max_length=50)],
        since: Annotated[str, Query(max_length=50)] = "",
        run: Annotated[str, Query(max_length=10_000)] = "",
    ) -> Response:
        return _json(request, of_runs.columns(view(), key, since, run))

    @app.get("/api/runs/{id}", response_model=responses.Details)
    def run(request: Request, id: str) -> Response:
        return _json(request, details(found(id), books, columns, at_once=False))

    @app.get("/api/runs/{id}/goodput", response_model=responses.TimeOfRun)
    def time_went(request: Request, id: str) -> Response:
        return _json(request, where_time_went(found(id), books))

    @app.get("/api/runs/{id}/series", response_model=responses.Series)
    def series(
        request: Request,
        id: str,
        metric: Metrics,
        points: Points = 800,
        start: Annotated[float | None, Query(alias="from")] = None,
        end: Annotated[float | None, Query(alias="to")] = None,
        x: str = "step",
        log: bool = False,
    ) -> Response:
        found_lines = curves(found(id), metric, _axis(x), points=points, start=start, end=end, log=log)
        return _json(request, {"metrics": {name: line.plain() for name, line in found_lines.items()}, "x": x})

    @app.get("/api/runs/{id}/experts", response_model=responses.Experts)
    def expert_load(
        request: Request, id: str, layer: Annotated[int, Query(ge=0, le=10_000)] = 0, points: Points = 200
    ) -> Response:
        return _json(request, experts(found(id).run.path, layer, points))

    @app.get("/api/runs/{id}/samples/{step}.png", response_class=Response)
    def sample(id: str, step: int) -> Response:
        # Were it opened as a page of its own, what is in it could do nothing either.
        headers = {"content-security-policy": "default-src 'none'; sandbox", "content-disposition": "inline"}
        return Response(picture(found(id).run.path, step), headers=headers, media_type="image/png")

    @app.get("/api/runs/{id}/log", response_model=responses.Log)
    def output(
        request: Request,
        id: str,
        rank: Annotated[int, Query(ge=0, le=10**6)] = 0,
        tail: Annotated[int, Query(ge=1)] = 65536,
        search: Annotated[str, Query(max_length=200)] = "",
        attempt: Annotated[int | None, Query(ge=0, le=10**9)] = None,
    ) -> Response:
        return _json(request, log(found(id).run.path, rank, tail, search, attempt))

    @app.get("/api/runs/{id}/stacks", response_model=responses.Stacks)
    def hung(request: Request, id: str) -> Response:
        return _json(request, stacks(found(id).run.path))

    @app.get("/api/runs/{id}/events", response_model=responses.Events)
    def events(request: Request, id: str, after: Annotated[int, Query(ge=0)] = 0) -> Response:
        return _json(request, events_after(found(id).run.path, after))

    @app.get("/api/compare", response_model=responses.Comparison)
    def compare(
        request: Request,
        run: Annotated[list[str], Query(max_length=MOST_COMPARED)],
        metric: str = "loss",
        x: str = "step",
        points: Points = 800,
        start: Annotated[float | None, Query(alias="from")] = None,
        end: Annotated[float | None, Query(alias="to")] = None,
        log: bool = False,
    ) -> Response:
        entries = [found(id) for id in dict.fromkeys(run)]
        told, without = {}, []
        for entry in entries:
            try:
                line = curves(entry, [metric], _axis(x), points=points, start=start, end=end, log=log)[metric]
                told[entry.row.id] = line.plain()
            except NoAxis:
                without.append(entry.row.id)
        differs = differing_keys([flat_config(entry.config) for entry in entries])
        return _json(request, {"runs": told, "without": without, "x": x, "metric": metric, "differs": differs})

    @app.post("/api/runs/{id}/note", response_model=responses.Done)
    def note(request: Request, id: str, body: responses.Note) -> Response:
        return changed(request, found(id), lambda entry: set_note(entry.run.path, body.note))

    @app.post("/api/runs/{id}/tags", response_model=responses.Done)
    def tags(request: Request, id: str, body: responses.Tags) -> Response:
        wanted = {}
        for tag in body.tags:
            key, sign, value = tag.partition("=")
            wanted[key.strip()] = value.strip() if sign else "true"

        def change(entry: Entry) -> None:
            gone = dict.fromkeys(read_notes(entry.run.path).tags.keys() - wanted.keys(), "")
            set_tags(entry.run.path, gone | wanted)

        return changed(request, found(id), change)

    @app.post("/api/runs/{id}/stop", response_model=responses.Done)
    def stop(request: Request, id: str) -> Response:
        def change(entry: Entry) -> None:
            if entry.row.status != "RUNNING":
                raise ConfigError(f"{entry.row.name} is {entry.row.status}: there is nothing to stop")
            request_stop(entry.run.path)

        return changed(request, found(id), change)

    def changed(request: Request, entry: Entry, change: Any) -> Response:
        try:
            if entry.run.path.is_symlink():
                raise ConfigError(f"{entry.row.name} has become a link")
            change(entry)
        except ConfigError as error:
            raise HTTPException(409, visible(str(error))[:1000]) from None
        except OSError as error:
            raise HTTPException(409, f"it cannot be written: {error.strerror}") from None
        index.look_at(entry.row.id)
        changes.tell_soon({entry.row.id})
        return _json(request, {"done": True})

    @app.get("/metrics")
    def metrics() -> Response:
        text = exposition(view(), glance, board.states() if board else None)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/login", response_model=responses.Done)
    async def log_in(request: Request, body: responses.Login) -> Response:
        if not guard.is_token(body.token.strip()):
            await pause()
            raise HTTPException(401, "that is not this server's token")
        answer = _json(request, {"done": True})
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, session_of(token), httponly=True, samesite="strict", path="/", secure=secure)
        return answer

    @app.post("/logout", response_model=responses.Done)
    def log_out(request: Request) -> Response:
        answer = _json(request, {"done": True})
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer

    def shown(request: Request, name: str) -> Response:
        file = static.get(name)
        if file is None:
            raise HTTPException(404, "there is no such file")
        headers = {"etag": file.etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.kind, headers=headers)

    @app.get("/favicon.ico", include_in_schema=False)
    def icon(request: Request) -> Response:  # asked for by browsers where a page names none, as JSON and pictures do
        return shown(request, "icon.svg")

    @app.get("/static/{name:path}")
    def static_file(request: Request, name: str) -> Response:
        return shown(request, name)

    @app.get("/login")
    def login(request: Request) -> Response:
        return shown(request, "login.html")

    app.include_router(plan_routes(index, view, _json, board, roots))
    if board:
        app.include_router(jobs_router(board, _json))
        board.queue.on_change = lambda: changes.tell_soon(set())
    app.router.add_route("/api/changes", changes, include_in_schema=False)  # type: ignore[arg-type]

    @app.get("/{path:path}", include_in_schema=False)
    def page(request: Request, path: str) -> Response:
        if path.partition("/")[0] not in PAGES:
            raise HTTPException(404, "there is no such page")
        return shown(request, "index.html")

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> Response:
        return _json(request, {"error": error.detail}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return _json(request, {"error": clip(f"{where}: {first['msg']}", 300)}, 400)

    @app.exception_handler(NoAxis)
    async def no_axis(request: Request, error: NoAxis) -> Response:
        return _json(request, {"error": str(error)}, 400)

    @app.exception_handler(OSError)
    async def unreadable(request: Request, error: OSError) -> Response:
        name = os.path.basename(str(error.filename or ""))
        return _json(request, {"error": clip(f"{name}: {error.strerror or error}", 300)}, 404)

    return app


def _axis(x: str) -> str:
    if x not in AXES:
        raise HTTPException(400, f"x should be one of {', '.join(AXES)}")
    return x


def _json(request: Request, content: dict[str, Any], status: int = 200) -> Response:
    return _sent(request, dump(content).encode(), None, {}, status)


def _sent(request: Request, plain: bytes, packed: bytes | None, headers: dict[str, str], status: int = 200) -> Response:
    headers = headers | {"vary": "accept-encoding"}
    if len(plain) >= SMALL and "gzip" in request.headers.get("accept-encoding", ""):
        plain = packed or gzip.compress(plain, 1)
        headers["content-encoding"] = "gzip"
    return Response(plain, status, headers, media_type="application/json")
