"""The dashboard in a real browser, beside MLflow's page and TensorBoard, on the same runs.

Run: `python benchmarks/dashboard_peers.py FOLDER [--tensorboard PATH]`. FOLDER is made: the same numbers of the same
runs as muster's records, in MLflow's SQLite store, and as TensorBoard's event files. PATH is the program `tensorboard`,
in a virtual environment of its own; without it TensorBoard is left out.

All servers run at once and take turns with each page. A page is timed from its address to the moment when what is
waited for is on the screen: the first row, or the first chart with its curves. "First" is the first of its kind that a
server is asked for, and "new" a later one, both by a browser that has nothing of it yet; "again" is the page loaded
anew in the same browser. Bytes are those that came over the wire, two seconds after that included; the processor's time
and the memory (what is unique to its processes) are the server's.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from dashboard import Server
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from trainer.record.columns import update_columns
from trainer.record.lines import Record, read_metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers" / "processes"))
from ranks import free_port

METRICS = ["loss", "lr", "grad_norm", "tokens_per_second", "step_time"]
PATIENCE = 120_000
"""Milliseconds that a page may take."""
WRITE_EVENTS = """
import json, sys
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
runs, out, metrics = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
for run in sorted(runs.glob("run-*")):
    writer = EventFileWriter(str(out / run.name))
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values = [Summary.Value(tag=name, simple_value=line[name]) for name in metrics]
        writer.add_event(Event(wall_time=line["time"], step=line["step"], summary=Summary(value=values)))
    writer.close()
"""
"""In TensorBoard's own environment: the records of muster's runs as its event files."""


def made(folder: Path, runs: int, steps: int) -> Path:
    """Muster's runs."""
    root = folder / "runs"
    for number in range(0 if root.exists() else runs):
        run = root / f"run-{number:03d}"
        record = Record(run, 1)
        (run / "config.yaml").write_text(f"run: {{name: {run.name}, seed: {number}}}\ntrain: {{steps: {steps}}}\n")
        record.event("attempt_started", world_size=8)
        for step in range(1, steps + 1):
            wave = math.sin(step * (7 + number)) / 10
            record.metrics({
                "step": step, "loss": 2 + 8 / (step + number) + wave, "lr": 3e-4 * step / steps, "grad_norm": 1 + wave,
                "tokens_per_second": 131072.5 * (1 + wave), "step_time": 0.5 * (1 - wave), "tokens": step * 65536,
            })  # fmt: skip
        record.event("attempt_ended", status="FINISHED", reason="reached train.steps", step=steps)
        record.close()
        covered = 0
        while (now := update_columns(run, covered)) > covered:  # as it is while a run trains
            covered = now
    return root


