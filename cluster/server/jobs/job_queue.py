"""The jobs of a cluster and their journal, on the disk of the cluster's head. Knows neither Ray nor HTTP.

The journal is the state. An entry is fsynced before it takes effect, so that a change that was acknowledged survives
any crash.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import Timeout

from cluster.gangs.access_token import own_addresses
from configs import ConfigError, counted, private_folder
from configs.reading.parse import clip
from trainer.files.durable import fsync, replace_bytes, replacing
from trainer.files.lock_file import lock_file
from trainer.files.own_files import no_link, open_file

from ..messages import BadMessage, Conflict, Job, Known, NoJob, Submit
from ..waiting import ACTIVE, CANCELLED, FAILED, QUEUED, RUNNING, fold

KEPT_PACKAGES, KEPT_JOBS = 100, 2000
"""How many packages and jobs are kept of those that have ended."""
MOST_ACTIVE = 1000
"""Most jobs that are queued or running."""
LONGEST_LINE = 2**17
"""Most bytes of a journal line that are read; no entry is as long."""
COMPACTED_AFTER = 20_000
"""Appended entries after which the journal is compacted."""
UPLOAD = ".upload-"
"""Prefix of the names of packages that are still being received."""


class NotWritten(OSError):
    """The journal cannot be written; nothing has changed."""


def queue_folder(address: str) -> Path:
    """State folder of the queue whose Ray head is at host:port: MUSTER_QUEUE, or one per address under ~/.muster/queue.

    A new head at the same address finds the folder again, whichever of the machine's addresses named it before.
    """
    if given := os.environ.get("MUSTER_QUEUE"):
        return Path(given)
    host, _, port = address.rpartition(":")
    names = [address, *own_addresses(port)] if host in ("127.0.0.1", "localhost", *_own_hosts(port)) else [address]
    above = Path.home() / ".muster" / "queue"
    folders = [above / name.replace(":", "-") for name in dict.fromkeys(names)]
    return next((folder for folder in folders if (folder / "journal.jsonl").exists()), folders[0])


def _own_hosts(port: str) -> list[str]:
    return [address.rpartition(":")[0] for address in own_addresses(port)]


@contextlib.contextmanager
def locked(here: Path) -> Iterator[None]:
    """Make a queue's folder private and hold its lock. Raises ConfigError if another server holds it."""
    private_folder(here, "MUSTER_QUEUE")
    try:
        held = lock_file(here / "lock", patience=0).acquire()
    except Timeout:
        raise ConfigError(f"another queue keeps its state in {here}: set MUSTER_QUEUE on the head") from None
    with held:
        yield


