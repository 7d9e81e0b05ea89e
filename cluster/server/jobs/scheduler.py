"""The thread that starts jobs when their whole gang fits, and follows them to their end."""

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.gangs.share import Node
from configs import ExitCode
from configs.reading.parse import clip
from trainer.files.own_files import open_file

from ..messages import Known
from ..outlook import last_words
from ..pack import TOP
from ..waiting import FAILED, FINISHED, LOST, QUEUED, RUNNING, STOPPED, Gang, Waiting, fits, gang_of, startable
from .job_queue import JobQueue, NotWritten
from .ray_link import Failed, Hello, Unreachable

TICK, IDLE = 0.5, 2.0
"""Seconds between two queries of Ray: while jobs are queued or running, and otherwise."""
AWAY, LONG_AWAY = 1.0, 10.0
"""The same while Ray does not answer: at first, and at most."""
PLACES_EVERY = 5.0
"""Seconds between two queries of the placement groups while no job is queued."""
MOST_BUNDLES = 100_000
"""Most processes that the autoscaler is asked for."""
LAST_OUTPUT = 1 << 16
"""Bytes at the end of a driver's output that are searched for its progress and for why it failed."""
STOP_WAIT = 3600
"""Seconds between Ray's SIGTERM and SIGKILL: time for a checkpoint. Ray's default is 3."""


class Link(Protocol):
    """The interface of `ray_link.RayLink`."""

    address: str
    connected: Hello | None

    def connect(self) -> Hello: ...
    def call(self, what: str, **arguments: Any) -> Any: ...
    def close(self) -> None: ...


class Use(NamedTuple):
    """What one driver reserves on a machine."""

    by: str
    """Id of its job; `driver ID` if it is not a job of the queue."""
    cpus: float
    gpus: float


class Machine(NamedTuple):
    """A machine of the cluster, as of the last query."""

    name: str
    address: str
    free: Node
    total: Node
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True)
class Seen:
    """The cluster, as of the last query."""

    reachable: bool = False
    why: str = "not connected yet"
    """Why it cannot be reached."""
    since: float = 0.0
    """Unix time since which `reachable` has been as it is."""
    at: float = 0.0
    """Unix time at which the last query of the machines began."""
    machines: tuple[Machine, ...] = ()
    dashboard: str | None = None
    """URL of Ray's own dashboard."""

    @property
    def nodes(self) -> list[Node]:
        """Total resources of each machine."""
        return [machine.total for machine in self.machines]


