"""The attempts of a run, one after the other: on as many machines as there are, until it is finished or must stop."""

import time
from collections.abc import Sequence
from pathlib import Path

from cluster.gangs.gang import Gang
from cluster.gangs.ray_nodes import draining, machines
from cluster.server.waiting import Gang as Asked
from cluster.server.waiting import assign
from configs import counted, worker_counts
from trainer.record.lines import Record, read_events, summary
from trainer.run.folder import attempts, read_config
from trainer.run.stop import request_stop, take_stop

from .failures import Failure, Final, cause, hung
from .policy import decide, history, kind_of, memory_advice

PATIENCE = 240.0
"""Seconds to wait for a process on an unreachable machine to release the run: Ray ends it once its machine has not
reached the head for a minute or two."""
SHRINK_AFTER = 5.0
"""Seconds that an elastic run waits for all machines before it starts with fewer."""
SUSPECTED = 60.0
"""Seconds for which a machine that did not answer is left out; by then Ray itself considers it dead."""
LOOK_EVERY = 5.0
"""Seconds between checks of the cluster while a run trains."""


class Supervisor:
    """Trains a run on a gang, attempt by attempt.

    Args:
        joined: whether the cluster was joined, so that machines may come and go.
        folder: the user's working directory.
    """

    def __init__(self, run_dir: Path, gang: Gang, joined: bool, folder: str) -> None:
        self._run_dir, self._gang, self._joined, self._folder = run_dir, gang, joined, folder
        self._counts = worker_counts(read_config(run_dir))
        self._left_out: set[str] = set()
        self._suspects: dict[str, float] = {}
        self._looked = 0.0
        self._size = 0

    def run(self) -> str:
        """Returns FINISHED, or STOPPED after a stop that the user asked for.

        Raises:
            Final: it must not be started again.
        """
        patience = 0.0
        while self._gather():
            ends, failures = self._gang.attempt(self._run_dir, self._folder, patience, self._look)
            patience = PATIENCE
            if failures:
                broken = {rank for failure in failures for rank in failure.broken or ()}
                self._left_out |= {self._gang.members[rank].node for rank in broken}
                self._suspects |= dict.fromkeys(self._gang.unreached(), time.monotonic() + SUSPECTED)
                judge(self._run_dir, failures, cpu=not self._gang.each.gpus)
                if broken and not self._has_room(self._counts[-1], self._left_out):
                    raise Final("failure", f"{failures[0].reason}; without it the cluster is too small for the run")
            elif "STOPPED" not in ends:
                return "FINISHED"
            elif (reason := take_stop(self._run_dir)) == "" or not (reason or self._joined):
                return "STOPPED"
            else:  # our own request, or a signal to a process on a machine that is being reclaimed
                reason = reason or "a process was told to stop, but the run was not"
                self._note("policy", action="retry", reason=reason)
        return "STOPPED"

    def _gather(self) -> bool:
        """Gather as many workers as fit and the run can use, waiting for room. False: the user stopped the run."""
        began, told = time.monotonic(), False
        while take_stop(self._run_dir) != "":
            avoid = self._avoided()
            all_or_fewer = time.monotonic() - began > SHRINK_AFTER or not self._has_room(self._counts[0], avoid)
            for workers in self._counts if all_or_fewer else self._counts[:1]:
                if self._gang.gather(workers, avoid):
                    self._tell_size(workers)
                    return True
            if all_or_fewer and not told and time.monotonic() - began > SHRINK_AFTER:
                told = True
                each = self._gang.each
                room = " + ".join(
                    f"{counted(m.free.cpus, 'CPU')} {counted(m.free.gpus, 'GPU')}"
                    for m in machines()
                    if m.id not in avoid
                )
                needs = f"{counted(self._counts[-1], 'process')} of {counted(each.cpus, 'CPU')}"
                needs += f" and {counted(each.gpus, 'GPU')}"
                self._note("waiting", reason=f"for room on the cluster: needs {needs}, free: {room or 'none'}")
            time.sleep(0.5)
        return False

    def _has_room(self, workers: int, avoid: set[str]) -> bool:
        """Whether the cluster has what a gang needs, in use or not."""
        total = [machine.total for machine in machines() if machine.id not in avoid]
        return assign(Asked(workers, self._gang.each, self._gang.group), total, total) is not None

    def _avoided(self) -> set[str]:
        now = time.monotonic()
        self._suspects = {id: until for id, until in self._suspects.items() if until > now}
        return {*self._left_out, *self._suspects, *draining()} if self._joined else self._left_out

    def _tell_size(self, workers: int) -> None:
        if len(self._counts) > 1 and workers != self._size:
            self._size = workers
            most, fewest, on = self._counts[0], self._counts[-1], len({member.node for member in self._gang.members})
            reason = (
                f"{counted(workers, 'process')} on {counted(on, 'machine')}; cluster.workers allows {fewest} to {most}"
            )
            self._note("policy", action="resize", reason=reason)

    def _look(self) -> None:
        """Called during training: request a checkpoint and a stop if machines are about to leave or have joined."""
        if not self._joined or time.monotonic() - self._looked < LOOK_EVERY:
            return
        self._looked = time.monotonic()
        own = {member.node for member in self._gang.members}
        leaving = {id: until for id, until in draining().items() if id in own}
        if leaving:
            addresses = [machine.address for machine in machines() if machine.id in leaving]
            seconds = [until / 1000 - time.time() for until in leaving.values() if until]
            when = f" in {min(seconds):.0f} s" if seconds else ""
            request_stop(
                self._run_dir, f"{', '.join(addresses) or 'a machine'} will leave{when}: continuing without it"
            )
        elif more := self._room_for_more():
            reason = f"there is room for {more} processes, {len(self._gang.members)} are training: growing"
            request_stop(self._run_dir, reason)

    def _room_for_more(self) -> int | None:
        """The largest allowed gang that would fit, if it is larger than this one."""
        larger = [count for count in self._counts if count > len(self._gang.members)]
        avoid = self._avoided() if larger else set()
        return next((count for count in larger if self._gang.room_for(count, avoid)), None)

    def _note(self, event: str, **details: object) -> None:
        Record(self._run_dir, attempts(self._run_dir)).event(event, **details)


def judge(run_dir: Path, failures: Sequence[Failure], cpu: bool) -> None:
    """Record the failures of an attempt and apply `cluster.attempts.policy`. Returns if the run may be restarted.

    Raises:
        Final: it must not be restarted.
    """
    worst, config = cause(failures), read_config(run_dir)
    step, attempt = summary(run_dir)["step"], attempts(run_dir)
    record = Record(run_dir, attempt)
    hangs = [event for event in read_events(run_dir) if event["event"] == "hang" and event["attempt"] == attempt]
    worst = hung(hangs[-1], worst) if hangs else worst
    name = "worker_lost" if worst.lost else "worker_failed"
    kind = "hang" if hangs else kind_of(worst)
    details = {"rank": worst.rank, "kind": kind, "step": step, "reason": worst.reason}
    record.event(name, **details, traceback=worst.traceback)
    past = history(read_events(run_dir))
    decision = decide(past, config.cluster.max_failures)
    reason = decision.reason
    if past[-1].kind == "memory":
        reason += f"; {memory_advice(config, cpu)}"
    record.event("policy", action=decision.action, reason=reason, failures=len(past))
    if decision.action == "stop":
        raise Final("failure", f"{reason}; rank {worst.rank}: {worst.reason}")
