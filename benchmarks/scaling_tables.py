"""How far predictions can be trusted: planted laws without isoFLOP valleys, and real tables by the next budget.

planted: the laws of `scaling_coverage.py` by designs whose runs share no valleys (ladders of sizes, random sizes and
tokens), with noise on ln L; the truth is the law's own loss and N* at ten times the largest FLOPs. A best size is named
where its interval spans at most a factor of ten.
windows: in each table of Porian et al. (arXiv:2406.19146), any 3 to 10 budgets in a row, against the lowest loss of the
next one. A constant of the method was chosen on every second table, the others were held out.
kinds: Clark et al.'s models (arXiv:2202.01169), each number of experts predicted from runs of all others.

Run: `python benchmarks/scaling_tables.py` (an hour of one core), or only one `--parts`; `--quick`: a few of each.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one core, before numpy is imported

import numpy as np  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from scaling_coverage import LAWS, Law, best, porian  # noqa: E402

from models.scaling.allocation import kinds  # noqa: E402
from models.scaling.predictions import WIDEST, Forecast  # noqa: E402
from models.scaling.refusal import Refusal  # noqa: E402
from models.scaling.table import Table, budgets, read_table  # noqa: E402

AHEAD = 10.0
"""The budget that is predicted, over the table's largest."""
OFF = 3.0
"""Factor by which a named N* may be off."""
Sizes = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


class Design(NamedTuple):
    """N and D of each run, and the standard deviation of its ln L."""

    runs: Sizes
    noise: float


def ladder(n: Sequence[float], ratios: Sequence[float]) -> Sizes:
    """Every size by every number of tokens per parameter."""
    sizes, tokens = np.repeat(n, len(ratios)), np.tile(ratios, len(n))
    return lambda generator: (sizes, sizes * tokens)


