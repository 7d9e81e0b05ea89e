"""`muster cluster up` runs the server beside Ray, starts it again when it dies, and neither outlives it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

RUN = "import sys; from cluster.gangs.head import run_head; sys.exit(run_head({ray!r}, {server!r}))"


def program(body: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{body}"]


def wait_for(reached, seconds=60.0):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def begin(tmp_path):
    """Starts a head of two programs that write their ids into files; the process, and what the files have."""
    started: list[subprocess.Popen] = []

    def start(ray: str = "time.sleep(600)", server: str = "time.sleep(600)", again: float = 0.0):
        note = "open({!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        both = [program(note.format(str(tmp_path / name)) + body) for name, body in (("ray", ray), ("server", server))]
        code = f"import cluster.gangs.head as head; head.AGAIN = {again}\n" + RUN.format(ray=both[0], server=both[1])
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process, lambda name: [int(pid) for pid in _lines(tmp_path / name)]

    yield start
    for process in started:
        process.kill()
        process.wait()


def _lines(path):
    return path.read_text().splitlines() if path.exists() else []


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_dies_is_started_again(begin):
    process, pids = begin()
    for count in (1, 2, 3):
        wait_for(lambda count=count: len(pids("server")) == count)
        os.kill(pids("server")[-1], signal.SIGKILL)
    wait_for(lambda: len(pids("server")) == 4)
    assert len(pids("ray")) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: gone(pids("server")[-1]))
    assert process.communicate()[1].count("died (-9) and is restarted") == 3


def test_a_server_that_says_that_it_cannot_run_is_not(begin):
    process, pids = begin(server="sys.exit(2)")
    wait_for(lambda: pids("server") and pids("ray"))
    assert "continues without its server" in process.stderr.readline()
    assert process.poll() is None
    os.kill(pids("ray")[0], signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert len(pids("server")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_to_ray_and_its_code_is_the_end(begin, number):
    caught = f"signal.signal({int(number)}, lambda *_: sys.exit(7)); print(flush=True); time.sleep(600)"
    process, pids = begin(ray=f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n{caught}")
    wait_for(lambda: pids("server") and pids("ray"))
    wait_for(lambda: _catches(pids("ray")[0], number))
    process.send_signal(number)
    assert process.wait(60) == 7
    wait_for(lambda: gone(pids("server")[-1]))


def _catches(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_neither_outlives_it(begin):
    process, pids = begin()
    wait_for(lambda: pids("server") and pids("ray"))
    process.kill()
    wait_for(lambda: gone(pids("server")[0]) and gone(pids("ray")[0]))


def test_a_signal_that_comes_after_ray_has_ended_neither_hides_its_end_nor_fails(begin):
    process, pids = begin(server="sys.exit(1)", again=3.0)
    assert "died (1) and is restarted" in process.stderr.readline()
    wait_for(lambda: pids("ray"))
    os.kill(pids("ray")[0], signal.SIGKILL)  # unseen until those three seconds are over
    wait_for(lambda: gone(pids("ray")[0]))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGKILL
