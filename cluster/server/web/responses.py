"""What the dashboard's API takes and returns. Times are Unix seconds; what is missing or not finite is null."""

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from trainer.run.notes import MAX_NOTE, MAX_TAGS, MAX_VALUE

from .jobs_models import ClusterState, Machine, ShownJob

Text = Annotated[str, StringConstraints(max_length=10_000)]
Whole = Annotated[int, Field(ge=0, le=2**53)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run in one row. A tenth of the memory of a pydantic model, of which a server of many runs holds many."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    id: Text
    """What the API calls it: its folder's name; `SWEEP:NAME` of a trial, `ROOT:NAME` in a root but the first."""
    name: Text
    status: Text
    """RUNNING, FINISHED, FAILED, STOPPED, NEW (nothing has started), UNREADABLE."""
    reason: Text | None = None
    step: Whole = 0
    steps: Whole | None = None
    """train.steps."""
    loss: float | None = None
    eval_loss: float | None = None
    tokens: float | None = None
    tokens_per_second: float | None = None
    weight: float | None = None
    """What it was trained on, in its unit; the same as `tokens` where it is counted in them."""
    rate: float | None = None
    """Of the last step, in its unit per second."""
    unit: Text = "tokens"
    mfu: float | None = None
    attempts: Whole = 0
    wall_time: float = 0.0
    """Seconds over all attempts."""
    updated: float | None = None
    started: float | None = None
    sweep: Text | None = None
    family: Text | None = None
    task: Text | None = None
    parameters: Whole | None = None
    data: Text | None = None
    """Names of the folders of its data."""
    note: Text = ""
    tags: list[Text] = field(default_factory=list)
    """`key=value`, or `key` alone where the value is `true`."""
    colour: Annotated[int, Field(ge=0, le=6)] = 0
    """The number of its hue, from 1; 0: it has none yet."""

    def plain(self) -> dict[str, Any]:
        """Its fields by name."""
        return dict(zip(ROW, _values(self), strict=True))


ROW = tuple(each.name for each in fields(RunRow))
_values = attrgetter(*ROW)


class Runs(BaseModel):
    """All runs, by column, in the order in which they began."""

    count: int
    left: int
    """Runs that have not been read yet."""
    version: str
    columns: dict[str, list[Any]]
    places: list[int] | None = None
    """Where the rows belong among all runs, if these are only those that have changed or come since the version that
    was asked with; the others stand around them in their order."""
    gone: list[str] | None = None
    """Ids of rows that are there no more, likewise."""


class RunColumns(BaseModel):
    """Columns of config keys and metrics, beside those of `Runs`."""

    version: str
    ids: list[str] | None
    """Of the runs whose values these are: those that have changed or come since the version that was asked with; None:
    of all, in their order."""
    gone: list[str]
    late: int
    """Runs whose records have not been read yet: their values are older, or null."""
    columns: dict[str, list[Any]]


class Checkpoint(BaseModel):
    step: int
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRow(RunRow):
    """A run that is being trained."""

    spark: list[float | None]
    """Its loss so far, at most 60 points."""
    goodput: float | None
    checkpoint: Checkpoint | None
    left: float | None
    """Seconds until train.steps at its present pace."""


class Problem(BaseModel):
    level: str
    """failed or warning."""
    run: str | None
    what: str
    why: str
    then: str
    since: float | None


class Disk(BaseModel):
    path: str
    free: int
    total: int


class Goodput(BaseModel):
    seconds: float
    parts: list[tuple[str, float]]


class Now(BaseModel):
    problems: list[Problem]
    running: list[RunningRow]
    waiting: list[ShownJob]
    """Of the queue, the next one first."""
    jobs: list[ShownJob]
    """Those that run, and those of the last day that could be retried."""
    cluster: ClusterState | None
    """None: the server has no queue."""
    machines: list[Machine]
    ended: list[RunRow]
    goodput: Goodput
    disks: list[Disk]
    left: int
    time: float


class Keys(BaseModel):
    keys: list[str]
    metrics: list[str]


class TimeOfRun(BaseModel):
    """Where a run's time went."""

    fraction: float | None
    """In steps that count."""
    parts: list[tuple[str, float]]
    """What for, and seconds."""
    by_attempt: list[dict[str, Any]]
    later: bool
    """It takes a moment: ask for it by itself, as `/api/runs/{id}/goodput`."""


class Details(BaseModel):
    """A run; see `cluster.server.web.details`."""

    row: RunRow
    config: dict[str, Any]
    header: dict[str, Any]
    attempts: list[dict[str, Any]]
    marks: list[dict[str, Any]]
    goodput: TimeOfRun
    planned: list[dict[str, Any]]
    metrics: list[str]
    samples: list[dict[str, Any]]
    ranks: list[int]
    files: list[dict[str, Any]]
    tracking: dict[str, Any]
    experts: dict[str, int] | None
    references: dict[str, Any]
    scores: list[tuple[str, float]]
    """Of its last evaluation, beside the loss: the first few."""
    problems: list[str]
    """What of it could not be read."""


class Line(BaseModel):
    x: list[float]
    y: list[float | None]
    last: tuple[float, float | None] | None
    n: int
    """Steps of the record in the range."""
    infinite: list[tuple[float, int]]
    """Where a value is infinite, and its sign; the first hundred."""


class Series(BaseModel):
    metrics: dict[str, Line]
    x: str


class Experts(BaseModel):
    steps: list[int]
    load: list[list[float | None]]
    """[experts][steps]: share of an even load, 1.0 where all get the same."""


class Log(BaseModel):
    text: str
    offset: int
    """Where the text begins in the file, in bytes."""
    truncated: bool
    attempt: int | None


class Stacks(BaseModel):
    attempt: int | None
    reason: str | None
    time: float | None
    ranks: list[dict[str, Any]]


class Events(BaseModel):
    events: list[dict[str, Any]]
    next: int


class Comparison(BaseModel):
    runs: dict[str, Line]
    x: str
    metric: str
    differs: list[dict[str, Any]]


class Failure(BaseModel):
    error: str


class Login(BaseModel):
    model_config = ConfigDict(extra="forbid")
    token: Annotated[str, StringConstraints(max_length=1000)]


class Note(BaseModel):
    model_config = ConfigDict(extra="forbid")
    note: Annotated[str, StringConstraints(max_length=MAX_NOTE)]


class Tags(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tags: Annotated[list[Annotated[str, StringConstraints(max_length=MAX_VALUE + 200)]], Field(max_length=MAX_TAGS)]
    """All that the run has from now on."""


class Health(BaseModel):
    status: str
    server: str
    queue: bool
    """Whether jobs can be sent to it."""
    proof: str | None
    """See `auth.proof_of`."""


class Done(BaseModel):
    done: bool = True
