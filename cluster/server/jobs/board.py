"""The queue and the machines as clients see them: computed once every few seconds, however many ask."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.reading.parse import clip, is_folder
from trainer.record.terminal import visible

from ..messages import Known
from ..outlook import Outlook, gang_words, in_line, outlook, probable_starts, running_outlook
from ..waiting import FAILED, LOST, QUEUED, RUNNING, STOPPED
from .job_queue import JobQueue
from .scheduler import Machine, Scheduler

FRESH = 2.0
"""Seconds for which an answer is reused while no job changes."""
DAY = 86400.0
MOST_SHOWN = 200
MOST_ROOTS = 50
LONGEST_WHY = 600


class Board:
    """Answers about a queue. Thread-safe."""

    def __init__(self, queue: JobQueue, scheduler: Scheduler) -> None:
        self.queue, self.scheduler = queue, scheduler
        self._lock = threading.Lock()
        self._known: tuple[float, int, list[dict[str, Any]]] = (float("-inf"), -1, [])
        self._running: dict[str, tuple[float, Outlook]] = {}

    def rows(self) -> list[dict[str, Any]]:
        """All jobs, oldest first: their entries in the journal, with `ahead` and `outlook`."""
        with self._lock:
            at, version, rows = self._known
            now = self.queue.version
            if version != now or time.monotonic() - at > FRESH:
                rows = self._work_out(self.queue.jobs())
                self._known = time.monotonic(), now, rows
            return rows

    def row(self, id: str) -> dict[str, Any]:
        """One of `rows`. Raises NoJob."""
        self.queue.job(id)
        return next(row for row in self.rows() if row["id"] == id)

    def _work_out(self, jobs: Mapping[str, Known]) -> list[dict[str, Any]]:
        seen = self.scheduler.seen
        self._running = {id: each for id, each in self._running.items() if id in jobs and jobs[id].state == RUNNING}
        outlooks = outlook(jobs, seen.nodes, self._outlook_of_running)
        left = {id: each.eta for id, each in outlooks.items() if each.eta is not None and jobs[id].state == RUNNING}
        starts = probable_starts(jobs, left, seen.nodes) if seen.reachable else {}
        ahead = {id: number for number, id in enumerate(in_line(jobs))}
        now = time.time()
        return [
            job.entry()
            | {
                "ahead": ahead.get(id, 0),
                "outlook": self._of(job, outlooks[id])._asdict()
                | {"starts": now + starts[id] if id in starts else None},
            }
            for id, job in jobs.items()
        ]

    def _outlook_of_running(self, job: Known) -> Outlook:
        at, known = self._running.get(job.id, (float("-inf"), Outlook()))
        if time.monotonic() - at > FRESH:
            known = running_outlook(job, self.scheduler.last_output)
            self._running[job.id] = time.monotonic(), known
        return known

    def _of(self, job: Known, found: Outlook) -> Outlook:
        if job.state != QUEUED:
            return found
        if job.stopping:
            return found._replace(why="will be cancelled unless Ray has started it already")
        if not self.scheduler.seen.reachable:
            return found._replace(why=f"waits for Ray, which does not answer: {clip(self.scheduler.seen.why)}")
        return found

    def machines(self) -> dict[str, Any]:
        """The machines as of the last query, and whether Ray answers; wakes the scheduler for the next query."""
        self.queue.woken.set()
        seen = self.scheduler.seen
        return {
            "address": self.scheduler.link.address,
            "reachable": seen.reachable,
            "why": visible(clip(seen.why)),
            "since": seen.since,
            "seen": seen.at,
            "time": time.time(),
            "dashboard": seen.dashboard,
            "machines": [_machine(each) for each in seen.machines],
        }

    def now(self, runs: Mapping[str, str]) -> dict[str, Any]:
        """The queue's fields of `responses.Now`.

        Args:
            runs: ids of the runs that the server shows, by folder.
        """
        rows, cluster = self.rows(), self.machines()
        retried = {row.get("retry_of") for row in rows}
        lately = time.time() - DAY
        waiting = {row["id"]: row for row in rows if row["state"] == QUEUED}
        line = [waiting[id] for id in in_line(self.queue.jobs()) if id in waiting]
        others = [
            row
            for row in rows
            if row["state"] == RUNNING
            or (row["state"] in (LOST, FAILED, STOPPED) and row["time"] > lately and row["id"] not in retried)
        ]
        return {
            "waiting": [_shown(row, runs) for row in line[:MOST_SHOWN]],
            "jobs": [_shown(row, runs) for row in others[-MOST_SHOWN:]],
            "cluster": {key: value for key, value in cluster.items() if key != "machines"},
            "machines": cluster["machines"],
        }

    def problems(self) -> list[dict[str, Any]]:
        """Problems of the queue and the cluster, as `responses.Problem`."""
        seen, found = self.scheduler.seen, []
        if not seen.reachable:
            found.append(_problem(
                "warning", "Ray does not answer", seen.why,
                "running jobs continue; queued jobs start when it is back: `muster cluster up`", seen.since,
            ))  # fmt: skip
        if self.scheduler.problem:
            found.append(_problem("failed", "the journal cannot be written", self.scheduler.problem,
                                  "free disk space: nothing starts until then", None))  # fmt: skip
        jobs = self.queue.jobs().values()
        retried = {job.retry_of for job in jobs}
        for job in jobs:
            if job.state == LOST and job.id not in retried and job.time > time.time() - DAY:
                then = f"`muster retry {job.id}` resumes from its last checkpoint"
                found.append(_problem("failed", f"{job.id} is lost", job.reason or "", then, job.time))
        return found

    def roots(self) -> list[Path]:
        """Folders that contain the runs and sweeps of jobs, as the jobs name them and as far as this machine reaches
        them; newest jobs first."""
        above = dict.fromkeys(Path(job.run_dir).parent for job in reversed(self.queue.jobs().values()))
        return [root for root in list(above)[:MOST_ROOTS] if is_folder(root)]

    def states(self) -> dict[str, int]:
        """Number of jobs by state."""
        found: dict[str, int] = {}
        for job in self.queue.jobs().values():
            found[job.state] = found.get(job.state, 0) + 1
        return found


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "name": visible(machine.name),
        "address": visible(machine.address),
        "cpus": machine.total.cpus,
        "cpus_free": machine.free.cpus,
        "gpus": machine.total.gpus,
        "gpus_free": machine.free.gpus,
        "uses": [use._asdict() for use in machine.uses],
    }


def _shown(row: Mapping[str, Any], runs: Mapping[str, str]) -> dict[str, Any]:
    """A job as `ShownJob`."""
    job = Known.model_validate({key: value for key, value in row.items() if key not in ("ahead", "outlook")})
    seen = row["outlook"]
    return {
        "id": job.id,
        "run": visible(job.name),
        "run_id": runs.get(os.path.realpath(job.run_dir)),
        "state": "STOPPING" if job.state == RUNNING and job.stopping else job.state,
        "why": visible(seen["why"])[:LONGEST_WHY],
        "priority": job.priority,
        "gang": gang_words(job),
        "since": job.submitted if job.state == QUEUED else job.time,
        "starts": seen["starts"],
        "step": seen["step"],
        "steps": seen["steps"],
        "left": seen["eta"],
    }


def _problem(level: str, what: str, why: str, then: str, since: float | None) -> dict[str, Any]:
    return {"level": level, "run": None, "what": what, "why": visible(why)[:2000], "then": then, "since": since}
