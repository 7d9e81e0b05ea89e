"""How far predictions from tables without isoFLOP valleys can be trusted, on planted laws.

Planted: the laws of `scaling_coverage.py` by designs whose runs share no valleys (ladders of sizes, random sizes and
tokens), with noise on ln L; the truth is the law's own loss and N* at ten times the largest FLOPs. A best size is named
where its interval spans at most a factor of ten.

Run: `python benchmarks/scaling_tables.py --seeds 200` (hours of one core); `--quick`: two laws, two designs, a few
seeds.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one core, before numpy is imported

import numpy as np  # noqa: E402

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from scaling_coverage import LAWS, Law, best  # noqa: E402

from models.scaling.predictions import WIDEST, Forecast  # noqa: E402
from models.scaling.refusal import Refusal  # noqa: E402
from models.scaling.table import Table  # noqa: E402

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


QUICK = (("Hoffmann et al.", "wrong: interaction"), ("7 sizes x 5 ratios", "40 at random"), range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--laws", nargs="*", default=list(LAWS))
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    study(*(QUICK if arguments.quick else (arguments.laws, arguments.designs, range(arguments.seeds))))


if __name__ == "__main__":
    main()
