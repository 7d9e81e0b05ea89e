"""How fast the dashboard's server answers over many and long runs, and what it takes of memory and processor.

`dashboard_peers.py` is about its pages in a browser, beside those of others.

Run: `python benchmarks/dashboard.py FOLDER`. FOLDER is made: runs in the format that training writes, with numbers that
are made up: ten thousand, one of a million steps, one of 3,000 metrics. Times are of whole requests, from the client's
first byte to its last, uncompressed; "cold" is the first request of each kind to a server that has just been started,
and "processor" what the server computed meanwhile, which says more on a shared machine.
Then 100 of the runs are trained, a step every second each, while pages watch.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from records import write_run

from configs import load, to_yaml
from trainer.record.columns import update_columns
from trainer.record.lines import Record

ROOT = Path(__file__).parents[1]
KEPT = ".dashboard.json"
LIVE = 100
METRICS = [
    "loss",
    "eval_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "tflops",
    "memory_gb",
    "step_time",
    "data_wait",
    "mfu",
]
"""Those that a run's page shows at first."""


def make(folder: Path, runs: int, steps: int, metrics: int) -> Path:
    """The folder of all runs."""
    root = folder / "runs"
    if root.exists():
        return root
    config = load("quickstart")
    for number in range(runs):
        run = root / f"run-{number:05d}"
        write_run(run, steps=40, every=20)
        own = config.model_copy(
            update={
                "run": config.run.model_copy(update={"name": run.name, "seed": number % 5}),
                "optim": config.optim.model_copy(update={"lr": 1e-4 * (1 + number % 40)}),
            }
        )
        (run / "config.yaml").write_text(to_yaml(own))
    write_run(root / "long", steps, every=1000)
    covered = 0
    while (now := update_columns(root / "long", covered)) > covered:  # as it is while a run trains
        covered = now
    wide = root / "wide"
    wide.mkdir()
    (wide / "config.yaml").write_text("run: {name: wide}\n")
    record = Record(wide, 1)
    record.event("attempt_started", world_size=1)
    for step in range(1, 501):
        record.metrics({"step": step, "loss": 1 / step} | {f"metric_{i}": i / step for i in range(metrics - 1)})
    record.event("attempt_ended", status="FINISHED", reason="reached train.steps", step=500)
    record.close()
    return root


