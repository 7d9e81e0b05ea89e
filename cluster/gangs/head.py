"""`muster cluster up`: Ray's head and the cluster's server as child processes; the server is restarted when it dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from configs import ExitCode
from trainer.processes.orphans import end_with

AGAIN = 1.0
"""Seconds before the server is restarted."""
ENDING = 10.0
"""Seconds that it may take to shut down."""


def run_head(ray: Sequence[str], server: Sequence[str]) -> int:
    """Run both until Ray ends. Signals are forwarded to Ray; neither process outlives this one.

    A server that exits with code 2, because it cannot run, is not restarted.

    Returns:
        Ray's exit code.
    """
    # A process group each: Ctrl-C reaches this process only, and Ray's reaper kills all of Ray's group.
    with_this = partial(end_with, os.getpid())

    def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, start_new_session=True, preexec_fn=with_this)

    head, beside = start(ray), start(server)

    def pass_on(number: int, _: object) -> None:
        # Not by `head.send_signal`, which takes the exit code of one that has just ended from the `os.wait` below.
        with suppress(ProcessLookupError):
            if number == signal.SIGTERM:
                os.kill(head.pid, number)
            else:  # to the whole group, as a terminal does
                os.killpg(head.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    while True:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if pid == head.pid:
            break
        if pid != beside.pid:
            continue
        if code == ExitCode.MISTAKE:
            print("muster: the cluster continues without its server: see above", file=sys.stderr, flush=True)
            continue
        print(f"muster: the cluster's server died ({code}) and is restarted", file=sys.stderr, flush=True)
        time.sleep(AGAIN)
        beside = start(server)
    _end(beside)
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
