"""Goodput of the quickstart model whose process is killed at random, beside what Young, Daly and a simulator predict.

Run: `python benchmarks/goodput.py measure FOLDER --mtbf 60 90 --every 10 100 auto --seconds 400`, once or more often;
then `python benchmarks/goodput.py report FOLDER`, which prints tables and writes FOLDER/goodput.png.

A measurement is a real run of `muster train` or, with --without-ray, of the same warm process
(`trainer.processes.warm`) in a loop that restarts it. The training process is killed by `kill -9` after a random,
exponentially distributed time; nobody intervenes. What counts is the time from the start of the first step to the end
of the last one, as attributed by `trainer.record.goodput`. The model is the quickstart's, without evaluations. The
simulator uses the same lifetimes and the measured step times.
"""

import argparse
import itertools
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from goodput_simulator import Constants, Life, closed_form, poisson, simulate

from cluster.gangs.worker import ENVIRONMENT
from configs import load
from trainer.checkpoint.cadence import FIRST, PRIOR, daly
from trainer.record.goodput import Steps, book, read_steps, total
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run
from trainer.run.stop import request_stop

LLAMA_DEVICES = 16_384
LLAMA_MTBF = 1 / (PRIOR * LLAMA_DEVICES)
STOPPED = 75
"""Exit code of a run that was stopped with a checkpoint."""
QUIET = ["train.eval_every=0", "train.eval_sequences=8", "train.sample_tokens=0", "tracking.export_model=false"]


# A measurement.


def measure(folder: Path, mtbf: float, every: str, seed: int, seconds: float, without_ray: bool) -> Path:
    """Train for about `seconds` from the first step on while the process is killed repeatedly."""
    run_dir = folder / f"every-{every}-mtbf-{mtbf:g}-seed-{seed}"
    settings = [f"run.root={folder}", f"run.name={run_dir.name}", "train.steps=100000", f"checkpoint.every={every}",
                "cluster.max_failures=1000", *QUIET]  # fmt: skip
    muster = [str(Path(sys.executable).with_name("muster")), "train", "quickstart"]
    command = [sys.executable, __file__, "keep"] if without_ray else muster
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{run_dir.name}.log", "a") as log:
        process = subprocess.Popen([*command, *settings], stdout=log, stderr=log)
        killer = Killer(run_dir, random.Random(seed), mtbf)
        stopping = False
        while (code := process.poll()) is None:
            time.sleep(0.1)
            if stopping:
                continue
            killer.look()
            if killer.first_step and time.time() > killer.first_step + seconds and killer.has_stepped:
                stopping = True
                process.send_signal(signal.SIGTERM)
    if code != STOPPED:
        raise RuntimeError(f"{run_dir} ended with exit code {code}: see {run_dir}.log")
    (run_dir / "measured.json").write_text(json.dumps({
        "mtbf": mtbf, "every": every, "seed": seed, "kills": killer.kills, "without_ray": without_ray,
    }))  # fmt: skip
    return run_dir


def keep(settings: list[str]) -> int:
    """Train the quickstart model in a warm process, as `cluster.gangs.worker` does, and again after each kill."""
    run_dir = prepare_run(load("quickstart", settings))
    signal.signal(signal.SIGTERM, lambda *_: request_stop(run_dir))
    command = [sys.executable, "-P", "-m", "trainer.processes.warm"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | ENVIRONMENT) as warm:
        assert warm.stdin is not None
        assert warm.stdout is not None
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            environment = alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job = {"run_dir": str(run_dir), "folder": os.getcwd(), "environment": environment, "patience": 10.0}
            print(json.dumps(job), file=warm.stdin, flush=True)
            warm.stdout.readline()  # its pid
            outcome = json.loads(warm.stdout.readline())
            if outcome.get("kind") != "lost":
                warm.stdin.close()
                print(outcome)
                return STOPPED if outcome.get("status") == "STOPPED" else 1


class Killer:
    """Kills each attempt after a lifetime of its own, following the run's record."""

    def __init__(self, run_dir: Path, draw: random.Random, mtbf: float) -> None:
        self._run_dir, self._draw, self._mtbf = run_dir, draw, mtbf
        self._attempt, self._pid, self._until = 0, 0, math.inf
        self.first_step: float | None = None
        """When the first step began, in Unix seconds."""
        self.has_stepped = False
        """Whether the current attempt has taken a step."""
        self.kills: list[tuple[int, float]] = []
        """Of which attempt, and when."""

    def look(self) -> None:
        """Check what the run is doing, and kill it if its time has come."""
        if self._until < time.time() and (self.has_stepped or self._attempt > 1):
            os.kill(self._pid, signal.SIGKILL)
            self.kills.append((self._attempt, time.time()))
            self._until, self.has_stepped = math.inf, False
        starts = [event for event in read_events(self._run_dir) if event["event"] == "attempt_started"]
        if not starts:
            return
        if starts[-1]["attempt"] > self._attempt:
            self._attempt, self._pid, self.has_stepped = starts[-1]["attempt"], starts[-1]["pid"], False
            self._until = starts[-1]["time"] + self._draw.expovariate(1 / self._mtbf)
        if not self.has_stepped and self._until < math.inf:
            mine = [step for step in each_step(read_steps(self._run_dir)) if step.attempt == self._attempt]
            self.has_stepped = bool(mine)
            if mine and self.first_step is None:
                self.first_step = mine[0].time - mine[0].seconds
                self._until += self.first_step - starts[-1]["time"]


