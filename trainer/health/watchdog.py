"""Ends an attempt that hangs: every rank watches itself and saves its stacks, and one of them records the hang."""

import contextlib
import faulthandler
import json
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import distributed as dist

from configs import Config
from trainer.files.durable import replace_text
from trainer.files.own_files import no_link
from trainer.record.lines import Record

from . import flight
from .stands import Stand, read_stand

STACKS = "stacks"
FACTOR = 10
"""A step may take up to this multiple of the slowest recent one: a noisy neighbour or a throttled clock stays below."""
REMEMBERED = 50
"""Recent steps that the bound is derived from."""
WARM_UP = 2
"""First steps of an attempt, which do not count for the bound: kernels are compiled, memory is first touched."""
PHASES = ("start", "data", "step", "rollback", "evaluation", "checkpoint", "end")
"""What a rank does, in its order within a step."""
STEP = ("data", "step")
"""The phases whose bound is derived from earlier steps. The others are bounded by cluster.timeout, after which the
other ranks would give up on a collective anyway."""
GRACE = 15.0
"""Seconds that the ranks are given to save their stacks."""
UNKNOWN = (ValueError, LookupError, TypeError, AttributeError)
"""What reading the flight recorder of another version of torch may raise."""
HELD = 5.0
"""Seconds past the bound after which the hang is taken to be in C code that holds the GIL."""
REARMED = 1.0
"""Seconds by which that may come early: setting faulthandler's timer starts a thread, which steps of milliseconds would
notice."""


class Beat(Protocol):
    """Called wherever a rank makes progress, with its step and the phase that it is about to enter."""

    def __call__(self, step: int, phase: str) -> None: ...


def bound(phase: str, took: Sequence[float], floor: float, timeout: float) -> float:
    """Seconds that a phase may last.

    Args:
        took: seconds of recent steps, without the first `WARM_UP`; empty until there are others.
        floor: cluster.hang_timeout.
        timeout: cluster.timeout, for the first steps and for phases outside of a step.
    """
    if phase not in STEP or not took:
        return timeout
    return max(floor, FACTOR * max(took))


def suspects(stands: Mapping[int, Stand | None], waited_for: Sequence[int] = (), stacks_tell: bool = True) -> list[int]:
    """The ranks that the others wait for, as far as can be told; empty if it cannot.

    These are the ranks that could not even save their stacks (the process is stopped, or its GIL is held); else those
    that the flight recorders name; else those that are behind; else those outside a collective while others are in one.

    Args:
        stands: of every rank; None: it could not save its stacks.
        waited_for: ranks that the flight recorders name.
        stacks_tell: whether a waiting rank's stack shows a collective; on a GPU it may show anything.
    """
    said = {rank: stand for rank, stand in stands.items() if stand}
    if len(said) < len(stands):
        return sorted(stands.keys() - said.keys())
    if waited_for:
        return sorted(waited_for)
    order = {rank: (stand.step, PHASES.index(stand.phase)) for rank, stand in said.items()}
    behind = [rank for rank in order if order[rank] < max(order.values())]
    outside = [rank for rank, stand in said.items() if not stand.waits] if stacks_tell else []
    return sorted(behind or (outside if len(outside) < len(said) else []))


@contextlib.contextmanager
def watchdog(run_dir: Path, attempt: int, config: Config) -> Iterator[Beat]:
    """Watch this rank while the block runs; the process group must exist.

    A thread checks the time since the last beat, which works while the training thread is blocked in a collective or a
    system call. If C code holds the GIL, faulthandler's own timer, which does not need it, saves the stacks and ends
    the process. When one rank is late, all save their stacks and end with exit code 1.
    """
    folder = run_dir / STACKS
    folder.mkdir(exist_ok=True)
    if dist.get_rank() == 0:
        _remove_empty(run_dir, attempt)
    path = stacks_of(run_dir, attempt, dist.get_rank())
    with open(path, "w", buffering=1, encoding="utf-8", opener=no_link) as file:
        watch = _Watch(run_dir, attempt, config, file)
        try:
            yield watch.beat
        finally:
            watch.close()
            with contextlib.suppress(OSError):
                path.unlink()
                folder.rmdir()  # unless others are in it


def stacks_of(run_dir: Path, attempt: int, rank: int) -> Path:
    return run_dir / STACKS / f"attempt-{attempt:02d}-rank-{rank:04d}.txt"


def recorder_of(run_dir: Path, attempt: int, rank: int) -> Path:
    """The file with a rank's flight recorder dump, as JSON."""
    return stacks_of(run_dir, attempt, rank).with_suffix(".json")


def _remove_empty(run_dir: Path, attempt: int) -> None:
    """Remove the empty files that killed processes left behind."""
    for number in range(1, attempt):
        for path in (run_dir / STACKS).glob(stacks_of(run_dir, number, 0).name.replace("0000", "*")):
            if not _size(path):
                path.unlink(missing_ok=True)


