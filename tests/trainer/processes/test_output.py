"""What a process prints while it trains is in the run's folder, however it was written."""

import socket
import subprocess
import sys

import pytest

from trainer.health.peers import BadMachine
from trainer.processes.output import output_kept
from trainer.record.lines import Record

PROGRAM = """
import ctypes, os, subprocess, sys
from pathlib import Path
from trainer.processes.output import output_kept
print("before")
with output_kept(Path(sys.argv[1])):
    print("python")
    print("error", file=sys.stderr)
    os.write(1, b"descriptor\\n")
    subprocess.run(["echo", "child"])
    libc = ctypes.CDLL(None)
    libc.puts(b"c code")
    libc.fflush(None)
print("after")
with output_kept(Path(sys.argv[1])):
    raise ValueError("an end")
"""


def test_everything_goes_to_the_log_and_the_terminal_comes_back(tmp_path):
    Record(tmp_path, 1).event("attempt_started")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"RANK": "3", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == ["before", "after"]
    assert done.stderr.count("ValueError: an end") == 1
    [path] = (tmp_path / "logs").iterdir()
    assert path.name == "attempt-02-rank-0003.log"
    first, *lines = path.read_text().splitlines()
    assert "pid" in first
    assert lines[:5] == ["python", "error", "descriptor", "child", "c code"]
    assert lines[-1] == "ValueError: an end"


def test_a_killed_process_leaves_what_it_had_printed(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from trainer.processes.output import output_kept\n"
        "with output_kept(Path(sys.argv[1])): print('the last words'); os.kill(os.getpid(), 9)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, env=environment)
    assert done.returncode == -9
    assert (tmp_path / "logs" / "attempt-01-rank-0000.log").read_text().splitlines()[1:] == ["the last words"]


def test_a_missing_folder_is_a_bad_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    with (
        pytest.raises(BadMachine, match=r"gone does not exist on .*run\.root") as caught,
        output_kept(tmp_path / "gone"),
    ):
        pass
    assert (caught.value.hosts, caught.value.ranks) == ([socket.gethostname()], [5])