class Server:
    """`muster dashboard` in a process of its own."""

    def __init__(self, root: Path, token: Path) -> None:
        code = "import sys; from cluster.cli import main; sys.argv[0] = 'muster'; main()"
        command = [sys.executable, "-c", code, "dashboard", "--root", str(root), "--port", "0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MUSTER_DASHBOARD_TOKEN": str(token)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        link = self.process.stdout.readline()
        address, _, self.token = link.strip().partition("/login#")
        self.port = int(address.rpartition(":")[2])
        self.seen = psutil.Process(self.process.pid)

    def get(self, path: str) -> tuple[float, bytes]:
        """Milliseconds, and what came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        began = time.perf_counter()
        connection.request("GET", path, headers={"authorization": f"Bearer {self.token}"})
        answer = connection.getresponse()
        body = answer.read()
        took = 1e3 * (time.perf_counter() - began)
        connection.close()
        assert answer.status == 200, body
        return took, body

    def left(self) -> int:
        return int(json.loads(self.get("/api/now")[1])["left"])

    def memory(self) -> float:
        """MB at the most so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3

    def processor(self) -> float:
        """Seconds so far."""
        times = self.seen.cpu_times()
        return float(times.user + times.system)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@contextmanager
def serving(root: Path, token: Path) -> Iterator[Server]:
    server = Server(root, token)
    try:
        yield server
    finally:
        server.end()


def train(root: str, until: float) -> None:
    """Be 100 runs in training, a step a second each."""
    names = sorted(path for path in os.listdir(root) if path.startswith("run-"))[:LIVE]
    records = []
    for name in names:
        record = Record(Path(root) / name, int(time.time()))  # an attempt after all others
        record.event("attempt_started", world_size=8)
        records.append(record)
    step = 40
    while time.time() < until:
        step += 1
        for record in records:
            record.metrics(
                {"step": step, "loss": 3.0, "tokens": step * 65536, "tokens_per_second": 1e5, "step_time": 0.5}
            )
            time.sleep(1 / LIVE)
    for record in records:
        record.event("attempt_ended", status="STOPPED", reason="the benchmark is over", step=step)


def watch(server: Server, path: str | None, until: float) -> None:
    """A page: listens, and asks for this again whenever something has changed."""
    with socket.create_connection(("127.0.0.1", server.port)) as page:
        asked = f"GET /api/changes HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {server.token}\r\n\r\n"
        page.sendall(asked.encode())
        page.settimeout(1.0)
        while time.time() < until:
            try:
                changed = b"changed" in page.recv(1 << 20)
            except TimeoutError:
                continue
            if changed and path:
                server.get(path)


def live(root: Path, token: Path, seconds: float) -> Iterator[tuple[str, float]]:
    """Share of a core that the server takes by who watches, and what it is for the page."""
    for label, path in (("nobody", ""), ("a page that listens", None), ("Now", "/api/now"), ("Runs", "/api/runs")):
        with serving(root, token) as server:
            until = time.time() + seconds + 20
            training = multiprocessing.get_context("spawn").Process(target=train, args=(str(root), until), daemon=True)
            training.start()
            while len(json.loads(server.get("/api/now")[1])["running"]) < LIVE:
                time.sleep(0.5)
            pages = [threading.Thread(target=watch, args=(server, path, time.time() + seconds))] * (path != "")
            for page in pages:
                page.start()
            time.sleep(3.0)
            began, before = time.time(), server.processor()
            time.sleep(seconds - 5.0)
            yield label, (server.processor() - before) / (time.time() - began)
            for page in pages:
                page.join()
            training.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--metrics", type=int, default=3000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each way to watch 100 live runs; 0: none")
    args = parser.parse_args()
    root, token = make(args.folder, args.runs, args.steps, args.metrics), args.folder / "token"
    (root / KEPT).unlink(missing_ok=True)
    with serving(root, token) as server:
        began = time.perf_counter()
        while server.left():
            time.sleep(0.1)
        print(f"all {args.runs:,} runs read for the first time: {time.perf_counter() - began:.1f} s, "
              f"{server.processor():.1f} s of the processor, {server.memory():.0f} MB at the most")  # fmt: skip
    curves = "&".join(f"metric={name}" for name in METRICS)
    wide = "&".join(f"metric=metric_{number}" for number in range(0, args.metrics - 1, args.metrics // 20))
    middle = args.steps // 2
    requests = {
        "Now": "/api/now",
        f"Runs, {args.runs:,} of them": "/api/runs",
        "two columns of them": "/api/columns?key=optim.lr&key=metric:grad_norm",
        f"Run, {args.steps:,} steps": "/api/runs/long",
        "where its time went": "/api/runs/long/goodput",
        f"{len(METRICS)} curves of it": f"/api/runs/long/series?{curves}",
        "zoom to 1% of it": f"/api/runs/long/series?{curves}&from={middle}&to={middle + args.steps // 100}",
        "zoom to 200 steps, tokens": f"/api/runs/long/series?metric=loss&x=tokens&from={middle * 65536}"
        f"&to={(middle + 200) * 65536}",
        f"Run, {args.metrics:,} metrics": "/api/runs/wide",
        "20 curves of it": f"/api/runs/wide/series?{wide}",
    }
    found: dict[str, list[Any]] = {}
    with serving(root, token) as server:
        for label, path in requests.items():
            before = server.processor()
            took, body = server.get(path)
            computed = 1e3 * (server.processor() - before)
            then = [server.get(path)[0] for _ in range(args.times)]
            found[label] = [took, computed, statistics.median(then), len(body) / 1e3]
        memory = server.memory()
    print("| request | cold, ms | processor, ms | then (median), ms | kB |\n|---|---|---|---|---|")
    for label, (cold, computed, later, size) in found.items():
        print(f"| {label} | {cold:.0f} | {computed:.0f} | {later:.0f} | {size:,.0f} |")
    print(f"memory at the most: {memory:.0f} MB")
    if args.seconds:
        print("| who watches 100 live runs | of a core |\n|---|---|")
        for label, share in live(root, token, args.seconds):
            print(f"| {label} | {share:.1%} |", flush=True)
    print(f"load when it ended: {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
