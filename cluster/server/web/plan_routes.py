"""Routes of the pages Sweep and Plan."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response

from configs import ConfigError
from configs.base import MOST_FLOAT
from configs.reading.parse import clip
from trainer.record.terminal import visible

from ..jobs.board import Board
from ..messages import BadMessage
from ..outlook import gang_words
from . import jobs_models, plan_responses
from .heavy import Heavy
from .index.runs_index import RunsIndex, View
from .pages import plan
from .pages.submission import needed, run_roots, submitted
from .pages.sweep import Sweeps, Swept

LAW, TOPOLOGIES = "cluster.sweep.results.law_page", "cluster.server.web.pages.plan"
NO_QUEUE = "this server has no queue: submit from the dashboard of a cluster (`muster cluster up`)"
Flops = Annotated[float | None, Query(gt=0, le=MOST_FLOAT)]


def plan_routes(
    index: RunsIndex,
    view: Callable[[], View],
    answer: Callable[[Request, dict[str, Any]], Response],
    board: Board | None,
    roots: Sequence[Path],
) -> APIRouter:
    """Of the sweeps of an index.

    Args:
        answer: sends JSON.
        board: of the queue to which runs are submitted, if there is one.
        roots: folders that they may be submitted to, beside those of its jobs.
    """
    sweeps, heavy = Sweeps(index.roots), Heavy()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        heavy.close()

    router = APIRouter(lifespan=lifespan)

    def found(id: str) -> Swept:
        if sweep := sweeps.all(view()).get(id):
            return sweep
        raise HTTPException(404, f"there is no sweep {clip(id, 100)} here")

    @router.get("/api/sweeps", response_model=plan_responses.SweepList)
    def sweep_list(request: Request) -> Response:
        return answer(request, {"sweeps": sweeps.listed(view())})

    @router.get("/api/sweeps/{id}", response_model=plan_responses.SweepStatus)
    def sweep(request: Request, id: str) -> Response:
        try:
            return answer(request, sweeps.shown(found(id)))
        except ConfigError as error:
            raise HTTPException(409, visible(str(error))[:1000]) from None

    @router.get("/api/sweeps/{id}/law", response_model=plan_responses.SweepLaw)
    def law(request: Request, id: str, budget: Flops = None, max_budget: Flops = None) -> Response:
        swept = found(id)
        try:
            rests_on = sweeps.rests_on(swept)
        except ConfigError as error:
            raise HTTPException(409, visible(str(error))[:1000]) from None
        place = (LAW, swept.folder, budget, max_budget)
        told = heavy.ask(place, rests_on, LAW, sweeps.question(swept, budget, max_budget))
        return answer(request, {"working": told.working, "computed": told.at, "law": plain(told.found)})

    @router.get("/api/plan", response_model=plan_responses.PlanOptions)
    def options(request: Request) -> Response:
        offered = [visible(str(root)) for root in run_roots(board, roots)] if board else None
        return answer(request, plan.options() | {"roots": offered})

    @router.post("/api/plan", response_model=plan_responses.Planned)
    def planned(request: Request, body: plan_responses.PlanAsked) -> Response:
        return answer(request, plan.planned(body.model_dump()))

    @router.post("/api/plan/topologies", response_model=plan_responses.Topologies)
    def topologies(request: Request, body: plan_responses.PlanAsked) -> Response:
        """To be asked again while it is `working`."""
        asked = body.model_dump()
        told = heavy.ask((TOPOLOGIES, body.model_dump_json()), (), TOPOLOGIES, asked)
        found = told.found or {}
        content = {"working": told.found is None, "error": found.get("error", ""), "key": found.get("key")}
        return answer(request, content | {"found": None if "error" in found else told.found})

    @router.post("/api/submit/needs", response_model=plan_responses.Needs)
    def needs(request: Request, body: plan_responses.RunAsked) -> Response:
        if board is None:
            raise HTTPException(409, NO_QUEUE)
        try:
            asked = body.model_dump()
            job = needed(board, plan.sent_config(asked), asked)
            return answer(request, {"gang": gang_words(job), "why": ""})
        except ConfigError as error:
            return answer(request, {"gang": "", "why": visible(str(error))[:2000]})

    @router.post("/api/submit", response_model=jobs_models.JobRow)
    def submit(request: Request, body: plan_responses.RunAsked) -> Response:
        if board is None:
            raise HTTPException(409, NO_QUEUE)
        try:
            job = submitted(board, run_roots(board, roots), body.model_dump())
        except (ConfigError, BadMessage) as error:
            raise HTTPException(409, visible(str(error))[:2000]) from None
        except OSError as error:
            raise HTTPException(507, f"the queue cannot be written: {error.strerror}") from None
        return answer(request, board.row(job.id))

    return router


def plain(value: Any) -> Any:
    """The same, its texts without control characters."""
    if isinstance(value, str):
        return visible(value[:20_000])
    if isinstance(value, dict):
        return {visible(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value
