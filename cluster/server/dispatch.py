"""The queue's one process on the head: takes messages, starts jobs when their gang fits whole, keeps the journal.

It is a Ray job itself, so that whoever reaches the job API reaches it: messages are left beside Ray's packages, and
its output is its journal. A waiting job costs a file. The journal and the packages of jobs outlive the cluster on disk,
under MUSTER_QUEUE or ~/.muster/queue.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import Timeout

from configs import ConfigError, ExitCode, counted, private_folder
from configs.reading.parse import clip
from trainer.files.durable import replace_bytes, replacing
from trainer.files.lock_file import lock_file
from trainer.files.own_files import open_file

from .messages import BadMessage, Job, Known, Stop, Submit
from .outlook import last_words
from .pack import TOP, read_message
from .waiting import (
    ACTIVE,
    CANCELLED,
    FAILED,
    FINISHED,
    LOST,
    QUEUED,
    RUNNING,
    STOPPED,
    Gang,
    Waiting,
    fits,
    fold,
    gang_of,
    startable,
)

MESSAGES = "muster-message-"
READY = "the queue is ready"
TICK = 0.5
KEPT_PACKAGES, KEPT_JOBS = 100, 2000
MOST_ACTIVE = 1000
"""Jobs that wait or run."""
MOST_BUNDLES = 100_000
"""Processes that the autoscaler is asked to find room for."""
LONGEST_LINE = 2**17
"""Of the journal: more than the longest that is written."""
LAST_OUTPUT = 1 << 16
"""Characters of a driver's output that are searched for why it failed."""
STOP_WAIT = 3600
"""Seconds that Ray gives a job between SIGTERM and SIGKILL: time for a checkpoint, where its default is 3."""


def folder() -> Path:
    """Where a queue keeps its state: one folder for each cluster, which a new head at the old address finds again."""
    if given := os.environ.get("MUSTER_QUEUE"):
        return Path(given)
    return Path.home() / ".muster" / "queue" / os.environ["RAY_ADDRESS"].replace(":", "-")


def serve() -> None:
    """Run the queue of the cluster RAY_ADDRESS until the cluster ends."""
    here = private_folder(folder(), "MUSTER_QUEUE")
    try:
        held = lock_file(here / "lock", patience=0).acquire()
    except Timeout:
        raise ConfigError(f"another queue keeps its state in {here}: set MUSTER_QUEUE on the head") from None
    with held:
        import ray

        from cluster.gangs import ray_private

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
        queue = _Queue(here, ray_private.job_api())
        queue.tick()  # what ran on a cluster that is gone is LOST from now on
        print(READY, flush=True)
        while True:
            queue.tick()
            time.sleep(TICK)