def made_for_mlflow(folder: Path, root: Path) -> str:
    """The URI of MLflow's store."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    store, part = folder / "mlflow.db", folder / "mlflow.db.part"
    if not store.exists():
        part.unlink(missing_ok=True)
        client = MlflowClient(f"sqlite:///{part.absolute()}")
        experiment = client.create_experiment("peers", artifact_location=str(folder / "artifacts"))
        for run in sorted(root.glob("run-*")):
            id = client.create_run(experiment, run_name=run.name).info.run_id
            told = [
                Metric(name, record[name], int(record["time"] * 1e3), record["step"])
                for record in read_metrics(run) for name in METRICS
            ]  # fmt: skip
            for begin in range(0, len(told), 1000):
                client.log_batch(id, told[begin : begin + 1000])
            client.set_terminated(id)
        part.rename(store)
    return f"sqlite:///{store.absolute()}"


class Peer:
    """A server of one product, and its pages: an address, and what is waited for there."""

    def __init__(self, name: str, process: subprocess.Popen[Any], host: str, pages: dict[str, tuple[str, str]]) -> None:
        self.name, self.process, self.host, self.pages = name, process, host, pages
        self.login: Callable[[BrowserContext], None] = lambda context: None

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def processor(self) -> float:
        """Seconds so far."""
        times = [each.cpu_times() for each in self.processes()]
        return sum(each.user + each.system for each in times)

    def memory(self) -> float:
        """MB now."""
        return sum(each.memory_full_info().uss for each in self.processes()) / 1e6


def wait_for(url: str, ready: Callable[[bytes], bool], process: subprocess.Popen[Any]) -> None:
    """Until it answers as it should."""
    while True:
        assert process.poll() is None, f"the server of {url} has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60) as answer:
            if ready(answer.read()):
                return
        time.sleep(0.1)


@contextlib.contextmanager
def started(name: str, command: list[str], path: str, ready: Callable[[bytes], bool], log: Path) -> Iterator[Peer]:
    """A server that has read its data; `{port}` in its command is a free one."""
    port, began = free_port(), time.perf_counter()
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with log.open("w") as output:
        command = [part.format(port=port) for part in command]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    peer = Peer(name, process, f"http://127.0.0.1:{port}", {})
    try:
        wait_for(f"{peer.host}{path}", ready, process)
        told(peer, time.perf_counter() - began)
        yield peer
    finally:
        children = peer.processes()
        for each in reversed(children):
            each.terminate()
        psutil.wait_procs(children, timeout=20)


def told(peer: Peer, seconds: float) -> None:
    print(f"{peer.name}: all read {seconds:.1f} s after its start, {peer.processor():.1f} s of the processor, "
          f"{peer.memory():.0f} MB", flush=True)  # fmt: skip


@contextlib.contextmanager
def muster(folder: Path, root: Path) -> Iterator[Peer]:
    for kept in root.glob(".*.json"):
        kept.unlink()
    began = time.perf_counter()
    server = Server(root, folder / "token")
    try:
        while server.left():
            time.sleep(0.1)
        ten = "&".join(f"run=run-{number:03d}" for number in range(10))
        peer = Peer("muster", server.process, f"http://127.0.0.1:{server.port}", {
            "table of runs": ("/runs", ".table .rows .row"),
            "curve of a run": ("/run/run-042", '.big-chart .plot[aria-label*="at step"]'),
            "curves of 10 runs": (f"/compare?{ten}", ".compare .plot[aria-label*=\"at step\"]"),
        })  # fmt: skip
        told(peer, time.perf_counter() - began)

        def login(context: BrowserContext) -> None:
            answer = context.request.post(
                f"{peer.host}/login", data={"token": server.token}, headers={"origin": peer.host}
            )
            assert answer.ok

        peer.login = login
        yield peer
    finally:
        server.end()


@contextlib.contextmanager
def mlflow(folder: Path, root: Path) -> Iterator[Peer]:
    from mlflow import MlflowClient

    uri = made_for_mlflow(folder, root)
    client = MlflowClient(uri)
    peers = client.get_experiment_by_name("peers")
    assert peers is not None
    experiment = peers.experiment_id
    ids = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment], max_results=1000)}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1",
               "--port", "{port}", "--workers", "1"]  # fmt: skip
    with started("MLflow", command, "/health", lambda body: body == b"OK", folder / "mlflow.log") as peer:
        drawn = ".js-plotly-plot .scatterlayer path.js-line"
        peer.pages = {
            "table of runs": (f"/#/experiments/{experiment}/runs", ".ag-center-cols-container .ag-row"),
            "curve of a run": (f"/#/experiments/{experiment}/runs/{ids['run-042']}/model-metrics", drawn),
            "curves of 10 runs": (f"/#/experiments/{experiment}/runs?compareRunsMode=CHART", drawn),
        }
        yield peer


@contextlib.contextmanager
def tensorboard(folder: Path, root: Path, program: Path) -> Iterator[Peer]:
    events = folder / "events"
    if not events.exists():
        python = program.parent / "python"
        subprocess.run([python, "-c", WRITE_EVENTS, root, events, *METRICS], check=True)
    runs = len(list(root.glob("run-*")))
    command = [str(program), "--logdir", str(events), "--host", "127.0.0.1", "--port", "{port}"]

    def ready(body: bytes) -> bool:
        return len(json.loads(body)) == runs

    with started("TensorBoard", command, "/data/runs", ready, folder / "tensorboard.log") as peer:
        drawn = 'scalar-card :text("run-0")'  # in the table below a chart, which comes with its curves
        peer.pages = {
            "curve of a run": ("/?runFilter=run-042#timeseries", drawn),
            "curves of 10 runs": ("/?runFilter=run-00#timeseries", drawn),
        }
        yield peer


class Page:
    """A browser's page of which the bytes are counted that come over the wire."""

    def __init__(self, browser: Browser, peer: Peer) -> None:
        self.peer = peer
        self.context = browser.new_context(viewport={"width": 1440, "height": 900})
        self.context.set_default_timeout(PATIENCE)
        peer.login(self.context)
        self.page = self.context.new_page()
        self.bytes = 0
        session = self.context.new_cdp_session(self.page)
        session.send("Network.enable")
        session.on("Network.loadingFinished", self._count)

    def _count(self, event: dict[str, Any]) -> None:
        self.bytes += event["encodedDataLength"]

    def open(self, what: str, again: bool = False) -> tuple[float, float, float]:
        """Milliseconds until it is on the screen, kB, milliseconds of the server's processor."""
        path, drawn = self.peer.pages[what]
        self.bytes, used, began = 0, self.peer.processor(), time.perf_counter()
        if again:
            self.page.reload(wait_until="commit")
        else:
            self.page.goto(self.peer.host + path, wait_until="commit")
        self.page.locator(drawn).first.wait_for()
        took = time.perf_counter() - began
        self.page.wait_for_timeout(2000)  # what still comes is counted, too
        return 1e3 * took, self.bytes / 1e3, 1e3 * (self.peer.processor() - used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--tensorboard", type=Path, metavar="PATH", help="the program; without it, it is left out")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="keep what each page looked like")
    args = parser.parse_args()
    root = made(args.folder, args.runs, args.steps)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(muster(args.folder, root)), stack.enter_context(mlflow(args.folder, root))]
        if args.tensorboard:
            peers.append(stack.enter_context(tensorboard(args.folder, root, args.tensorboard.absolute())))
        else:
            print("TensorBoard is left out: --tensorboard PATH names it")
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        print(f"Chromium {browser.version}, MLflow {version('mlflow')}")
        found: dict[tuple[str, str], list[list[tuple[float, float, float]]]] = {}
        for turn in range(1 + args.times):
            for what in peers[0].pages:
                for peer in (each for each in peers if what in each.pages):
                    page = Page(browser, peer)
                    opened = [page.open(what), page.open(what, again=True)]
                    found.setdefault((what, peer.name), []).append(opened)
                    if args.pictures and not turn:
                        page.page.screenshot(path=args.pictures / f"{what}-{peer.name}.png".replace(" ", "-"))
                    page.context.close()
        print("| page | | first, ms | new, ms | again, ms | kB, new | kB, again | processor, new, ms |")
        print("|---|---|---|---|---|---|---|---|")
        for (what, name), turns in found.items():
            new = [statistics.median(values) for values in zip(*(new for new, _ in turns[1:]), strict=True)]
            again = [statistics.median(values) for values in zip(*(again for _, again in turns[1:]), strict=True)]
            print(f"| {what} | {name} | {turns[0][0][0]:,.0f} | {new[0]:,.0f} | {again[0]:,.0f} | {new[1]:,.0f} | "
                  f"{again[1]:,.0f} | {new[2]:,.0f} |")  # fmt: skip
        for peer in peers:
            print(f"{peer.name}: {peer.memory():.0f} MB when it ended")
        browser.close()
    print(f"load when it ended: {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
