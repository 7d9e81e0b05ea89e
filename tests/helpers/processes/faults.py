"""Faults that a test injects into a training process before it trains."""

import ctypes
import errno
import functools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from each_step import before_each_step
from schedule import Kill
from torch import distributed as dist

from models.moe import collapse
from models.tasks.learner import Learner
from models.tasks.task import Phase
from trainer import loop
from trainer.checkpoint import cadence, manifest, store
from trainer.health import straggler
from trainer.health.flight import Dump, dump
from trainer.tracking import start
from trainer.trainee import Trainee


def kill_in(function: str, call: int, when: str) -> None:
    """Make this process kill -9 itself at the n-th call of a function of trainer.checkpoint.store."""
    original, calls = getattr(store, function), 0

    def wrapped(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls != call:
            return original(*arguments, **keywords)
        if when == "half":
            (arguments[0] / manifest.MANIFEST).unlink()
        elif when == "after":
            original(*arguments, **keywords)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(store, function, wrapped)


def kill_at_step(step: int, number: int) -> None:
    """Send this process a signal when it begins the given step."""
    _at_step(step, lambda: os.kill(os.getpid(), number))


def hang_up_under_nohup(step: int) -> None:
    """Make this process ignore SIGHUP, as under nohup, and send it one when it begins the given step."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kill_at_step(step, signal.SIGHUP)


def _at_step(step: int, do: Callable[[], None]) -> None:
    before_each_step(lambda current: do() if current == step else None)


def wait_at_gates(folder: Path, steps: Sequence[int], grace: float, killed_in: int | None = None) -> None:
    """Begin each of these steps once the test has created the file `folder`/STEP, and make the shipper give up early.

    Args:
        killed_in: step at whose beginning the process kills itself.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    start.GRACE = grace

    def wait(step: int) -> None:
        until = time.monotonic() + 100
        while not (folder / str(step)).exists():
            assert time.monotonic() < until, f"the test did not open the gate of step {step}"
            time.sleep(0.01)

    for step in steps:
        _at_step(step, functools.partial(wait, step))
    if killed_in:
        kill_at_step(killed_in, signal.SIGKILL)


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def killed(kill: Kill | None) -> None:
    """Make the process that a schedule names kill -9 itself at the scheduled moment."""
    if kill is None or os.environ["RANK"] != str(kill.rank):
        return
    armed = threading.Event()

    def wrap(where: object, name: str, before: bool) -> None:
        original = getattr(where, name)

        def wrapped(*arguments, **keywords):
            result = None if armed.is_set() and before else original(*arguments, **keywords)
            if armed.is_set():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(where, name, wrapped)

    if kill.moment == "step":
        kill_at_step(kill.step, signal.SIGKILL)
    elif kill.moment == "update":
        wrap(Trainee, "step", before=False)
    elif kill.moment == "shard":
        wrap(store, "save_file", before=False)
    else:
        wrap(store, "write_durably", before=True)
    _at_step(kill.step, armed.set)


def stand_still(rank: int, step: int) -> None:
    """Make one of several ranks hang when it begins the given step."""
    if os.environ["RANK"] == str(rank):
        _at_step(step, stand_here)


def stand_here() -> None:
    time.sleep(3600)


def hold_interpreter(step: int) -> None:
    """Make this process hang in C code at the given step, so that none of its other threads runs."""
    _at_step(step, hold_here)


def hold_here() -> None:
    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL, it keeps the interpreter's lock


def slow_down(rank: int, window: int, seconds: float = 0.3) -> None:
    """Make one of several ranks slow in each step, and compare ranks over a shorter window."""
    straggler.WINDOW = window
    if os.environ["RANK"] == str(rank):
        before_each_step(lambda step: time.sleep(seconds))


def trained(run_dir: Path, fault: Callable[..., None] | None = None, ranks: Sequence[int] = (0,), *arguments) -> str:
    """Train as one process of a team, with a fault in some of its ranks. Returns its status or why it stopped."""
    if fault and int(os.environ["RANK"]) in ranks:
        fault(*arguments)
    try:
        return loop.train(run_dir)
    except loop.TrainingStopped as stopped:
        return str(stopped)


def first_checkpoint(of_first: int, of_others: int) -> None:
    """With `checkpoint.every: auto`, make rank 0 start with a different interval from the other ranks, and keep it."""
    cadence.FIRST = of_first if os.environ["RANK"] == "0" else of_others
    cadence.CHANGE = float("inf")


def poison(first: int, last: int) -> None:
    """Make the loss infinite in a range of steps."""
    original = Trainee.step
    step = 0

    def wrapped(self, *arguments):
        nonlocal step
        step += 1
        if not first <= step <= last:
            return original(self, *arguments)
        hook = self.engine.module.register_forward_hook(
            lambda m, a, out: out._replace(loss_sum=out.loss_sum * float("inf"))
        )
        try:
            return original(self, *arguments)
        finally:
            hook.remove()

    Trainee.step = wrapped  # type: ignore[method-assign]


def raise_loss(step: int) -> None:
    """Report a tenfold loss at one step of the first attempt."""
    original, calls = Trainee.step, 0

    def wrapped(*arguments):
        nonlocal calls
        calls += 1
        values = original(*arguments)
        values[0] *= 10 if calls == step else 1
        return values

    Trainee.step = wrapped  # type: ignore[method-assign]


def spike_and_kill(spike: int, killed: int) -> None:
    """Report a tenfold loss at one step, and kill -9 this process when it begins another."""
    raise_loss(spike)
    kill_at_step(killed, signal.SIGKILL)


def collapse_soon(step: int | None = None) -> None:
    """Treat an expert with less than 95% of an even share as starved, and three such steps as a collapse."""
    collapse.STARVED, collapse.COLLAPSED = 0.95, 3
    if step:
        kill_at_step(step, signal.SIGTERM)


def _between(first: int, last: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Call `begin` when this process begins the first step, `end` when it begins the one after the last."""

    def at_both(current: int) -> None:
        if current in (first, last + 1):
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            begin() if current == first else end()

    before_each_step(at_both)


def fill(ballast: Path) -> None:
    """Write a file until its disk is full."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def full_disk(folder: Path, first: int, last: int) -> None:
    """Take the last byte of the disk that holds `folder`, for a range of steps."""
    ballast = folder / "ballast"
    _between(first, last, lambda: fill(ballast), ballast.unlink)


def small_files(size: int, first: int, last: int) -> None:
    """Limit the files that this process writes to `size` bytes, for a range of steps."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(soft: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))

    _between(first, last, lambda: limit(size), lambda: limit(most))


def _dump_with(unfinished: list[int]) -> Dump | None:
    """A dump, once the unfinished calls in it are those of tensors of these lengths.

    gloo records a call, and its end, a moment after the caller has continued.
    """
    until = time.monotonic() + 20
    while True:
        found = dump()
        open_calls = [entry for entry in found["entries"] if not entry["retired"]] if found else []
        if found and [entry["input_sizes"] for entry in open_calls] == [[[length]] for length in unfinished]:
            return found
        assert time.monotonic() < until
        time.sleep(0.01)


def transfers(count: int) -> None:
    """From rank 0 to rank 1, as between the stages of a pipeline."""
    for _ in range(count):
        (dist.send if dist.get_rank() == 0 else dist.recv)(torch.ones(4), 1 - dist.get_rank())


def stand_apart(dumped: Path) -> Dump | None:
    """Two collectives of both processes; then a third, which rank 1 calls only after rank 0 has dumped."""
    for _ in range(2):
        dist.all_reduce(torch.ones(4))
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(7), async_op=True)
        found = _dump_with(unfinished=[7])
        dumped.touch()
        work.wait()
        return found
    found = _dump_with(unfinished=[])
    while not dumped.exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(7))
    return found


def spoil_phase(name: str, step: int) -> None:
    """Make the loss of one phase infinite in one step."""
    original, now = Learner.loss, {"step": 0}
    before_each_step(lambda number: now.update(step=number))

    def wrapped(self: Learner, nets: Any, batch: Any, phase: Phase) -> Any:
        sums, values = original(self, nets, batch, phase)
        if phase.name == name and now["step"] == step:
            sums = sums._replace(loss=sums.loss * torch.inf)
        return sums, values

    Learner.loss = wrapped  # type: ignore[method-assign]
