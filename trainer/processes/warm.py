"""A process that has imported what training needs, and forks attempts: `python -P -m trainer.processes.warm`.

Importing torch and DeepSpeed takes seconds, forking a process that has imported them milliseconds, and the memory is
shared. Each attempt is still a new process: nothing of a failed one can affect the next.

It reads one `Order` per line and answers each with two lines: `Began`, then how the attempt ended, `Done` or `Failed`.
When its standard input is closed, it kills what it has started, and exits.
"""

import os
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed as dist

from configs import ConfigError, private_files
from trainer.files.scratch import remove_folders
from trainer.health.preflight import BadMachine
from trainer.loop import TrainingStopped, train

from .compiled import load_compiler
from .fault import fault_of
from .orphans import end_with
from .output import output_kept
from .protocol import Began, Done, Failed, Order, Outcome, read_outcome
from .rendezvous import SECRET, STORE


def main() -> None:
    private_files()
    if len(sys.argv) == 2:  # one attempt, of a process that could not fork
        _attempt(Order.model_validate_json(sys.stdin.read()), int(sys.argv[1]))
    asked, told = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    load_compiler(whole=torch.cuda.is_available())  # attention is compiled there in any case
    may_fork = _alone() and _forks_may_use_gpus()
    for line in iter(asked.readline, ""):
        order = Order.model_validate_json(line)
        result, said = os.pipe()
        me, pid = os.getpid(), os.fork()
        if not pid:
            end_with(me)
            if may_fork:
                asked.close()
                told.close()
                _attempt(order, said)
            _become_attempt(line, said)
        os.close(said)
        print(Began(pid=pid).model_dump_json(), file=told, flush=True)
        print(_wait_for(pid, result, asked.fileno()).model_dump_json(), file=told, flush=True)
        os.close(result)


def _alone(seconds: float = 3.0) -> bool:
    """Whether this process has a single thread, as a fork requires; some threads that imports start end soon."""
    tasks, until = Path("/proc/self/task"), time.monotonic() + seconds
    while tasks.is_dir() and len(list(tasks.iterdir())) > 1:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return tasks.is_dir()


def _forks_may_use_gpus() -> bool:
    """Whether no import has initialised CUDA, which would then not work in a fork; a trial fork tells."""
    pid = os.fork()
    if not pid:
        os._exit(torch.cuda._is_in_bad_fork())  # torch 2.11 to 2.13
    return not os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become_attempt(line: str, said: int) -> NoReturn:
    """Replace this process by one attempt. Its order is in an unnamed file, as any user can read a command line."""
    with tempfile.TemporaryFile() as order:
        order.write(line.encode())
        order.seek(0)
        os.dup2(order.fileno(), 0)
    os.set_inheritable(said, True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "trainer.processes.warm", str(said)])


def _wait_for(pid: int, result: int, asked: int) -> Outcome:
    """Wait until an attempt's process has ended, and return its outcome."""
    text, ended = b"", None
    while ended is None:
        ready, _, _ = select.select([asked, result], [], [], 0.5)
        if result in ready:
            text += os.read(result, 1 << 16)
        if asked in ready:  # no order comes while an attempt runs, so it was closed
            os.kill(pid, signal.SIGKILL)
            sys.exit()
        found, status = os.waitpid(pid, os.WNOHANG)
        ended = os.waitstatus_to_exitcode(status) if found else None
    while select.select([result], [], [], 0)[0] and (more := os.read(result, 1 << 16)):
        text += more
    try:
        return read_outcome(text)
    except ValueError:
        how = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"exit code {ended}"
        return Failed(kind="lost", reason=f"the process is gone ({how})")


def _attempt(order: Order, said: int) -> NoReturn:
    """Run as one process of an attempt, and exit."""
    code = 1
    outcome: Outcome
    try:
        outcome = _train(order)
        code = 0
    except ConfigError as error:
        outcome = Failed(kind="mistake", reason=str(error))
    except TrainingStopped as error:
        outcome = Failed(kind="stopped", reason=str(error))
    except BadMachine as error:
        outcome = Failed(kind="broken", reason=str(error), ranks=error.ranks)
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        outcome = Failed(kind=fault_of(error), reason=reason, traceback=traceback.format_exc())
    try:
        os.set_inheritable(said, False)
        with os.fdopen(said, "w") as file:
            file.write(outcome.model_dump_json())
        # Not after a failure: it would wait a long time for the other ranks.
        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        remove_folders()
    finally:
        os._exit(code)


def _train(order: Order) -> Done:
    told = {SECRET: order.secret, STORE: order.store}
    os.environ |= order.environment | {name: value for name, value in told.items() if value}
    run_dir = Path(order.run_dir)
    if os.path.isdir(order.folder):
        os.chdir(order.folder)
    with output_kept(run_dir):
        return Done.model_validate({"status": train(run_dir, order.patience)})


if __name__ == "__main__":
    main()
