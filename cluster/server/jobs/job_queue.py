"""The jobs of a cluster and the journal of what became of each, on the disk of the cluster's head.

The state is what the journal says. An entry is on disk before it counts: who was told of a change finds it again after
any crash. Knows nothing of Ray and of HTTP.
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
"""Of jobs that have ended."""
MOST_ACTIVE = 1000
"""Jobs that wait or run."""
LONGEST_LINE = 2**17
"""Bytes of a line of the journal: more than the longest that is written."""
COMPACTED_AFTER = 20_000
"""Lines that are appended to the journal before it is written anew, with what is kept."""
UPLOAD = ".upload-"
"""Beginning of the names of packages that are still being received."""


class NotWritten(OSError):
    """The journal cannot be written, so that nothing has changed."""


def queue_folder(address: str) -> Path:
    """Where the queue of the cluster whose head is at host:port keeps its state: MUSTER_QUEUE, or a folder for each
    cluster, which a new head at the old address finds again, by whichever of the machine's addresses it was named."""
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
    """Hold a queue's folder, made private, during the block. Raises ConfigError: another server holds it."""
    private_folder(here, "MUSTER_QUEUE")
    try:
        held = lock_file(here / "lock", patience=0).acquire()
    except Timeout:
        raise ConfigError(f"another queue keeps its state in {here}: set MUSTER_QUEUE on the head") from None
    with held:
        yield


class JobQueue:
    """The jobs of a cluster. Any thread may call any method; what a method has returned is on disk.

    Args:
        here: the folder of its state, which nothing else writes to (`locked`).

    Attributes:
        version: changes with every change of a job.
        woken: set with every change, for the scheduler to wait on.
        on_change: called with every change, by the thread that makes it.
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

    # What there is.

    def jobs(self) -> dict[str, Known]:
        """All jobs by id, the oldest first."""
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

    # What is asked of it. The same twice is done once.

    def upload(self) -> Path:
        """A new name in the queue's folder for a package that is being received."""
        return self.here / f"{UPLOAD}{os.urandom(8).hex()}"

    def submit(self, message: Submit, received: Path, sha256: str) -> Known:
        """Take in a new job.

        Args:
            received: the file of its package, from `upload`; it is renamed, or stays where the job is there already.
            sha256: of its package.

        Raises:
            Conflict: another package has this id, or there are too many jobs.
            OSError: it cannot be written.
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
        """Ask for the end of a job, after a checkpoint or at once; one that has not been started never is.

        Raises:
            NoJob: there is none of this id.
            OSError: it cannot be written.
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
        """Queue a job that has ended once more, as it was sent.

        Args:
            new: id of the new job.

        Raises:
            NoJob: there is none of this id.
            Conflict: it has not ended, `new` is the id of another job, or there are too many.
            BadMessage: its package is kept no longer, or was changed.
            OSError: it cannot be written.
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
        """Change the priority of a job that waits.

        Raises:
            NoJob: there is none of this id.
            Conflict: it does not wait.
            OSError: it cannot be written.
        """
        with self._lock:
            job = self.job(id)
            if job.state != QUEUED:
                raise Conflict(f"{id} is {job.state}: only the priority of a job that waits can be changed")
            return job if job.priority == priority else self._note(id, priority=priority)

    # What the scheduler does.

    def begin(self, id: str) -> Known | None:
        """A job that waits and is to be started now; until `settle` it can be stopped, but not cancelled.

        Returns:
            None: it does not wait any more.
        """
        with self._lock:
            job = self._jobs[id]
            if job.state != QUEUED or job.stopping:
                return None
            self._unsettled.add(id)
            return job

    def settle(self, id: str, started: bool) -> None:
        """Note whether Ray has started a job that was QUEUED, as it says itself."""
        with self._lock:
            job = self._jobs[id]
            if started and job.state == QUEUED:
                self._note(id, state=RUNNING, started=time.time())
            elif job.state == QUEUED and job.stopping:
                self._note(id, state=CANCELLED)
            self._unsettled.discard(id)

    def unsettled(self) -> list[str]:
        """Jobs that may have been started just before a crash, or while Ray was lost: nobody knows but Ray."""
        with self._lock:
            return list(self._unsettled)

    def end(self, id: str, **how: Any) -> None:
        """Note the end of a job, unless it has ended."""
        with self._lock:
            if self._jobs[id].state in ACTIVE:
                self._note(id, **how)
            self._unsettled.discard(id)

    def package(self, id: str) -> Path:
        return self.here / f"{id}.zip"

    def content(self, job: Known) -> bytes:
        """A job's package, as it was sent. Raises BadMessage."""
        return read_package(self.package(job.id), job.id, job.sha256)

    # The journal.

    def _check_room(self) -> None:
        if len(self.ids(*ACTIVE)) >= MOST_ACTIVE:
            raise Conflict(f"{MOST_ACTIVE} jobs wait or run already")

    def _retried(self, id: str, new: str) -> Known | None:
        """What a retry has made of it before. Raises Conflict: something else has."""
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
        """Into the journal, and then into the state. Raises NotWritten: into neither."""
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
                os.ftruncate(file, end)  # the next line would go on where half of this one ends
            raise NotWritten(error.errno, error.strerror, str(self.here / "journal.jsonl")) from None
        self._appended += 1

    def _rewrite(self) -> None:
        """The journal anew, with an entry for each job."""
        with replacing(self.here / "journal.jsonl") as file:
            file.writelines(json.dumps(job.entry()).encode() + b"\n" for job in self._jobs.values())
        if self._journal is not None:
            os.close(self._journal)
        self._journal = no_link(str(self.here / "journal.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._appended = 0

    def _read_journal(self) -> dict[str, Known]:
        """The jobs that are kept: those that wait or run, and the newest of the others."""
        path, bad = self.here / "journal.jsonl", Counter[str]()

        def skip(line: str) -> None:
            bad[next(iter(bad), clip(line, 200))] += 1

        if not path.exists():
            return {}
        with path.open("rb") as file:
            jobs = fold(_lines(file), skip)
        for first, count in bad.items():
            print(
                f"skipped {counted(count, 'line')} of {path} that say nothing of a job, the first: {first}", flush=True
            )
        active = [id for id, job in jobs.items() if job.state in ACTIVE]
        for id in active[MOST_ACTIVE:]:
            jobs[id] = jobs[id].changed(state=FAILED, reason=f"more than {MOST_ACTIVE} jobs wait or run")
        ended = [id for id, job in jobs.items() if job.state not in ACTIVE]
        for id in ended[:-KEPT_JOBS]:
            del jobs[id]
        return jobs


def read_package(path: Path, id: str, sha256: str | None) -> bytes:
    """A job's package. Raises BadMessage: it is gone, a link, or not what was sent."""
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise BadMessage(f"the package of {id} is kept no longer ({error.strerror}): submit it again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BadMessage(f"the package of {id} is not what was sent (another sha256): submit it again")
    return content


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Of a journal; those that are too long are cut, and say nothing then."""
    while line := file.readline(LONGEST_LINE):
        yield line.decode(errors="replace")
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
