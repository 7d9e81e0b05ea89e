"""Jobs as clients send them and as the journal stores them: every value is typed and bounded."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, ValidationError
from pydantic import model_validator as check_all

from configs.base import Typed
from configs.explain import first_reason
from configs.sections.run import folder_name

MOST_WORKERS = 100_000
"""Processes of a job."""


class BadMessage(ValueError):
    """A request to the queue is malformed or cannot be fulfilled; the text says why."""


class NoJob(BadMessage):
    """There is no such job."""


class Conflict(BadMessage):
    """The state of the job or of the queue does not allow it."""


def _job_id(id: str) -> str:
    # Names a file and a folder, and is part of a URL.
    if not re.fullmatch(r"job-[A-Za-z0-9._-]{1,196}", id):
        raise ValueError("it is not the id of a job, such as job-moe-3f9a1c")
    return id


def _printable(text: str) -> str:
    # Shown on terminals and part of a command: no control or format characters, no line breaks.
    if not text.isprintable() or not text:
        raise ValueError("it is empty or contains unprintable characters")
    return text


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("it is not an absolute path")
    return path


def _part(count: float) -> float:
    if 0 < count < 1e-4:  # which is what Ray counts in
        raise ValueError("it is less than 0.0001")
    return count


Id = Annotated[str, AfterValidator(_job_id)]
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]
Part = Annotated[float, Field(ge=0, le=100_000), AfterValidator(_part)]
Time = Annotated[float, Field(ge=0, le=1e11)]
State = Literal["QUEUED", "RUNNING", "FINISHED", "STOPPED", "FAILED", "CANCELLED", "LOST"]


class Job(Typed):
    """A job as its sender describes it."""

    name: Annotated[str, StringConstraints(max_length=255), AfterValidator(folder_name)]
    """Name of its run or sweep."""
    run_dir: Annotated[str, StringConstraints(max_length=4096), AfterValidator(_printable), AfterValidator(_absolute)]
    command: Annotated[str, StringConstraints(max_length=2**15), AfterValidator(_printable)]
    """Shell command, run in the copy of the sender's folder."""
    workers: Workers
    """Number of processes that it starts with."""
    most: Workers
    """Most processes that it may have."""
    cpus: Part
    """CPUs that each process reserves."""
    gpus: Part
    group: Workers
    """See `waiting.Gang`."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)]

    @check_all(mode="after")
    def _reserves(self) -> Self:
        if not self.cpus and not self.gpus:
            raise ValueError("its processes reserve neither CPUs nor GPUs")
        return self


class Known(Job):
    """A job as the journal stores it."""

    id: Id
    state: State
    submitted: Time
    time: Time
    started: Time | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest of its package."""
    retry_of: Id | None = None
    stopping: Literal["now", "checkpoint"] | None = None
    exit_code: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    reason: Annotated[str, StringConstraints(max_length=4096)] | None = None

    @check_all(mode="before")
    @classmethod
    def _of_older_journals(cls, entry: Any) -> Any:
        """Older journals lack `most`."""
        return {"most": entry["workers"]} | entry if isinstance(entry, dict) and "workers" in entry else entry

    def entry(self) -> dict[str, Any]:
        """Its entry in the journal; the id comes first."""
        return {"id": self.id} | self.model_dump(exclude_unset=True)

    def changed(self, **changes: Any) -> "Known":
        """A changed copy. Raises ValidationError."""
        return Known.model_validate(self.entry() | changes)


class Submit(Typed):
    """The message in a package: a new job."""

    do: Literal["submit"]
    id: Id
    job: Job


def parse(text: bytes) -> Submit:
    """Parse a message. Raises BadMessage."""
    try:
        return Submit.model_validate_json(text)
    except ValidationError as error:
        raise BadMessage(first_reason(error)) from None