class Step(NamedTuple):
    """One of `Steps`."""

    step: int
    attempt: int
    time: float
    seconds: float
    waited: float


def each_step(steps: Steps) -> list[Step]:
    return [Step(*values) for values in zip(*(column.tolist() for column in steps), strict=True)]


# Reading a measured run.


@dataclass
class Run:
    """One measured run, from the start of its first step to the end of its last."""

    mtbf: float
    """Mean seconds from an attempt's start to its kill, as asked."""
    every: str
    gaps: list[float]
    """Lifetime in seconds of each killed attempt; the first counts from its first step."""
    last_life: float
    """Seconds of the attempt that was not killed, counted likewise."""
    wall: float
    books: dict[str, float]
    """Seconds by category of `trainer.record.goodput`."""
    step_s: float
    """Median step without a write in progress."""
    step_times: list[tuple[float, bool]]
    """Seconds of all steps in order, those cut short by a kill as `step_s`, and whether a write was in progress."""
    between_s: float
    costs: list[float]
    """For each checkpoint, the extra seconds of the step during its write."""
    writes: list[float]
    downs: list[float]
    """From a kill to the next attempt's start."""
    startups: list[float]
    """From there to the first step."""
    intervals: list[int]
    """Steps between checkpoints of an attempt."""
    choices: list[tuple[int, int]]
    """For `auto`: steps between checkpoints, by the steps taken so far, lost ones included."""


def read(run_dir: Path) -> Run:
    """Read a measured run's record."""
    asked = json.loads((run_dir / "measured.json").read_text())
    events, all_steps = read_events(run_dir), read_steps(run_dir)
    steps = each_step(all_steps)
    begin, end = steps[0].time - steps[0].seconds, steps[-1].time
    books = total(book([event for event in events if event["time"] <= end], all_steps))
    books["startup"] -= begin - next(event["began"] for event in events if event["event"] == "resolved")
    starts = {event["attempt"]: event["time"] for event in events if event["event"] == "attempt_started"}
    saves = [event for event in events if event["event"] == "checkpoint" and event["time"] <= end]
    kills = dict(asked["kills"])
    first = {}
    for step in reversed(steps):
        first[step.attempt] = step
    beside = {(event["attempt"], event["step"] + 1) for event in saves}
    alone = [step for step in steps if (step.attempt, step.step) not in beside and step is not first[step.attempt]]
    follows = [(a, b) for a, b in itertools.pairwise(steps) if (b.attempt, b.step) == (a.attempt, a.step + 1)]
    took = {(step.attempt, step.step): step.seconds for step in steps}
    costs = []
    for attempt, after in sorted(beside & took.keys()):
        before = [took[attempt, step] for step in range(after - 8, after) if (attempt, step) in took.keys() - beside]
        costs += [took[attempt, after] - statistics.median(before)] if before else []
    typical = statistics.median(step.seconds for step in alone)
    trace: list[tuple[float, bool]] = []
    for attempt, mine in itertools.groupby(steps, key=lambda step: step.attempt):
        trace += [(step.seconds, (attempt, step.step) in beside) for step in mine]
        trace += [(typical, False)] if attempt in kills else []
    taken = [*(step.time for step in steps), *kills.values()]
    intervals = [b["step"] - a["step"] for a, b in itertools.pairwise(saves) if a["attempt"] == b["attempt"]]
    return Run(
        mtbf=asked["mtbf"],
        every=asked["every"],
        gaps=[when - (begin if attempt == 1 else starts[attempt]) for attempt, when in sorted(kills.items())],
        last_life=end - (starts[max(starts)] if len(starts) > 1 else begin),
        wall=end - begin,
        books=books,
        step_s=typical,
        step_times=trace,
        between_s=statistics.median(b.time - b.seconds - a.time for a, b in follows),
        costs=costs,
        writes=[event["write_s"] for event in saves],
        downs=[starts[attempt + 1] - when for attempt, when in kills.items() if attempt + 1 in starts],
        startups=[first[a].time - first[a].seconds - starts[a] for a in starts if a > 1 and a in first],
        choices=[(0, FIRST)]
        + [
            (sum(time <= event["time"] for time in taken), event["every"])
            for event in events
            if event["event"] == "cadence"
        ],
        intervals=intervals or [event["every"] for event in events if event["event"] == "cadence"],
    )


