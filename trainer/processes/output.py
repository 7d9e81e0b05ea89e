"""Keeps what each process of a run prints in a file of the run's folder, whatever started the process."""

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from trainer.health.peers import no_folder
from trainer.run.durable_state import read_durable_state

LOGS = "logs"


@contextlib.contextmanager
def output_kept(run_dir: Path) -> Iterator[None]:
    """Append stdout and stderr to `logs/attempt-01-rank-0000.log` while the block runs, including those of C code and
    child processes. An exception that ends the block is printed there.

    Every rank must enter it before any passes the first barrier of `trainer.loop.train`, which begins the attempt.

    Raises:
        BadMachine: the run's folder does not exist here.
    """
    if not run_dir.is_dir():
        raise no_folder(run_dir, [socket.gethostname()], [int(os.environ.get("RANK", "0"))])
    attempt = read_durable_state(run_dir).attempt + 1
    path = run_dir / LOGS / f"attempt-{attempt:02d}-rank-{int(os.environ.get('RANK', '0')):04d}.log"
    path.parent.mkdir(exist_ok=True)
    before = {number: os.dup(number) for number in (1, 2)}
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    _point({1: log, 2: log})
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(line_buffering=True)
    print(time.strftime("%Y-%m-%d %H:%M:%S%z"), socket.gethostname(), "pid", os.getpid(), file=sys.stderr)
    try:
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        _point(before)
        for file in before.values():
            os.close(file)


def _point(files: dict[int, int]) -> None:
    """Redirect each file descriptor (a key) to another (its value)."""
    sys.stdout.flush()
    sys.stderr.flush()
    for number, file in files.items():
        os.dup2(file, number)