class Scheduler(threading.Thread):
    """Everything that the server does with Ray.

    Attributes:
        seen: the cluster, as of the last query.
        problem: why nothing can be started although Ray answers; else empty.
    """

    def __init__(self, queue: JobQueue, link: Link) -> None:
        super().__init__(name="scheduler", daemon=True)
        self.queue, self.link = queue, link
        self.seen = Seen(since=time.time())
        self.problem = ""
        self._logs: Path | None = None
        self._ending = threading.Event()
        self._asked_for: list[Gang] | None = None
        self._stopped: set[str] = set()
        """Jobs that Ray was asked to stop over this connection."""
        self._drivers: dict[str, str] = {}
        """Job ids, by Ray's ids of their drivers."""
        self._uses: dict[str, tuple[Use, ...]] = {}
        self._placed_at = 0.0

    def run(self) -> None:
        away = AWAY
        while not self._ending.is_set():
            self.queue.woken.clear()
            began = time.monotonic()
            try:
                self.tick()
                pause = TICK if self.queue.ids(QUEUED, RUNNING) else IDLE
                pause = max(pause, 4 * (time.monotonic() - began))  # with very many jobs a query takes long
                self.problem, away = "", AWAY
            except NotWritten as error:
                self.problem = f"{error.filename} cannot be written: {error.strerror}"
                pause = AWAY
            except Exception as error:
                self._away(error)
                pause, away = away, min(1.5 * away, LONG_AWAY)
            if self._ending.is_set():
                break
            self.queue.woken.wait(pause)
            self._ending.wait(
                TICK - (time.monotonic() - began)
            )  # at most one query per TICK, however often it is woken
        self.link.close()

    def end(self) -> None:
        """End the thread. Jobs are not affected."""
        self._ending.set()
        self.queue.woken.set()

    def _away(self, error: Exception) -> None:
        why = clip(error) if isinstance(error, Unreachable | Failed) else f"{type(error).__name__}: {clip(error)}"
        if not isinstance(error, Unreachable):
            self.link.close()  # start over with a new connection
        before = self.seen
        if before.reachable or why != before.why:
            print(f"muster: cannot reach Ray at {self.link.address}: {why}", file=sys.stderr, flush=True)
            since = time.time() if before.reachable else before.since
            self.seen = Seen(False, why, since, before.at, before.machines, before.dashboard)

    def tick(self) -> None:
        """Query Ray once, record what has changed, and start what can be started.

        Raises:
            Unreachable: Ray does not answer.
            Failed: Ray refused a query.
            NotWritten: the journal cannot be written.
        """
        if self.link.connected is None:
            self._begin_anew(self.link.connect())
        running = self.queue.ids(RUNNING)
        waiting = [
            Waiting(id, gang_of(job), job.priority, job.submitted)
            for id, job in self.queue.jobs().items()
            if job.state == QUEUED and not job.stopping
        ]
        began = time.time()
        places = bool(waiting and running) or time.monotonic() - self._placed_at > PLACES_EVERY
        seen = self.link.call("look", jobs=running, places=places)
        drivers = {id: self._judge(id, seen["jobs"][id]) for id in running}
        self._drivers |= {driver: id for id, driver in drivers.items() if driver}
        if places:
            self._uses = self._used(seen["places"])
            self._placed_at = time.monotonic()
        machines = tuple(
            Machine(each["name"], each["address"], Node(*each["free"]), Node(*each["total"]),
                    self._uses.get(each["id"], ()))
            for each in seen["machines"]
        )  # fmt: skip
        self._saw(machines, began)
        if waiting:
            placed = {place["driver"] for place in seen["places"] or []}
            starting = [gang_of(self.queue.job(id)) for id, driver in drivers.items() if driver not in placed]
            starting = [] if seen["places"] is None else starting
            free, total = [machine.free for machine in machines], [machine.total for machine in machines]
            for id in startable(waiting, starting, free, total):
                self._start(id)
            sizes = Counter(total)
            self._ask_for_machines([job.gang for job in waiting if not fits(job.gang, sizes)])
        else:
            self._ask_for_machines([])

    def output(self, id: str) -> Path | None:
        """File of a job's output; None if it is not on this machine."""
        path = self._logs / f"job-driver-{id}.log" if self._logs else None
        return path if path and path.is_file() else None

    def last_output(self, id: str) -> str:
        """The end of a job's output; empty if there is none on this machine."""
        with contextlib.suppress(OSError):
            if path := self.output(id):
                with open_file(path) as file:
                    file.seek(max(0, file.seek(0, 2) - LAST_OUTPUT))
                    return file.read().decode(errors="replace")
        return ""

    def _begin_anew(self, hello: Hello) -> None:
        """Take stock after a new connection, which may be to a new head, or of a new server."""
        self._logs = hello.logs
        self._asked_for, self._placed_at = None, 0.0
        self._stopped, self._drivers, self._uses = set(), {}, {}
        if unsettled := self.queue.unsettled():
            known = set(self.link.call("known"))
            for id in unsettled:
                self.queue.settle(id, started=id in known)

    def _saw(self, machines: tuple[Machine, ...], at: float) -> None:
        before, hello = self.seen, self.link.connected
        if not before.reachable:
            print(f"muster: connected to Ray at {self.link.address}", file=sys.stderr, flush=True)
        since = before.since if before.reachable else time.time()
        self.seen = Seen(True, "", since, at, machines, hello.dashboard if hello else None)

    def _used(self, places: Sequence[dict[str, Any]]) -> dict[str, tuple[Use, ...]]:
        """By machine id, what each driver reserves on it."""
        found: dict[str, dict[str, Use]] = {}
        for place in places:
            by = self._drivers.get(place["driver"], f"driver {place['driver']}")
            for node, cpus, gpus in place["bundles"]:
                own = found.setdefault(node, {})
                before = own.get(by, Use(by, 0.0, 0.0))
                own[by] = Use(by, before.cpus + cpus, before.gpus + gpus)
        return {node: tuple(uses.values()) for node, uses in found.items()}

    def _start(self, id: str) -> None:
        job = self.queue.begin(id)
        if job is None:
            return
        try:
            self.link.call(
                "start",
                id=id,
                package=str(self.queue.package(id)),
                sha256=job.sha256,
                entrypoint=f"cd {TOP} && exec {command_of(job)}",
                metadata={"run": job.name, "run_dir": job.run_dir},
                environment={"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT)},
            )
        except Failed as error:
            self.queue.end(id, state=FAILED, reason=f"could not be started: {error}")
            return
        self.queue.settle(id, started=True)

    def _judge(self, id: str, info: dict[str, Any]) -> str | None:
        """Record the end of a running job, or pass a stop request on. Returns Ray's id of its driver, if any."""
        if "silent" in info:
            return None
        if "gone" in info:
            self.queue.end(id, state=LOST, reason="the cluster that ran it is gone")
            return None
        if "wrong" in info:
            with contextlib.suppress(Failed):
                self.link.call("stop", id=id)
            self.queue.end(id, state=FAILED, reason=f"could not be followed: {info['wrong']}")
            return None
        if info["ended"]:
            code = 0 if info["status"] == "SUCCEEDED" else info["exit_code"]
            stopped = code == ExitCode.STOPPED or info["status"] == "STOPPED"
            state = FINISHED if code == 0 else STOPPED if stopped else FAILED
            reason = self._why_failed(id, code, info["message"]) if state == FAILED else None
            self.queue.end(id, state=state, exit_code=code, reason=reason)
        elif wanted := self.queue.job(id).stopping:
            self._pass_on(id, wanted)
        return info["driver"]

    def _pass_on(self, id: str, wanted: str) -> None:
        # Ray's SIGTERM lets the run write a checkpoint; a second one ends it at once (cluster.attempts.launch).
        with contextlib.suppress(Failed):
            if id not in self._stopped:
                self.link.call("stop", id=id)
                self._stopped.add(id)
            elif wanted == "now":
                self.link.call("signal", id=id)

    def _why_failed(self, id: str, code: int | None, message: str) -> str:
        """Its driver's own message if there is one; the last lines of its output are in Ray's message."""
        if code is None:
            return clip(message)
        if code < 0 or code > 128:  # of a shell
            return f"its driver was killed by signal {-code if code < 0 else code - 128}"
        output = message.partition("\n")[2]
        if "muster: " not in output:  # it is printed before a traceback
            output = self.last_output(id) or output
        return last_words(output) or f"exit code {code}"

    def _ask_for_machines(self, gangs: list[Gang]) -> None:
        """Tell Ray's autoscaler about queued gangs, which it cannot see; its request replaces the one before."""
        running = [gang_of(self.queue.job(id)) for id in self.queue.ids(RUNNING)] if gangs else []
        asked: list[Gang] = []
        left = MOST_BUNDLES
        for gang in (*running, *gangs):
            if gang.workers <= left:
                asked.append(gang)
                left -= gang.workers
        if asked != self._asked_for:
            self.link.call("ask", gangs=[(gang.workers, *gang.each) for gang in asked])
            self._asked_for = asked


def command_of(job: Known) -> str:
    """A job's shell command. A run is told when it was submitted, as its goodput counts the time in the queue."""
    return f"{job.command} --submitted={job.submitted}" if job.command.startswith("muster train ") else job.command
