"""The cost of the record and of shipping it to MLflow, with a tracker that is healthy, slow, answering 500, or down.

Run: `python benchmarks/tracking.py`: a record's time on the training thread, CPU time of the shipping process, and the
step times of live runs that differ only in their tracker. They take turns; those whose turn it is not are suspended,
shippers included. `--outage 600` instead trains one run through ten minutes of 500s.
"""

import argparse
import contextlib
import itertools
import logging
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers" / "clusters"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers" / "processes"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from ranks import free_port
from tracker import FaultyServer, assert_all_shown

from configs import from_dict, load, resolve, to_yaml
from configs.sections.data import PrepareConfig
from trainer.data.prepare.prepare import prepare
from trainer.record.lines import MetricsIndex, Record, read_metrics
from trainer.run.stop import request_stop
from trainer.tracking import read_state

ROOT = Path(__file__).parents[1]
STEPS = 300
SLOW = 5.0
"""Seconds until a slow tracker answers."""


def metrics(step: int, layers: int, experts: int) -> dict:
    load = [[random.random() for _ in range(experts)] for _ in range(layers)]
    scalars = ["loss", "aux_loss", "z_loss", "lr", "grad_norm", "tokens_per_second", "tflops", "memory_gb", "data_wait"]
    values = {name: random.random() for name in scalars}
    return {
        "step": step, **values, "tokens": step, "sequences": step, "step_time": 0.5, "expert_load": load,
        "expert_maxvio": [1.0] * layers, "expert_dead": [0] * layers, "router_entropy": [1.0] * layers,
        "router_confidence": [0.5] * layers, "dropped": [0.0] * layers, "rank_time": [0.4, 0.4],
    }  # fmt: skip


def costs() -> None:
    for layers, experts in ((4, 8), (24, 64)):
        with tempfile.TemporaryDirectory() as folder:
            record, times = Record(folder, 1), []
            for step in range(1, STEPS + 1):
                values = metrics(step, layers, experts)
                start = time.perf_counter()
                record.metrics(values)
                times.append(time.perf_counter() - start)
        print(
            f"a record of {layers} x {experts} experts, on the training thread: {statistics.median(times) * 1e6:.0f} us"
        )

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        record = Record(run_dir, 1)
        config, _ = resolve(
            from_dict({"run": {"name": "run", "root": folder}, "data": {"path": folder}}), vocab_size=256
        )
        (run_dir / "config.yaml").write_text(to_yaml(config))
        record.event("attempt_started")
        for step in range(1, STEPS + 1):
            record.metrics(metrics(step, 4, 8))
        record.event("attempt_ended", status="FINISHED", reason="", step=STEPS)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-P", "-m", "trainer.tracking", str(run_dir), "--once"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"shipping {STEPS} steps: {cpu:.1f} s of CPU in another process ({wall:.1f} s), "
            f"peak {after.ru_maxrss / 1e6:.2f} GB"
        )


