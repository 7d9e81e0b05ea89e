"""What the API of a cluster's queue takes and returns. Times are Unix seconds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..messages import Id, Known


class JobOutlook(BaseModel):
    """How a job probably goes on."""

    step: int | None
    """Of its run; of a sweep the trials that are finished. None: nothing is known of it here."""
    steps: int | None
    eta: float | None
    """Seconds until it is finished."""
    why: str
    """It waits, has failed, or is not what it was asked to be."""
    starts: float | None
    """When it probably starts, if what runs ends when it is expected to."""


class JobRow(Known):
    """A job as the journal has it, and how it probably goes on."""

    ahead: int
    """Jobs that wait before it."""
    outlook: JobOutlook


class Jobs(BaseModel):
    """All jobs that are kept, the oldest first."""

    jobs: list[JobRow]
    reachable: bool
    """Whether the server reaches Ray; else what it says of jobs that run is what it knew last."""
    why: str


class Use(BaseModel):
    """What one driver reserves of a machine."""

    by: str
    """Id of a job, or `driver ID` of what is none of the queue."""
    workers: int
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
    """The cluster as it was last seen."""

    address: str
    """host:port of Ray's head."""
    reachable: bool
    why: str
    """Why Ray is not reached."""
    since: float
    """Since when it is, or is not."""
    seen: float
    """When the machines were last looked at."""
    time: float
    """When this was answered."""


class Machines(ClusterState):
    machines: list[Machine]


class JobLog(BaseModel):
    """A piece of what a job's driver has printed."""

    text: str
    next: int
    """Where the next piece begins, in bytes."""
    there: bool
    """Whether there is any output on this cluster."""
    ended: bool
    """Nothing comes after this piece."""
    state: str


class ShownJob(BaseModel):
    """A job on the page of what needs a person."""

    id: str
    run: str
    """Name of its run."""
    run_id: str | None
    """What the API calls that run; None: it is not shown here."""
    state: str
    why: str
    priority: int
    gang: str
    since: float
    """It was submitted, or has been in its state."""
    starts: float | None
    step: int | None
    steps: int | None
    left: float | None
    """Seconds until it is finished."""


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StopJob(_Asked):
    now: bool = False
    """Without a checkpoint."""


class RetryJob(_Asked):
    new: Id
    """Id of the new job."""


class Priority(_Asked):
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)]