class _Watch:
    """One rank's state: its phase, since when, and how long its steps took."""

    def __init__(self, run_dir: Path, attempt: int, config: Config, file: Any) -> None:
        self._run_dir, self._attempt, self._file = run_dir, attempt, file
        self._floor, self._timeout = config.cluster.hang_timeout, config.cluster.timeout
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._asked = run_dir / STACKS / f".attempt-{attempt:02d}"
        """Created by the first rank that is late, which then records the hang; the others save their stacks too."""
        self._thread_id = threading.get_ident()
        self._steps, self._in_step = 0, 0.0
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._now = (time.monotonic(), 0, "start", self._timeout)
        self._armed = -math.inf
        """When faulthandler's timer fires."""
        self._stop = threading.Event()
        self.beat(0, "start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        now = time.monotonic()
        since, _, before, _ = self._now
        self._in_step += now - since if before in STEP else 0.0
        if before == "step" and phase != "step":
            self._steps += 1
            if self._steps > WARM_UP:
                self._took.append(self._in_step)
            self._in_step = 0.0
        allowed = bound(phase, self._took, self._floor, self._timeout)
        self._now = (now, step, phase, allowed)
        if abs(now + allowed + HELD - self._armed) > REARMED:
            self._armed = now + allowed + HELD
            faulthandler.dump_traceback_later(allowed + HELD, file=self._file, exit=True)

    def close(self) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._floor / 10)):
            since, step, phase, allowed = self._now
            waited = time.monotonic() - since
            if waited > allowed or self._asked.exists():
                self._save_stacks(step, phase, waited, allowed)
                self._save_calls()
                if waited > allowed and self._is_first():
                    self._tell(step, phase, waited, allowed)
                else:
                    self._stop.wait(2 * GRACE)  # Ray or torchrun ends this process with the one that records the hang
                os._exit(1)

    def _save_stacks(self, step: int, phase: str, waited: float, allowed: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        head = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step, "phase": phase}
        head |= {"seconds": round(waited, 1), "bound": round(allowed, 1), "thread": f"0x{self._thread_id:016x}"}
        self._file.write(f"{json.dumps(head)}\n")
        faulthandler.dump_traceback(self._file)

    def _save_calls(self) -> None:
        # If CUDA does not answer, the GIL stays held; this timer ends the process all the same.
        faulthandler.dump_traceback_later(2 * GRACE, file=self._file, exit=True)
        path = recorder_of(self._run_dir, self._attempt, self._rank)
        try:
            said = json.dumps(flight.dump())
        except (RuntimeError, *UNKNOWN) as error:
            said = json.dumps({"error": repr(error)})
        with contextlib.suppress(OSError):
            replace_text(path, said)
        faulthandler.cancel_dump_traceback_later()

    def _is_first(self) -> bool:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._asked, os.O_CREAT | os.O_EXCL, 0o600))
            return True
        return False

    def _tell(self, step: int, phase: str, waited: float, allowed: float) -> None:
        """Record the hang, once every rank has saved its stacks or had the time to."""
        paths = {rank: stacks_of(self._run_dir, self._attempt, rank) for rank in range(self._world)}
        calls = {rank: recorder_of(self._run_dir, self._attempt, rank) for rank in paths}
        until = time.monotonic() + GRACE
        while not all(map(_size, (*paths.values(), *calls.values()))) and time.monotonic() < until:
            time.sleep(0.1)
        stands = {rank: read_stand(path) for rank, path in paths.items()}
        waiting = read_calls(calls)
        named = suspects(stands, waiting.suspects, stacks_tell=dist.get_backend() == "gloo")
        saved = [str(path.relative_to(self._run_dir)) for path in paths.values() if _size(path)]
        details = {"step": step, "phase": phase, "seconds": waited, "bound": allowed, "suspects": named}
        reason = f"no progress for {waited:.3g} s in step {step} ({phase}), limit {allowed:.3g} s"
        for rank in named[:4]:
            stand = stands[rank]
            where = f"is in {stand.frames[0]}" if stand and stand.frames else "could not report its stack"
            reason += f"; rank {rank} {where}"
        if waiting.where:
            reason += f"; others wait in {waiting.where}"
        Record(self._run_dir, self._attempt).event("hang", **details, reason=reason, stacks=saved)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def read_calls(paths: Mapping[int, Path]) -> flight.Waiting:
    """The ranks that are waited for, from the saved dumps of the flight recorders; none if these cannot be read."""
    dumps: dict[int, flight.Dump | None] = dict.fromkeys(paths)
    for rank, path in paths.items():
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            dumps[rank] = found if found and "entries" in found else None
    try:
        return flight.waited_for(dumps)
    except UNKNOWN:  # a hang must end even if the dumps are not understood
        return flight.Waiting([], "")