def constants_of(runs: Sequence[Run]) -> Constants:
    """Medians over all checkpoints and restarts of several runs."""

    def middle(key: str) -> float:
        return statistics.median(value for run in runs for value in getattr(run, key))

    return Constants(
        step=statistics.median(run.step_s for run in runs),
        between=statistics.median(run.between_s for run in runs),
        cost=max(middle("costs"), 0.0),
        write=middle("writes"),
        down=middle("downs"),
        startup=middle("startups"),
    )


# The report.


class Point(NamedTuple):
    """Runs with the same failure rate and interval, for the picture."""

    mtbf: float
    interval: float
    """Seconds between checkpoints."""
    measured: float
    simulated: float
    auto: bool


def report(folder: Path) -> None:
    """Print the tables of all measured runs in a folder and draw the picture."""
    runs = [read(path.parent) for path in sorted(folder.glob("*/measured.json"))]
    constants = constants_of(runs)
    print("measured constants (medians, s):", {key: round(value, 3) for key, value in vars(constants).items()})
    print(f"restarts: {sum(len(run.startups) for run in runs)}, checkpoints: {sum(len(run.writes) for run in runs)}")
    cells: dict[tuple[float, str], list[Run]] = defaultdict(list)
    for run in runs:
        cells[run.mtbf, run.every].append(run)
    rows, points = [], []
    for (mtbf, every), same in sorted(cells.items(), key=lambda item: (item[0][0], len(item[0][1]), item[0][1])):
        wall = sum(run.wall for run in same)
        booked = sum(run.books["step"] for run in same) / wall
        slower = sum(len(run.writes) for run in same) * constants.cost / wall
        lives = [_relive(run, constants) for run in same]
        predicted = sum(life.productive for life in lives) / sum(life.wall for life in lives)
        steps = statistics.median(step for run in same for step in run.intervals) if every == "auto" else int(every)
        law = closed_form(replace(constants, step=statistics.median(run.step_s for run in same)), round(steps), mtbf)
        kills = sum(len(run.gaps) for run in same)
        measured = booked - slower
        shown = every if every != "auto" else f"auto ({steps:g})"
        difference = f"{100 * (measured - predicted):+.1f}"
        shares = [f"{share:.1%}" for share in (booked, measured, predicted)]
        rows.append([f"{mtbf:g} s", shown, str(kills), f"{wall / 60:.1f} min", *shares, difference, f"{law:.1%}"])
        points.append(Point(mtbf, steps * (constants.step + constants.between), measured, predicted, every == "auto"))
    head = ["mean life", "every (steps)", "kills", "time", "booked", "goodput", "simulated", "points", "closed form"]
    _table(head, rows)
    print()
    _table(["one failure in", "best interval by Daly", "simulated", "closed form", "every 100 steps"],
           [_ahead(constants, mtbf) for mtbf in (60.0, 90.0, 600.0, 3600.0, 36_000.0)])  # fmt: skip
    print(f"\n{LLAMA_DEVICES:,} devices, one failure in {LLAMA_MTBF / 3600:.2f} h, steps of 5 s:")
    _table(["restart", "cost of a checkpoint", "write", "interval by Daly", "simulated", "closed form"],
           [_large(*case, restart=constants.down + constants.startup) for case in LARGE])  # fmt: skip
    _draw(constants, points, folder / "goodput.png")


def _relive(run: Run, constants: Constants) -> Life:
    """Simulate a run with its own lifetimes and step times (the machine has fast and slow minutes), and the costs,
    writes and restarts of all runs."""
    own = replace(constants, step=run.step_s)
    step_times = (seconds - constants.cost * beside for seconds, beside in run.step_times)
    return simulate(own, _every(run), iter(run.gaps), 10**9, step_times, run.last_life)


def _every(run: Run) -> int | Callable[[int], int]:
    """The steps between checkpoints; for `auto` as it chose them during the run."""
    if run.every != "auto":
        return int(run.every)
    return lambda taken: next(every for after, every in reversed(run.choices) if after <= taken)


def _best(constants: Constants, mtbf: float) -> int:
    """Steps between checkpoints by Daly."""
    return max(1, round(daly(max(constants.cost, 1e-6), mtbf) / (constants.step + constants.between)))


def _long(constants: Constants, every: int, mtbf: float, failures: int = 2000) -> float:
    """Simulated goodput of a run long enough for some thousand failures."""
    period = constants.step + constants.between + constants.cost / every
    return simulate(constants, every, poisson(mtbf, seed=1), math.ceil(failures * mtbf / period)).goodput


