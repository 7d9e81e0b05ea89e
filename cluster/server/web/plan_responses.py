"""What the API of the pages Sweep and Plan returns. Times are Unix seconds; what is missing or not finite is null."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from configs.reading.parse import MAX_BYTES

from .jobs_models import PriorityOfJob

MOST_OVERRIDES = 100


class SweepLine(BaseModel):
    """A sweep in one line, by the runs that it has begun."""

    id: str
    name: str
    begun: int
    running: int
    finished: int
    failed: int
    best: float | None
    """Least held-out loss of a finished trial."""
    started: float
    updated: float


class SweepList(BaseModel):
    sweeps: list[SweepLine]


class Trial(BaseModel):
    name: str
    run: str | None
    """Its id among the runs; null: it has not begun."""
    variant: str
    budget: float | None
    """Training FLOPs asked for."""
    flops: float
    tokens: int
    parameters: dict[str, int]
    """By every convention."""
    step: int
    steps: int
    from_step: int
    state: str
    """waiting, running, stopped, finished, diverged, failed."""
    loss: float | None
    eval_loss: float | None
    reason: str
    updated: float | None
    values: dict[str, Any]
    """Of the sweep's axes."""


class SweepStatus(BaseModel):
    """As `muster sweep status --json`."""

    id: str
    name: str
    folder: str
    problem: str
    """Why its definition cannot be read; empty: it can."""
    design: str | None
    """isoflop, ladder, grid, random, optuna."""
    count: str
    """How N is counted."""
    axes: list[str]
    seeds: int
    unit: str
    """What its `tokens` count: tokens, or images or nodes of a plugin's family."""
    status: str
    counts: dict[str, int]
    open: int
    """Trials that the losses of those before will choose."""
    eta: float | None
    trials: list[Trial]


class SweepLaw(BaseModel):
    """What the sweep's finished trials say of larger ones; see `cluster.sweep.results.law_page`."""

    working: bool
    """It is being worked out: what is here is of before, or nothing."""
    computed: float | None
    law: dict[str, Any] | None


class SentConfig(BaseModel):
    """A preset's name or a config's text, and changes of it."""

    model_config = ConfigDict(extra="forbid")

    preset: Annotated[str, StringConstraints(max_length=200)] = ""
    text: Annotated[str, StringConstraints(max_length=MAX_BYTES)] = ""
    """YAML; empty: the preset as it is."""
    overrides: Annotated[
        list[Annotated[str, StringConstraints(max_length=4000)]], Field(max_length=MOST_OVERRIDES)
    ] = []


class PlanAsked(SentConfig):
    """What is to be planned, and on what."""

    gpu: Annotated[str, StringConstraints(max_length=40)] = "h100"
    gpus: int | None = None
    usd_per_gpu_hour: float | None = None


class RunAsked(SentConfig):
    """A run that is to be queued."""

    priority: PriorityOfJob = 0
    queue: bool = False
    """Accept it even if the cluster is too small now."""


class Needs(BaseModel):
    """What a run would reserve on the machines that there are, or why it would be refused."""

    gang: str = ""
    """`2 to 4 x (2 CPU, 1 GPU)`."""
    why: str = ""


class PlanOptions(BaseModel):
    """What the form offers."""

    presets: list[str]
    devices: list[dict[str, Any]]
    roots: list[str] | None
    """Folders that a run may be submitted to; None: the server has no queue."""


class Planned(BaseModel):
    """As `muster plan --json`, with what the form shows beside it."""

    error: str = ""
    """The command line's message; then there is nothing else."""
    key: str | None = None
    """The key or option that it names first."""
    plan: dict[str, Any] | None = None
    without: dict[str, Any] | None = None
    """The same with the other activation checkpointing."""
    used: dict[str, Any] = {}
    """Keys as they are used, by their dotted names."""
    notes: list[str] = []
    device: dict[str, Any] = {}
    commands: dict[str, str] = {}
    overrides: list[str] = []
    """Those of the run as it was planned."""
    run: str = ""
    """Its name."""


class Topologies(BaseModel):
    """As `muster plan --search --json`."""

    working: bool
    error: str = ""
    key: str | None = None
    found: dict[str, Any] | None = None