class LiveRun:
    """The quickstart model in training, in a process of its own with a shipper of its own."""

    def __init__(self, root: Path, data: Path, name: str, uri: str | None) -> None:
        self.run_dir = root / name
        tree = load("quickstart").model_dump(exclude_unset=True) | {
            "run": {"name": name, "root": str(root)},
            "data": {"path": str(data)},
            "checkpoint": {"every": 0},
            "cluster": {"hang_timeout": 36_000},  # its clock runs on while it is suspended
            "tracking": {"enabled": uri is not None, "uri": uri, "interval": 1.0, "export_model": False},
        }
        tree["train"] |= {"steps": 10**6, "eval_every": 0}
        (root / f"{name}.yaml").write_text(to_yaml(from_dict(tree)))
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | alone | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        with (root / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer", str(root / f"{name}.yaml")],
                env=environment | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
            )  # fmt: skip
        while self.steps() < 3:
            assert self.process.poll() is None, (root / f"{name}.log").read_text()
            time.sleep(0.5)

    def steps(self) -> int:
        return max((record["step"] for record in read_metrics(self.run_dir)), default=0)

    def send(self, number: int) -> None:
        """Send a signal to the run and its shipper."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.send_signal(number)

    def step_time(self, since: float) -> tuple[float, int]:
        """(Seconds from a record to the next, median since a time, number of them)."""
        times = [record["time"] for record in read_metrics(self.run_dir) if record["time"] > since]
        between = [
            after - before for before, after in itertools.pairwise(times[1:])
        ]  # without the one that it was suspended in
        return statistics.median(between), len(between)

    def stop(self) -> None:
        request_stop(self.run_dir)
        self.process.wait(180)

    def waiting(self) -> int:
        """Number of records that the tracker lacks, as far as the shipper knows."""
        left = MetricsIndex(self.run_dir, read_state(self.run_dir).get("offset", 0))
        left.update()
        return len(left.lines)

    def kill(self) -> None:
        """End the run and its shipper if they still run: a benchmark that fails leaves nothing behind."""
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()

    def complete(self, root: Path) -> str:
        """Send what is missing, and check that the tracker has each step once, under one run."""
        missed, until = self.waiting(), time.monotonic() + 300
        command = [sys.executable, "-P", "-m", "trainer.tracking", str(self.run_dir), "--once"]
        while subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
            assert time.monotonic() < until  # its own shipper may still be sending
        assert_all_shown(root, self.run_dir)
        return f"{missed} of {self.steps()} records were missing at its end; afterwards each is shown once"


def prepared(folder: Path) -> Path:
    sources = [str(ROOT / package) for package in ("configs", "models", "trainer", "cluster")]
    prepare(sources, folder / "data", PrepareConfig(tokenizer="bytes"), workers=1, progress=False)
    return folder / "data"


def faults() -> dict[str, Callable[[str], str | None]]:
    def slow(path: str) -> None:
        time.sleep(SLOW)

    return {"healthy": lambda path: None, "slow": slow, "500": lambda path: "before", "down": lambda path: None}


def turns(rounds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        root = Path(folder)
        data = prepared(root)
        servers = {name: FaultyServer(root) for name in faults()}
        runs: dict[str, LiveRun] = {}
        for name, server in servers.items():
            server.fault = faults()[name]
        servers["down"].down()
        for name in ("off", *servers):
            runs[name] = LiveRun(root, data, name, servers[name].uri if name in servers else None)
            ends.callback(runs[name].kill)
            time.sleep(10)  # for its shipper to start
            runs[name].send(signal.SIGSTOP)
        took: dict[str, list[float]] = {name: [] for name in runs}
        counts = dict.fromkeys(runs, 0)
        for turn in range(rounds):
            names = list(runs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                since, until = time.time(), runs[name].steps() + steps
                runs[name].send(signal.SIGCONT)
                while runs[name].steps() < until:
                    time.sleep(0.2)
                runs[name].send(signal.SIGSTOP)
                median, count = runs[name].step_time(since)
                took[name].append(median)
                counts[name] += count
        for run in runs.values():
            run.send(signal.SIGCONT)
            request_stop(run.run_dir)
        for run in runs.values():
            run.stop()
        servers["down"].up()
        for server in servers.values():
            server.fault = lambda path: None
        print(f"load of the machine {os.getloadavg()[0]:.1f}; {rounds} turns of {steps} steps each")
        for name, run in runs.items():
            ratios = sorted(own / off for own, off in zip(took[name], took["off"], strict=True))
            told = "" if name == "off" else f"; {run.complete(root)}"
            print(
                f"tracker {name}: {statistics.median(took[name]):.3f} s a step, x off {statistics.median(ratios):.3f} "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f}), {counts[name]} steps{told}"
            )


def outage(seconds: float, around: float) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        root = Path(folder)
        server = FaultyServer(root)
        run = LiveRun(root, prepared(root), "run", server.uri)
        ends.callback(run.kill)
        refused = 0

        def refuse(path: str) -> str:
            nonlocal refused
            refused += 1
            return "before"

        phases: list[tuple[str, float, Any]] = [
            ("well", around, lambda path: None), ("500", seconds, refuse), ("well again", around, lambda path: None),
        ]  # fmt: skip
        for name, length, fault in phases:
            server.fault, since = fault, time.time()
            load = f"load {os.getloadavg()[0]:.1f}"
            time.sleep(length)
            median, count = run.step_time(since)
            print(
                f"{name} for {length:.0f} s: {median:.3f} s a step ({count} steps), {refused} requests refused so far, "
                f"{run.waiting()} records waiting at its end, {load} to {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        run.stop()
        print(run.complete(root))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--outage", type=float, metavar="SECONDS", help="train one run through this many seconds of 500s"
    )
    parser.add_argument("--around", type=float, default=120.0, help="seconds before and after an outage")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    asked = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    if asked.outage:
        outage(asked.outage, asked.around)
        return
    costs()
    turns(asked.rounds, asked.steps)


if __name__ == "__main__":
    main()