def _ahead(constants: Constants, mtbf: float) -> list[str]:
    every = _best(constants, mtbf)
    seconds = every * (constants.step + constants.between)
    failures = 2000 if mtbf <= 600 else 200
    return [_span(mtbf), f"{every} steps, {_span(seconds)}", f"{_long(constants, every, mtbf, failures):.1%}",
            f"{closed_form(constants, every, mtbf):.1%}", f"{closed_form(constants, 100, mtbf):.1%}"]  # fmt: skip


LARGE = ((None, 1.0, 30.0), (60.0, 1.0, 30.0), (300.0, 1.0, 30.0), (300.0, 10.0, 120.0), (600.0, 60.0, 60.0))
"""Restart (None: as measured here), cost and write of a checkpoint, in seconds."""


def _large(seconds: float | None, cost: float, write: float, restart: float) -> list[str]:
    constants = Constants(step=5.0, cost=cost, write=write, startup=restart if seconds is None else seconds)
    every = _best(constants, LLAMA_MTBF)
    name = f"{restart:.1f} s, as here" if seconds is None else _span(seconds)
    return [name, f"{cost:g} s", f"{write:g} s", f"{every} steps, {_span(every * constants.step)}",
            f"{_long(constants, every, LLAMA_MTBF, 419):.1%}",
            f"{closed_form(constants, every, LLAMA_MTBF):.1%}"]  # fmt: skip


def _span(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds < 120
        else f"{seconds / 60:.3g} min"
        if seconds < 7200
        else f"{seconds / 3600:.3g} h"
    )


def _table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def _draw(constants: Constants, points: list[Point], path: Path) -> None:
    """Goodput against the interval, a line for each failure rate with the measurements; and at the best interval
    against the rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    period = constants.step + constants.between
    rates = sorted({point.mtbf for point in points} | {600.0, LLAMA_MTBF})
    for number, mtbf in enumerate(rates):
        every = sorted({max(1, round(10 ** (decade / 20))) for decade in range(66)})
        color, seconds = f"C{number}", [n * period for n in every]
        shares, name = [closed_form(constants, n, mtbf) for n in every], f"one failure in {_span(mtbf)}"
        left.plot(seconds, shares, color=color, label=name)
        best = _best(constants, mtbf)
        left.plot([best * period], [closed_form(constants, best, mtbf)], "|", color=color, markersize=14)
        for point in (point for point in points if point.mtbf == mtbf):
            marker = "*" if point.auto else "o"
            left.plot([point.interval], [point.measured], marker, color=color, markersize=9)
            left.plot([point.interval], [point.simulated], marker, color=color, markersize=9, fillstyle="none")
    left.set(xscale="log", xlabel="seconds between checkpoints", ylabel="goodput", ylim=(0, 1.02),
             title="filled: measured (star: auto), hollow: simulated, bar: Daly")  # fmt: skip
    left.legend(fontsize=8, loc="lower left")
    spans = [10 ** (decade / 10) for decade in range(14, 52)]
    restart = constants.down + constants.startup
    for seconds in sorted({restart, 15.0, 60.0, 300.0}):
        other = replace(constants, down=0.0, startup=seconds)
        right.plot(spans, [closed_form(other, _best(other, mtbf), mtbf) for mtbf in spans],
                   label=f"restart of {_span(seconds)}" + (", as measured" if seconds == restart else ""))  # fmt: skip
    for point in (point for point in points if point.auto):
        right.plot([point.mtbf], [point.measured], "k*", markersize=9)
    right.axvline(LLAMA_MTBF, color="0.7", linewidth=1)
    right.text(LLAMA_MTBF, 0.6, "16,384 GPUs", fontsize=8, color="0.4", rotation=90, ha="right")
    right.set(
        xscale="log",
        xlabel="seconds between failures",
        ylim=(0, 1.02),
        title="at the best interval (stars: auto, measured)",
    )
    right.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sys.argv[1:2] == ["keep"]:
        sys.exit(keep(sys.argv[2:]))
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--mtbf", type=float, nargs="+", default=[60.0, 90.0])
    measuring.add_argument("--every", nargs="+", default=["10", "100", "auto"])
    measuring.add_argument("--seeds", type=int, nargs="+", default=[1])
    measuring.add_argument("--seconds", type=float, default=400.0)
    measuring.add_argument("--without-ray", action="store_true")
    reporting = commands.add_parser("report")
    reporting.add_argument("folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.command == "report":
        report(folder)
        return
    for seed in asked.seeds:
        for mtbf in asked.mtbf:
            for every in asked.every:
                measure(folder, mtbf, every, seed, asked.seconds, asked.without_ray)


if __name__ == "__main__":
    main()