def scattered(count: int) -> Sizes:
    """Sizes and tokens per parameter at random."""

    def runs(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n = np.exp(generator.uniform(np.log(3e7), np.log(3e9), count))
        return n, n * np.exp(generator.uniform(np.log(3), np.log(300), count))

    return runs


def continuous(count: int) -> Sizes:
    """FLOPs and tokens per parameter at random."""

    def runs(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        c = np.exp(generator.uniform(np.log(1e18), np.log(1e20), count))
        ratio = np.exp(generator.uniform(np.log(3), np.log(300), count))
        n = np.sqrt(c / 6 / ratio)
        return n, n * ratio

    return runs


DESIGNS = {
    "6 sizes x 3 ratios": Design(ladder(1e8 * 2.0 ** np.arange(6), (10, 20, 40)), 0.003),
    "7 sizes x 5 ratios": Design(ladder(np.geomspace(2e7, 7e8, 7), (10, 21, 43, 90, 190)), 0.003),
    "10 sizes, one ratio": Design(ladder(np.geomspace(3e7, 3e9, 10), (20,)), 0.003),
    "40 at random": Design(scattered(40), 0.005),
    "150 at random": Design(scattered(150), 0.003),
    "200, FLOPs at random": Design(continuous(200), 0.005),
}


def planted(law: Law, design: Design, seed: int) -> Table:
    generator = np.random.default_rng(seed)
    n, d = design.runs(generator)
    return Table(n=n, d=d, c=6 * n * d, loss=law(n, d) * np.exp(generator.normal(0, design.noise, len(n))))


class Outcome(NamedTuple):
    """One prediction beside the truth."""

    loss: bool
    """Whether the interval covers it."""
    size: bool
    width: float
    """High / low of the loss, less 1."""
    factor: float
    """High / low of N*."""
    off: float
    """Factor between a named N* and the true one; NaN: none is named."""


def outcome(law: Law, table: Table) -> Outcome | None:
    """None: the law is refused."""
    budget = AHEAD * float(table.c.max())
    n, loss = best(law, budget)
    try:
        found = Forecast(table).at_budget(budget)
    except Refusal:
        return None
    off = abs(float(np.log(found.n.value / n)))
    assert np.isnan(off) == (found.n.high > WIDEST * found.n.low)
    return Outcome(
        found.loss.low <= loss <= found.loss.high, found.n.low <= n <= found.n.high,
        found.loss.high / found.loss.low - 1, found.n.high / found.n.low, float(np.exp(off)),
    )  # fmt: skip


def study(laws: Sequence[str], designs: Sequence[str], seeds: Sequence[int]) -> list[Outcome]:
    """Print a row for each law and design. Returns all outcomes."""
    print("| planted law | design | loss | its width | N* | high / low | named | off by over 3 | worst | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    every = []
    for name in laws:
        for which in designs:
            start = time.process_time()
            found = [outcome(LAWS[name], planted(LAWS[name], DESIGNS[which], seed)) for seed in seeds]
            took = (time.process_time() - start) / len(seeds)
            sound = [each for each in found if each is not None]
            every += sound
            print(f"| {name} | {which} | {row(sound, len(found))} | {took:.2f} |", flush=True)
    print(f"| all | all | {row(every, len(laws) * len(designs) * len(seeds))} | |", flush=True)
    return every


def row(found: Sequence[Outcome], tried: int) -> str:
    if not found:
        return "all refused | | | | | | "
    loss, size, width, factor, off = np.array(found, dtype=float).T
    named = np.isfinite(off)
    worst = f"{np.max(off[named]):.1f}" if named.any() else ""
    return (
        f"{loss.mean():.1%} | {np.median(width):.1%} | {size.mean():.1%} | {np.median(factor):.3g} | {named.sum()} of "
        f"{tried} | {(off > OFF).sum()} | {worst}"
    )


def windows(counts: Sequence[int], sets: Sequence[int]) -> dict[int, list[tuple[bool, float]]]:
    """Of every run of so many budgets of Porian et al.'s tables: whether the next budget's lowest loss was covered, and
    the interval's relative width.

    Args:
        sets: numbers of the tables, from 0.
    """
    found: dict[int, list[tuple[bool, float]]] = {count: [] for count in counts}
    for number, (_, table) in enumerate(porian()):
        level, _ = budgets(table)
        for count in counts if number in sets else ():
            for first in range(int(level.max()) + 1 - count):
                held = level == first + count
                before = table.take((level >= first) & (level < first + count))
                try:
                    at = Forecast(before).at_budget(float(table.c[held].mean())).loss
                except Refusal:
                    continue
                lowest = float(table.loss[held].min())
                found[count].append((at.low <= lowest <= at.high, at.high / at.low - 1))
    return found


def show_windows(counts: Sequence[int], sets: Mapping[str, Sequence[int]]) -> None:
    print("| budgets |" + "".join(f" {name}: covered | width |" for name in sets))
    print("|---|" + "---|---|" * len(sets))
    for count in counts:
        cells = []
        for chosen in sets.values():
            each = windows([count], chosen)[count]
            cells.append(f"{np.mean([covered for covered, _ in each]):.0%} of {len(each)} | "
                         f"{np.median([width for _, width in each]):.2%} |")  # fmt: skip
        print(f"| {count} | " + " ".join(cells), flush=True)


CLARK = {"n": "dense_parameter_count", "c": "flops_per_step", "loss": "loss_validation", "experts": "num_experts",
         "recipe": "router_type"}  # fmt: skip
SAME = {"k": "1", "routing_frequency": "0.5", "flop_increase": "1"}
"""The recipe of the paper's fits."""


def show_kinds(routers: Sequence[str]) -> None:
    """One line for each router, whose dense models have one expert."""
    every = read_table(Path(__file__).parents[1] / "tests/models/scaling/data/clark_runs.csv", CLARK, SAME)
    print("| router | runs | mean error | largest | covered | median width |\n|---|---|---|---|---|---|")
    for router in routers:
        table = replace(every.take(np.array([each in (router, "Dense") for each in every.recipe])), recipe=())
        found = []
        for kind in kinds(table):
            forecast = Forecast(table.without(np.isin(np.arange(len(table)), kind.rows), "held out"))
            for row in kind.rows:
                each = forecast.at_size(float(table.n[row]), float(table.d[row]), kind.shape).run_loss
                loss = float(table.loss[row])
                found.append((abs(loss / each.value - 1), each.low <= loss <= each.high, each.high / each.low - 1))
        error, inside, width = np.array(found, dtype=float).T
        print(f"| {router} | {len(error)} | {error.mean():.2%} | {error.max():.2%} | {inside.mean():.1%} | "
              f"{np.median(width):.2%} |", flush=True)  # fmt: skip


SETS = {"chosen on": range(0, 15, 2), "held out": range(1, 15, 2)}
QUICK = (("Hoffmann et al.", "wrong: interaction"), ("7 sizes x 5 ratios", "40 at random"), range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--laws", nargs="*", default=list(LAWS))
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="*", default=["planted", "windows", "kinds"])
    arguments = parser.parse_args()
    if "planted" in arguments.parts:
        study(*(QUICK if arguments.quick else (arguments.laws, arguments.designs, range(arguments.seeds))))
        print()
    if "windows" in arguments.parts:
        show_windows([4] if arguments.quick else range(3, 11), {"held out": [1]} if arguments.quick else SETS)
        print()
    if "kinds" in arguments.parts:
        show_kinds(["Hash"] if arguments.quick else ["S-Base", "RL-R", "Hash"])


if __name__ == "__main__":
    main()