class _Queue:
    """State of the queue: what its journal says."""

    def __init__(self, here: Path, client: Any) -> None:
        self.here, self.client = here, client
        self.asked_for: list[Gang] | None = None
        self.jobs = self._read_journal()
        with replacing(here / "journal.jsonl") as file:
            file.writelines(json.dumps(job.entry()).encode() + b"\n" for job in self.jobs.values())
        self.journal = (here / "journal.jsonl").open("ab")
        for job in self.jobs.values():
            print(json.dumps(job.entry()), flush=True)

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

    def tick(self) -> None:
        for name, content in _messages():
            try:
                self._handle(content)
            except Exception as error:  # kept, it would end this process for ever
                _refuse(name, error)
            _delete(name)
        running = {id: self._follow(id) for id in self._ids(RUNNING)}
        waiting = [
            Waiting(id, gang_of(job), job.priority, job.submitted)
            for id, job in self.jobs.items()
            if job.state == QUEUED
        ]
        if waiting:
            drivers = _placed_drivers(self.client) if running else set()
            starting = [gang_of(self.jobs[id]) for id, driver in running.items() if driver not in drivers]
            from cluster.gangs.ray_nodes import machines  # Ray, which who only sends messages does not need

            there = machines()
            free, total = [machine.free for machine in there], [machine.total for machine in there]
            for id in startable(waiting, starting, free, total):
                self._start(id)
            sizes = Counter(total)
            self._ask_for_machines([job.gang for job in waiting if not fits(job.gang, sizes)])
        else:
            self._ask_for_machines([])

    def _ask_for_machines(self, gangs: list[Gang]) -> None:
        """Tell Ray's autoscaler what must fit, beside what runs: it sees no job that has not started."""
        running = [gang_of(self.jobs[id]) for id in self._ids(RUNNING)] if gangs else []
        asked: list[Gang] = []
        left = MOST_BUNDLES
        for gang in (*running, *gangs):
            if gang.workers <= left:
                asked.append(gang)
                left -= gang.workers
        if asked != self.asked_for:
            from ray.autoscaler.sdk import request_resources

            bundles = []
            for gang in asked:
                each = {"CPU": gang.each.cpus} | ({"GPU": gang.each.gpus} if gang.each.gpus else {})
                bundles += [each] * gang.workers
            request_resources(bundles=bundles)
            self.asked_for = asked

    def _ids(self, *states: str) -> list[str]:
        return [id for id, job in self.jobs.items() if job.state in states]

    def _note(self, id: str, **changes: Any) -> None:
        """Into the journal, on disk before anyone reads it."""
        entry = {"id": id} | changes | {"time": time.time()}
        known = self.jobs.get(id)
        self.jobs[id] = known.changed(**entry) if known else Known.model_validate(entry)
        line = json.dumps(entry)
        self.journal.write(line.encode() + b"\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())
        print(line, flush=True)

    def _package(self, id: str) -> Path:
        return self.here / f"{id}.zip"

    def _content(self, id: str) -> bytes:
        """A job's package, as it was sent. Raises BadMessage."""
        try:
            with open_file(self._package(id)) as file:
                content = file.read()
        except OSError as error:
            raise BadMessage(f"the package of {id} is kept no longer ({error.strerror}): submit it again") from None
        if hashlib.sha256(content).hexdigest() != self.jobs[id].sha256:
            raise BadMessage(f"the package of {id} is not what was sent (another sha256): submit it again")
        return content

    def _handle(self, content: bytes) -> None:
        """A message: a new job, or what to do with one. Seen twice after a crash, it does nothing the second time.

        Raises:
            BadMessage: it is refused.
        """
        message = read_message(content)
        id = message.id
        if isinstance(message, Submit):
            if id not in self.jobs:
                self._enqueue(id, content, message.job)
            return
        if id not in self.jobs:
            raise BadMessage(f"there is no job {id}")
        if isinstance(message, Stop):
            self._stop(id, message.now)
        elif message.new not in self.jobs:
            old = self.jobs[id]
            if old.state in ACTIVE:
                raise BadMessage(f"{id} is {old.state}: stop it first")
            self._enqueue(message.new, self._content(id), old, retry_of=id)

    def _enqueue(self, id: str, content: bytes, job: Job, **more: Any) -> None:
        if len(self._ids(*ACTIVE)) >= MOST_ACTIVE:
            raise BadMessage(f"{MOST_ACTIVE} jobs wait or run already")
        replace_bytes(self._package(id), content)
        digest = hashlib.sha256(content).hexdigest()
        asked = job.model_dump(include=set(Job.model_fields))
        self._note(id, **asked, **more, state=QUEUED, submitted=time.time(), sha256=digest)
        ended = [id for id, job in self.jobs.items() if job.state not in ACTIVE]
        for old in ended[:-KEPT_PACKAGES]:
            self._package(old).unlink(missing_ok=True)

    def _start(self, id: str) -> None:
        from cluster.gangs import ray_private

        job = self.jobs[id]
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT)}
        # A name for each job: of one that it knows Ray would run what lies unpacked already, whoever changed it.
        package = f"gcs://{id}.zip"
        try:
            ray_private.put(package, self._content(id))
            self.client.submit_job(
                submission_id=id,
                entrypoint=f"cd {TOP} && exec {command_of(job)}",
                runtime_env={"working_dir": package, "env_vars": environment},
                metadata={"run": job.name, "run_dir": job.run_dir},
            )
        except Exception as error:
            if "already exists" not in str(error):  # it was started just before a crash of this process
                _delete(package.encode())
                self._note(id, state=FAILED, reason=f"could not be started: {clip(error)}")
                return
        self._note(id, state=RUNNING, started=time.time())

    def _follow(self, id: str) -> str | None:
        """Note the end of a running job. Returns Ray's id of its driver, once it has one."""
        try:
            return self._look(id)
        except OSError:  # the job API does not answer now
            return None
        except Exception as error:
            with contextlib.suppress(Exception):
                self.client.stop_job(id)
            self._note(id, state=FAILED, reason=f"could not be followed: {type(error).__name__}: {clip(error)}")
            return None

    def _look(self, id: str) -> str | None:
        from cluster.gangs import ray_private

        try:
            info = self.client.get_job_info(id)
        except ray_private.JobApiError as error:
            if error.status == 404:
                self._note(id, state=LOST, reason="the cluster that ran it is gone")
            return None
        if self.jobs[id].stopping == "now":
            _signal_driver(info)
        if info.status.is_terminal():
            code = 0 if info.status.value == "SUCCEEDED" else info.driver_exit_code
            stopped = code == ExitCode.STOPPED or info.status.value == "STOPPED"
            state = FINISHED if code == 0 else STOPPED if stopped else FAILED
            reason = None
            if state == FAILED:
                reason = self._why_failed(id, code, info.message or "")
            self._note(id, state=state, exit_code=code, reason=reason)
        return info.driver_info.id if info.driver_info else None

    def _why_failed(self, id: str, code: int | None, message: str) -> str:
        """In the words of its driver, if it had any; Ray's message ends with the last few lines of its output."""
        if code is None:
            return clip(message)
        if code < 0 or code > 128:  # of a shell
            return f"its driver was killed by signal {-code if code < 0 else code - 128}"
        output = message.partition("\n")[2]
        if "muster: " not in output:  # it stands before a traceback
            with contextlib.suppress(Exception):  # that it failed is more important than why
                output = str(self.client.get_job_logs(id))[-LAST_OUTPUT:]
        return last_words(output) or f"exit code {code}"

    def _stop(self, id: str, now: bool) -> None:
        state = self.jobs[id].state
        if state == QUEUED:
            self._note(id, state=CANCELLED)
        elif state == RUNNING:
            # Ray's SIGTERM lets the run write a checkpoint; a second one ends it at once (cluster.attempts.launch).
            self.client.stop_job(id)
            self._note(id, stopping="now" if now else "checkpoint")


