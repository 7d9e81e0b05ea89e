"""The job API of a cluster: submit, list, stop, retry, reprioritise and follow jobs. No request waits for Ray."""

import asyncio
import codecs
import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from configs.units import byte_size
from trainer.files.own_files import no_link, open_file
from trainer.record.terminal import visible

from ..jobs.board import Board
from ..messages import BadMessage, Conflict, Known, NoJob
from ..pack import LIMIT, read_message
from ..waiting import ACTIVE
from . import jobs_models as models

MOST_UPLOADS = 16
"""Most packages that are received at the same time."""
CHECKED_AT_ONCE = 2
"""Most packages that are in memory at the same time, each of up to LIMIT bytes."""
SILENCE = 60.0
"""Seconds without a byte after which an upload is aborted."""
PIECE = 1 << 18
"""Most bytes of output in a response."""
LONGEST_WAIT = 30.0
LOOK_EVERY = 0.5
"""Seconds between two checks for output that a request waits for."""
STATUS: dict[type[Exception], int] = {NoJob: 404, Conflict: 409, BadMessage: 400}
ZIP = {"requestBody": {"required": True, "content": {"application/zip": {"schema": {"type": "string"}}}}}

Answer = Callable[[Request, dict[str, Any]], Response]


def jobs_router(board: Board, answer: Answer) -> APIRouter:
    """The routes of a queue.

    Args:
        answer: makes the response from a JSON object.
    """
    router, queue, scheduler = APIRouter(prefix="/api"), board.queue, board.scheduler
    receiving = [0]
    checking = asyncio.Semaphore(CHECKED_AT_ONCE)

    def done(do: Callable[[], Known]) -> dict[str, Any]:
        """Make a change. Returns the job as it is now. Raises HTTPException."""
        try:
            job = do()
        except BadMessage as error:
            raise HTTPException(STATUS[type(error)], visible(str(error))[:1000]) from None
        except OSError as error:
            raise HTTPException(507, f"the queue cannot be written: {error.strerror}") from None
        return board.row(job.id)

    @router.get("/jobs", response_model=models.Jobs)
    def jobs(request: Request) -> Response:
        seen = scheduler.seen
        return answer(request, {"jobs": board.rows(), "reachable": seen.reachable, "why": visible(seen.why)})

    @router.get("/jobs/{id}", response_model=models.JobRow)
    def job(request: Request, id: str) -> Response:
        return answer(request, done_reading(lambda: board.row(id)))

    @router.post("/jobs", response_model=models.JobRow, openapi_extra=ZIP)
    async def submit(request: Request) -> Response:
        if receiving[0] >= MOST_UPLOADS:
            raise HTTPException(503, f"{MOST_UPLOADS} uploads are in progress: try again in a moment")
        path = queue.upload()
        receiving[0] += 1
        try:
            await _receive(request, path)
            async with checking:
                told = await run_in_threadpool(lambda: done(lambda: take(path)))
        finally:
            receiving[0] -= 1
            path.unlink(missing_ok=True)
        return answer(request, told)

    def take(path: Path) -> Known:
        content = path.read_bytes()
        return queue.submit(read_message(content), path, hashlib.sha256(content).hexdigest())

    @router.post("/jobs/{id}/stop", response_model=models.JobRow)
    def stop(request: Request, id: str, body: models.StopJob) -> Response:
        return answer(request, done(lambda: queue.stop(id, body.now)))

    @router.post("/jobs/{id}/retry", response_model=models.JobRow)
    def retry(request: Request, id: str, body: models.RetryJob) -> Response:
        return answer(request, done(lambda: queue.retry(id, body.new)))

    @router.post("/jobs/{id}/priority", response_model=models.JobRow)
    def priority(request: Request, id: str, body: models.Priority) -> Response:
        return answer(request, done(lambda: queue.set_priority(id, body.priority)))

    @router.get("/jobs/{id}/log", response_model=models.JobLog)
    async def log(
        request: Request,
        id: str,
        offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0.0,
    ) -> Response:
        """Output from `offset` on. If there is none, waits for it for up to `wait` seconds."""
        until = asyncio.get_running_loop().time() + wait
        while True:
            piece = await run_in_threadpool(lambda: done_reading(lambda: output(id, offset)))
            if piece["text"] or piece["ended"] or asyncio.get_running_loop().time() >= until:
                return answer(request, piece)
            await asyncio.sleep(LOOK_EVERY)

    def output(id: str, offset: int) -> dict[str, Any]:
        job = queue.job(id)  # read before the file: the output of a job that has ended is complete
        over = job.state not in ACTIVE
        path = scheduler.output(id)
        text, next, rest = _piece(path, offset, over) if path else ("", offset, False)
        return {
            "text": text, "next": next, "there": path is not None, "ended": over and not rest, "state": job.state
        }  # fmt: skip

    @router.get("/machines", response_model=models.Machines)
    def machines(request: Request) -> Response:
        return answer(request, board.machines())

    return router


def done_reading(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """As `read`. Raises HTTPException if there is no such job."""
    try:
        return read()
    except NoJob as error:
        raise HTTPException(404, visible(str(error))) from None


async def _receive(request: Request, path: Path) -> None:
    """Write a request's body to a file. Raises HTTPException if it is too long or stalls."""
    size, more = 0, True
    with os.fdopen(no_link(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        while more:
            try:
                message = await asyncio.wait_for(request.receive(), SILENCE)
            except TimeoutError:
                raise HTTPException(408, f"no data for {SILENCE:.0f} s") from None
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "the client disconnected")
            piece, more = message.get("body", b""), message.get("more_body", False)
            if (size := size + len(piece)) > LIMIT:
                raise HTTPException(413, f"it has more than {byte_size(LIMIT)}, which is the limit")
            try:
                await run_in_threadpool(file.write, piece)
            except OSError as error:
                raise HTTPException(507, f"the queue cannot be written: {error.strerror}") from None


def _piece(path: Path, offset: int, over: bool) -> tuple[str, int, bool]:
    """(text of a file from an offset on, offset of the next piece, whether there is more).

    Args:
        over: the file is complete. If not, half a character at its end is left for the next piece.
    """
    with contextlib.suppress(OSError), open_file(path) as file:
        file.seek(offset)
        read = file.read(PIECE + 1)
        rest, read = len(read) > PIECE, read[:PIECE]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(read, final=over and not rest)
        return text, offset + len(read) - len(decoder.getstate()[0]), rest
    return "", offset, False