class JobQueue:
    """The jobs of a cluster. Thread-safe; when a method returns, its change is on disk.

    Args:
        here: state folder, which nothing else writes to (see `locked`).

    Attributes:
        version: incremented with every change of a job.
        woken: set on every change; the scheduler waits for it.
        on_change: called on every change, by the thread that makes it.
    """

    def __init__(self, here: Path) -> None:
        self.here = here
        self.version = 0
        self.woken = threading.Event()
        self.on_change: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._journal: int | None = None
        self._jobs = self._read_journal()
        self._unsettled = set(self.ids(QUEUED))
        for left in here.glob(f"{UPLOAD}*"):
            left.unlink(missing_ok=True)
        self._rewrite()

    # Reading.

    def jobs(self) -> dict[str, Known]:
        """All jobs by id, oldest first."""
        with self._lock:
            return dict(self._jobs)

    def job(self, id: str) -> Known:
        """Raises NoJob."""
        with self._lock:
            if id not in self._jobs:
                raise NoJob(f"there is no job {clip(id, 200)}")
            return self._jobs[id]

    def ids(self, *states: str) -> list[str]:
        with self._lock:
            return [id for id, job in self._jobs.items() if job.state in states]

    # Requests, all of them idempotent.

    def upload(self) -> Path:
        """A new path in the queue's folder for a package that is being received."""
        return self.here / f"{UPLOAD}{os.urandom(8).hex()}"

    def submit(self, message: Submit, received: Path, sha256: str) -> Known:
        """Add a job.

        Args:
            received: its package, at a path from `upload`; renamed if the job is new.
            sha256: digest of the package.

        Raises:
            Conflict: another job has this id, or the queue is full.
            OSError: the package or the journal cannot be written.
        """
        fsync(received)
        with self._lock:
            if (known := self._jobs.get(message.id)) is not None:
                if known.sha256 != sha256:
                    raise Conflict(f"{message.id} is the id of another job")
                return known
            self._check_room()
            os.replace(received, self.package(message.id))
            fsync(self.here)
            return self._enqueue(message.id, message.job, sha256)

    def stop(self, id: str, now: bool) -> Known:
        """Cancel a queued job, or ask a running one to stop: after a checkpoint, or at once.

        Raises:
            NoJob: there is no such job.
            NotWritten: the journal cannot be written.
        """
        with self._lock:
            job = self.job(id)
            if job.state == QUEUED and id not in self._unsettled:
                return self._note(id, state=CANCELLED)
            wanted = "now" if now else "checkpoint"
            if job.state not in ACTIVE or job.stopping in (wanted, "now"):
                return job
            return self._note(id, stopping=wanted)

    def retry(self, id: str, new: str) -> Known:
        """Queue a job that has ended again, as it was sent.

        Args:
            new: id of the new job.

        Raises:
            NoJob: there is no such job.
            Conflict: it has not ended, `new` is the id of another job, or the queue is full.
            BadMessage: its package was deleted or changed.
            OSError: the package or the journal cannot be written.
        """
        with self._lock:
            if known := self._retried(id, new):
                return known
            old = self.job(id)
            if old.state in ACTIVE:
                raise Conflict(f"{id} is {old.state}: stop it first")
            self._check_room()
        content = self.content(old)  # not under the lock: it may have 100 MiB
        replace_bytes(self.package(new), content)
        with self._lock:
            return self._retried(id, new) or self._enqueue(new, old, old.sha256, retry_of=id)

    def set_priority(self, id: str, priority: int) -> Known:
        """Change the priority of a queued job.

        Raises:
            NoJob: there is no such job.
            Conflict: it is not queued.
            NotWritten: the journal cannot be written.
        """
        with self._lock:
            job = self.job(id)
            if job.state != QUEUED:
                raise Conflict(f"{id} is {job.state}: only the priority of a waiting job can be changed")
            return job if job.priority == priority else self._note(id, priority=priority)

    # For the scheduler.

    def begin(self, id: str) -> Known | None:
        """Begin to start a queued job: until `settle`, only Ray knows whether it runs, so `stop` cannot cancel it.

        Returns:
            The job, or None if it is no longer to be started.
        """
        with self._lock:
            job = self._jobs[id]
            if job.state != QUEUED or job.stopping:
                return None
            self._unsettled.add(id)
            return job

    def settle(self, id: str, started: bool) -> None:
        """Record whether Ray has started a job that is QUEUED."""
        with self._lock:
            job = self._jobs[id]
            if started and job.state == QUEUED:
                self._note(id, state=RUNNING, started=time.time())
            elif job.state == QUEUED and job.stopping:
                self._note(id, state=CANCELLED)
            self._unsettled.discard(id)

    def unsettled(self) -> list[str]:
        """Queued jobs that Ray may have started already: just before a crash, or as the connection to it was lost."""
        with self._lock:
            return list(self._unsettled)

    def end(self, id: str, **how: Any) -> None:
        """Record how a job ended, unless it has ended already."""
        with self._lock:
            if self._jobs[id].state in ACTIVE:
                self._note(id, **how)
            self._unsettled.discard(id)

    def package(self, id: str) -> Path:
        return self.here / f"{id}.zip"

    def content(self, job: Known) -> bytes:
        """A job's package. Raises BadMessage if it was deleted or changed."""
        return read_package(self.package(job.id), job.id, job.sha256)

    # The journal.

    def _check_room(self) -> None:
        if len(self.ids(*ACTIVE)) >= MOST_ACTIVE:
            raise Conflict(f"{MOST_ACTIVE} jobs are already waiting or running")

    def _retried(self, id: str, new: str) -> Known | None:
        """The job that this very retry has made already. Raises Conflict if `new` is another job."""
        if (known := self._jobs.get(new)) is not None and known.retry_of != id:
            raise Conflict(f"{new} is the id of another job")
        return known

    def _enqueue(self, id: str, job: Job, sha256: str | None, **more: Any) -> Known:
        asked = job.model_dump(include=set(Job.model_fields))
        known = self._note(id, **asked, **more, state=QUEUED, submitted=time.time(), sha256=sha256)
        ended = [id for id, job in self._jobs.items() if job.state not in ACTIVE]
        for old in ended[:-KEPT_PACKAGES]:
            self.package(old).unlink(missing_ok=True)
        for old in ended[:-KEPT_JOBS]:
            del self._jobs[old]
        if self._appended > COMPACTED_AFTER:
            self._rewrite()
        return known

    def _note(self, id: str, **changes: Any) -> Known:
        """Append an entry to the journal, then apply it. Raises NotWritten; then nothing has changed."""
        entry = {"id": id} | changes | {"time": time.time()}
        known = self._jobs.get(id)
        job = known.changed(**entry) if known else Known.model_validate(entry)
        self._append(json.dumps(entry).encode() + b"\n")
        self._jobs[id] = job
        self.version += 1
        self.woken.set()
        self.on_change()
        return job

    def _append(self, line: bytes) -> None:
        assert self._journal is not None
        file = self._journal
        end, written = os.fstat(file).st_size, 0
        try:
            while written < len(line):
                written += os.write(file, line[written:])
            os.fsync(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)  # else the next entry would continue half a line
            raise NotWritten(error.errno, error.strerror, str(self.here / "journal.jsonl")) from None
        self._appended += 1

    def _rewrite(self) -> None:
        """Replace the journal by one entry per job."""
        with replacing(self.here / "journal.jsonl") as file:
            file.writelines(json.dumps(job.entry()).encode() + b"\n" for job in self._jobs.values())
        if self._journal is not None:
            os.close(self._journal)
        self._journal = no_link(str(self.here / "journal.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._appended = 0

    def _read_journal(self) -> dict[str, Known]:
        """The jobs to keep: all that are queued or running, and the newest that have ended."""
        path, bad = self.here / "journal.jsonl", Counter[str]()

        def skip(line: str) -> None:
            bad[next(iter(bad), clip(line, 200))] += 1

        if not path.exists():
            return {}
        with path.open("rb") as file:
            jobs = fold(_lines(file), skip)
        for first, count in bad.items():
            print(f"skipped {counted(count, 'line')} of {path} that describe no job, the first: {first}", flush=True)
        active = [id for id, job in jobs.items() if job.state in ACTIVE]
        for id in active[MOST_ACTIVE:]:
            jobs[id] = jobs[id].changed(state=FAILED, reason=f"more than {MOST_ACTIVE} jobs are waiting or running")
        ended = [id for id, job in jobs.items() if job.state not in ACTIVE]
        for id in ended[:-KEPT_JOBS]:
            del jobs[id]
        return jobs


def read_package(path: Path, id: str, sha256: str | None) -> bytes:
    """Read a job's package. Raises BadMessage if it is missing, a link, or has another digest."""
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise BadMessage(f"the package of {id} is no longer kept ({error.strerror}): submit it again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BadMessage(f"the package of {id} is not what was sent (its SHA-256 differs): submit it again")
    return content


def _lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a journal; overlong ones are truncated, which makes them invalid."""
    while line := file.readline(LONGEST_LINE):
        yield line.decode(errors="replace")
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