def command_of(job: Known) -> str:
    """A job's line of shell. A run is told when it was submitted: what it waited is in its goodput."""
    return f"{job.command} --submitted={job.submitted}" if job.command.startswith("muster train ") else job.command


def _signal_driver(info: Any) -> None:
    """One more SIGTERM to a job's driver, which Ray runs on the head as it does this process."""
    import ray

    driver = info.driver_info
    if driver and driver.node_ip_address == ray.util.get_node_ip_address() and not info.status.is_terminal():
        with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
            os.kill(int(driver.pid), signal.SIGTERM)


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Of a journal; those that are too long are cut, and say nothing then."""
    while line := file.readline(LONGEST_LINE):
        yield line.decode(errors="replace")
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)


def _refuse(name: bytes, error: Exception) -> None:
    """Say why a message is refused, where its sender looks (`queue.refusals`)."""
    kind = "" if isinstance(error, BadMessage) else f"{type(error).__name__}: "
    shown = clip(name.decode(errors="replace").removeprefix("gcs://"), 200)
    print(json.dumps({"refused": shown, "reason": f"{kind}{clip(error)}"}), flush=True)


def _messages() -> Iterator[tuple[bytes, bytes]]:
    from cluster.gangs import ray_private

    for name in sorted(ray_private.names(f"gcs://{MESSAGES}")):
        if (content := ray_private.get(name)) is not None:
            yield name, content


def _delete(name: bytes) -> None:
    from cluster.gangs import ray_private

    ray_private.delete(name)


def _placed_drivers(client: Any) -> set[str]:
    """Drivers whose placement group stands: what they hold is no longer free."""
    from ray.util.state import list_placement_groups

    groups = list_placement_groups(
        address=client.get_address(), filters=[("state", "=", "CREATED")], limit=10_000, raise_on_missing_output=False
    )
    return {group.creator_job_id for group in groups}
