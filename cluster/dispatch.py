"""The queue's one process on the head: takes messages, starts jobs when their gang fits whole, keeps the journal.

It is a Ray job itself, so that whoever reaches the job API reaches it: messages are left beside Ray's packages, and
its output is its journal. A waiting job costs a file. The journal and the packages of jobs outlive the cluster on disk,
under MUSTER_QUEUE or ~/.muster/queue.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import ConfigError

from .pack import JOB, TOP, BadMessage, read_message
from .queue import (
    CANCELLED,
    FAILED,
    FINISHED,
    LOST,
    QUEUED,
    RUNNING,
    STOPPED,
    Gang,
    Waiting,
    fold,
    gang_of,
    place,
    startable,
)

MESSAGES = "muster-message-"
READY = "the queue is ready"
TICK = 0.5
KEPT_PACKAGES, KEPT_JOBS = 100, 2000
STOP_WAIT = 3600
"""Seconds that Ray gives a job between SIGTERM and SIGKILL: time for a checkpoint, where its default is 3."""


def folder() -> Path:
    """Where a queue keeps its state: one folder for each cluster, which a new head at the old address finds again."""
    if given := os.environ.get("MUSTER_QUEUE"):
        return Path(given)
    return Path.home() / ".muster" / "queue" / os.environ["RAY_ADDRESS"].replace(":", "-")


def serve() -> None:
    """Run the queue of the cluster RAY_ADDRESS until the cluster ends."""
    here = folder()
    here.mkdir(parents=True, exist_ok=True)
    with (here / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another queue keeps its state in {here}: set MUSTER_QUEUE on the head") from None
        import ray
        from ray.job_submission import JobSubmissionClient

        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
        queue = _Queue(here, JobSubmissionClient())
        queue.tick()  # what ran on a cluster that is gone is LOST from now on
        print(READY, flush=True)
        while True:
            queue.tick()
            time.sleep(TICK)


class _Queue:
    """State of the queue: what its journal says."""

    def __init__(self, here: Path, client: Any) -> None:
        self.here, self.client = here, client
        self.asked_for: list[dict[str, float]] | None = None
        journal = here / "journal.jsonl"
        self.jobs = fold(journal.read_text().splitlines()) if journal.exists() else {}
        self.jobs = dict(list(self.jobs.items())[-KEPT_JOBS:])
        temporary = here / ".journal"
        temporary.write_text("".join(json.dumps(job) + "\n" for job in self.jobs.values()))
        os.replace(temporary, journal)
        self.journal = journal.open("a")
        for job in self.jobs.values():
            print(json.dumps(job), flush=True)

    def tick(self) -> None:
        for name, message in _messages():
            try:
                self._handle(message)
            except BadMessage as error:  # kept, it would end this process for ever
                print(f"refused a message: {error}", flush=True)
            _delete(name)
        running = {id: self._follow(id) for id in self._ids(RUNNING)}
        waiting = [
            Waiting(id, gang_of(job), job["priority"], job["submitted"])
            for id, job in self.jobs.items()
            if job["state"] == QUEUED
        ]
        if waiting:
            drivers = _placed_drivers(self.client) if running else set()
            starting = [gang_of(self.jobs[id]) for id, driver in running.items() if driver not in drivers]
            from .ray_nodes import machines  # Ray, which who only sends messages does not need

            there = machines()
            free, total = [machine.free for machine in there], [machine.total for machine in there]
            for id in startable(waiting, starting, free, total):
                self._start(id)
            self._ask_for_machines([job.gang for job in waiting if place(job.gang, total, total) is None])
        else:
            self._ask_for_machines([])

    def _ask_for_machines(self, gangs: list[Gang]) -> None:
        """Tell Ray's autoscaler what must fit, beside what runs: it sees no job that has not started."""
        running = [gang_of(self.jobs[id]) for id in self._ids(RUNNING)] if gangs else []
        bundles = []
        for gang in (*running, *gangs):
            each = {"CPU": gang.each.cpus} | ({"GPU": gang.each.gpus} if gang.each.gpus else {})
            bundles += [each] * gang.workers
        if bundles != self.asked_for:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=bundles)
            self.asked_for = bundles

    def _ids(self, state: str) -> list[str]:
        return [id for id, job in self.jobs.items() if job["state"] == state]

    def _note(self, id: str, **changes: Any) -> None:
        """Into the journal, on disk before anyone reads it."""
        entry = {"id": id} | changes | {"time": time.time()}
        self.jobs[id] = self.jobs.get(id, {}) | entry
        line = json.dumps(entry)
        self.journal.write(line + "\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())
        print(line, flush=True)

    def _package(self, id: str) -> Path:
        return self.here / f"{id}.zip"

    def _handle(self, content: bytes) -> None:
        """A message: a new job, or what to do with one. Seen twice after a crash, it does nothing the second time."""
        message = read_message(content)
        id = message["id"]
        if message["do"] == "submit" and id not in self.jobs:
            self._enqueue(id, content, message["job"])
        elif message["do"] == "retry" and message["new"] not in self.jobs:
            with contextlib.suppress(FileNotFoundError):  # the client looks into the journal and says so
                job = {key: value for key, value in self.jobs[id].items() if key in JOB} | {"retry_of": id}
                self._enqueue(message["new"], self._package(id).read_bytes(), job)
        elif message["do"] == "stop" and id in self.jobs:
            self._stop(id, message["now"])

    def _enqueue(self, id: str, content: bytes, job: dict[str, Any]) -> None:
        with self._package(id).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._note(id, **job, state=QUEUED, submitted=time.time())
        ended = [id for id, job in self.jobs.items() if job["state"] not in (QUEUED, RUNNING)]
        for old in ended[:-KEPT_PACKAGES]:
            self._package(old).unlink(missing_ok=True)

    def _start(self, id: str) -> None:
        job = self.jobs[id]
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT), "MUSTER_SUBMITTED": str(job["submitted"])}
        try:
            self.client.submit_job(
                submission_id=id,
                entrypoint=f"cd {TOP} && exec {job['command']}",
                runtime_env={"working_dir": str(self._package(id)), "env_vars": environment},
                metadata={"run": job["name"], "run_dir": job["run_dir"]},
            )
        except Exception as error:
            if "already exists" not in str(error):  # it was started just before a crash of this process
                self._note(id, state=FAILED, reason=f"could not be started: {' '.join(str(error).split())[-300:]}")
                return
        self._note(id, state=RUNNING, started=time.time())

    def _follow(self, id: str) -> str | None:
        """Note the end of a running job. Returns Ray's id of its driver, once it has one."""
        try:
            info = self.client.get_job_info(id)
        except RuntimeError as error:
            if "404" in str(error):
                self._note(id, state=LOST, reason="the cluster that ran it is gone")
            return None
        if self.jobs[id].get("stopping") == "now":
            _signal_driver(info)
        if info.status.is_terminal():
            code = 0 if info.status.value == "SUCCEEDED" else info.driver_exit_code
            stopped = code == 75 or info.status.value == "STOPPED"
            state = FINISHED if code == 0 else STOPPED if stopped else FAILED
            reason = None
            if state == FAILED:
                reason = f"exit code {code}" if code is not None else " ".join((info.message or "").split())[:300]
            self._note(id, state=state, exit_code=code, reason=reason)
        return info.driver_info.id if info.driver_info else None

    def _stop(self, id: str, now: bool) -> None:
        state = self.jobs[id]["state"]
        if state == QUEUED:
            self._note(id, state=CANCELLED)
        elif state == RUNNING:
            # Ray's SIGTERM lets the run write a checkpoint; a second one, later, ends it at once (cluster.launch).
            self.client.stop_job(id)
            self._note(id, stopping="now" if now else "checkpoint")


def _signal_driver(info: Any) -> None:
    """One more SIGTERM to a job's driver, which Ray runs on the head as it does this process."""
    import ray

    driver = info.driver_info
    if driver and driver.node_ip_address == ray.util.get_node_ip_address() and not info.status.is_terminal():
        with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
            os.kill(int(driver.pid), signal.SIGTERM)


def _messages() -> Iterator[tuple[bytes, bytes]]:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    for name in sorted(_internal_kv_list(f"gcs://{MESSAGES}")):
        if content := _internal_kv_get(name):
            yield name, content


def _delete(name: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(name)


def _placed_drivers(client: Any) -> set[str]:
    """Drivers whose placement group stands: what they hold is no longer free."""
    from ray.util.state import list_placement_groups

    groups = list_placement_groups(
        address=client.get_address(), filters=[("state", "=", "CREATED")], limit=10_000, raise_on_missing_output=False
    )
    return {group.creator_job_id for group in groups}
