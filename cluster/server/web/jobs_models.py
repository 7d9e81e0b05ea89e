"""Requests and responses of a cluster's job API. Times are in Unix seconds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..messages import Id, Known

PriorityOfJob = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class JobOutlook(BaseModel):
    """Progress and prospects of a job."""

    step: int | None
    """Last step of its run, or finished trials of its sweep; None if unknown."""
    steps: int | None
    eta: float | None
    """Seconds until it finishes."""
    why: str
    """Why it is queued, failed, or not as requested."""
    starts: float | None
    """When it will start if running jobs end as expected; None if unknown."""


class JobRow(Known):
    """A job's entry in the journal, and its outlook."""

    ahead: int
    """Number of jobs that will start before it."""
    outlook: JobOutlook


class Jobs(BaseModel):
    """All jobs that are kept, oldest first."""

    jobs: list[JobRow]
    reachable: bool
    """Whether Ray answers; if not, running jobs are as last known."""
    why: str


class Use(BaseModel):
    """What one driver reserves on a machine."""

    by: str
    """Id of a job; `driver ID` if it is not a job of the queue."""
    cpus: float
    gpus: float


class Machine(BaseModel):
    name: str
    address: str
    cpus: float
    cpus_free: float
    gpus: float
    gpus_free: float
    uses: list[Use]


class ClusterState(BaseModel):
    """The cluster, as of the last query."""

    address: str
    """host:port of Ray's head."""
    reachable: bool
    why: str
    """Why Ray cannot be reached."""
    since: float
    """Since when `reachable` has been as it is."""
    seen: float
    """When the machines were last queried."""
    time: float
    """When this was answered."""
    dashboard: str | None
    """URL of Ray's own dashboard, as the head has it."""


class Machines(ClusterState):
    machines: list[Machine]


class JobLog(BaseModel):
    """A piece of a job's output."""

    text: str
    next: int
    """Offset of the next piece, in bytes."""
    there: bool
    """Whether the cluster has any output of it."""
    ended: bool
    """Whether this is the last piece."""
    state: str


class ShownJob(BaseModel):
    """A job on the Now page."""

    id: str
    run: str
    """Name of its run."""
    run_id: str | None
    """Id of that run on this server; None if it is not shown."""
    state: str
    why: str
    priority: int
    gang: str
    since: float
    """When it was submitted; of other states, when it last changed."""
    starts: float | None
    step: int | None
    steps: int | None
    left: float | None
    """Seconds until it finishes."""


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StopJob(_Asked):
    now: bool = False
    """Stop without a checkpoint."""


class RetryJob(_Asked):
    new: Id
    """Id of the new job."""


class Priority(_Asked):
    priority: PriorityOfJob
