"""How often 95% intervals of predictions cover the truth: on planted laws, and on real tables with budgets held out.

Planted: an isoFLOP sweep of K budgets (a factor of sqrt(10) apart, the largest 3e20) by J sizes (within a factor of 3
of the best one) with noise on ln L; the truth is the law's own, at 3.2 and 10 times the largest budget.
Real: the 15 tables of Porian et al. (arXiv:2406.19146), with the top two budgets of each held out, against the lowest
loss trained there. Compared with ours: the bootstrap of approach 3 over runs, and that bootstrap widened by the factor
that brings its errors on earlier held-back budgets to 1.96 standard errors.

Run: `python benchmarks/scaling_coverage.py --seeds 200` (half an hour on one core).
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one core, before numpy is imported

import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.scaling.allocation import kinds, optimum  # noqa: E402
from models.scaling.forms.dense import Approach3  # noqa: E402
from models.scaling.forms.solve import refit, solve  # noqa: E402
from models.scaling.intervals import extrapolate  # noqa: E402
from models.scaling.table import Table, budgets  # noqa: E402

PUBLISHED = Path(__file__).parents[1] / "tests" / "models" / "scaling" / "data"
AHEAD = np.sqrt(10.0) ** np.array([1, 2])
Law = Callable[[np.ndarray, np.ndarray], np.ndarray]


def approach3(e: float, a: float, b: float, alpha: float, beta: float, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return e + a / n**alpha + b / d**beta


def interacting(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return approach3(1.69, 406.4, 410.7, 0.34, 0.28, n, d) + 12 / (n**0.1 * d**0.06)


def bent(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Exponents that weaken beyond 3e8 parameters and 1e10 tokens."""
    size, data = 406.4 / n**0.34 * (1 + (n / 3e8) ** 0.6) ** 0.2, 410.7 / d**0.28 * (1 + (d / 1e10) ** 0.6) ** 0.15
    return 1.69 + size + data


def joint(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Kaplan's form of the sum, with another floor."""
    return 1.6 + ((406.4 / n**0.34) ** 1.5 + (410.7 / d**0.28) ** 1.5) ** (1 / 1.5)


def warmed(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Short runs lose tokens to a warmup of fixed length."""
    return approach3(1.69, 406.4, 410.7, 0.34, 0.28, n, d / (1 + 3e8 / d))


LAWS: dict[str, Law] = {
    "Hoffmann et al.": partial(approach3, 1.69, 406.4, 410.7, 0.34, 0.28),
    "Besiroglu et al.": partial(approach3, 1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    "alpha 0.45, beta 0.2": partial(approach3, 1.9, 2000.0, 60.0, 0.45, 0.2),
    "wrong: interaction": interacting,
    "wrong: bent powers": bent,
    "wrong: joint terms": joint,
    "wrong: long warmup": warmed,
}
DESIGNS = ((5, 5, 0.003), (5, 5, 0.01), (7, 7, 0.001), (7, 7, 0.01), (9, 9, 0.003))
"""Budgets, sizes, standard deviation of ln L."""


def best(law: Law, c: float) -> tuple[float, float]:
    """N* and the loss there, by a fine grid."""
    n = np.exp(np.linspace(np.log(1e5), np.log(1e13), 200_001))
    loss = law(n, c / (6 * n))
    return float(n[loss.argmin()]), float(loss.min())


def sweep(law: Law, count: int, sizes: int, noise: float, seed: int) -> Table:
    generator = np.random.default_rng(1000 + seed)
    c = 3e20 / np.sqrt(10.0) ** np.arange(count)[::-1]
    centre = np.array([_best_size(law, each) for each in c]) * np.exp(generator.normal(0, 0.15, count))
    n = (centre[:, None] * np.exp(np.linspace(-1.1, 1.1, sizes))).ravel()
    c = np.repeat(c, sizes)
    d = c / (6 * n)
    return Table(n=n, d=d, c=c, loss=law(n, d) * np.exp(generator.normal(0, noise, len(n))))


_sizes: dict[tuple[int, float], float] = {}


def _best_size(law: Law, c: float) -> float:
    key = id(law), c
    if key not in _sizes:
        _sizes[key] = best(law, c)[0]
    return _sizes[key]


class Covered(NamedTuple):
    """Fractions of seeds and targets covered, and median widths."""

    loss: float
    size: float
    point: float
    """Of the loss at N*/e and N* e."""
    width: float
    """Of the loss, relative."""
    factor: float
    """High over low of N*."""


def planted(law: Law, count: int, sizes: int, noise: float, seeds: int) -> Covered:
    targets = [(float(c), *best(law, float(c))) for c in 3e20 * AHEAD]
    rows = []
    for seed in range(seeds):
        found = extrapolate(sweep(law, count, sizes, noise, seed), seed=seed)
        for c, n, loss in targets:
            at = found.at_budget(c)
            points = []
            for size in (n / np.e, n * np.e):
                low_high = found.at_size(size, c / (6 * size))
                points.append(low_high.low <= law(np.array(size), np.array(c / (6 * size))) <= low_high.high)
            spread = at["loss"]
            rows.append(
                (
                    spread.low <= loss <= spread.high, at["n"].low <= n <= at["n"].high, np.mean(points),
                    spread.high / spread.low - 1, at["n"].high / at["n"].low,
                )
            )  # fmt: skip
    each = np.array(rows, dtype=float)
    return Covered(*each[:, :3].mean(axis=0).tolist(), *np.median(each[:, 3:], axis=0).tolist())


def porian() -> Iterator[tuple[str, Table]]:
    """Name and table of each set."""
    with (PUBLISHED / "porian_exponents.csv").open(encoding="utf-8") as file:
        names = {row["set"]: row["configuration"] for row in csv.DictReader(file)}
    found: dict[str, list[dict[str, str]]] = {name: [] for name in names.values()}
    with (PUBLISHED / "porian_runs.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[names[row["set"]]].append(row)
    for name, rows in found.items():
        n, d, c, loss = (np.array([float(row[k]) for row in rows]) for k in ("n", "tokens", "flops", "loss"))
        yield name, Table(n=n, d=d, c=c, loss=loss)


def bootstrapped(table: Table, targets: np.ndarray, refits: int = 400, seed: int = 0) -> np.ndarray:
    """ln L of approach 3 at budgets: its fit, then its refits to runs drawn with replacement."""
    form, x, rows = Approach3(), {"n": table.n, "d": table.d}, len(table)
    found = solve(form, x, table.loss)
    weights = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=refits).astype(float)
    samples, _ = refit(form, x, table.loss, weights, found.parameters)
    every = np.concatenate([found.parameters[None], samples])
    kind = kinds(table)[0]
    return np.log([optimum(form, every, table, float(c), kind).loss for c in targets])


def usual(table: Table, targets: np.ndarray) -> list[tuple[float, float]]:
    return [tuple(np.exp(np.percentile(each, [2.5, 97.5]))) for each in bootstrapped(table, targets)]


def calibrated(table: Table, targets: np.ndarray) -> list[tuple[float, float]]:
    index, scores = budgets(table).level, []
    for origin in range(max(3, index.max() - 3), index.max() + 1):
        rows = index == origin
        each = bootstrapped(table.take(index < origin), np.array([table.c[rows].mean()]), 100)[0]
        scores.append((np.log(table.loss[rows].min()) - each[0]) / each[1:].std())
    factor = max(1.0, float(np.sqrt(np.mean(np.square(scores)))))
    found = bootstrapped(table, targets)
    half = 1.96 * factor * found[:, 1:].std(axis=1)
    return [(float(np.exp(v - h)), float(np.exp(v + h))) for v, h in zip(found[:, 0], half, strict=True)]


def ours(table: Table, targets: np.ndarray) -> list[tuple[float, float]]:
    found = extrapolate(table)
    return [found.at_budget(float(c))["loss"][1:] for c in targets]


METHODS = {"approach 3, bootstrap": usual, "the same, calibrated": calibrated, "ours": ours}


def real(method: Callable[[Table, np.ndarray], list[tuple[float, float]]]) -> dict[str, list[tuple[bool, float]]]:
    """For each set and held-out budget: whether the lowest loss lay inside, and the interval's relative width."""
    found = {}
    for name, table in porian():
        index = budgets(table).level
        held = [index == index.max() - 1, index == index.max()]
        bounds = method(table.take(index < index.max() - 1), np.array([table.c[rows].mean() for rows in held]))
        lowest = [table.loss[rows].min() for rows in held]
        found[name] = [(bool(a <= y <= b), float(b / a - 1)) for (a, b), y in zip(bounds, lowest, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--laws", nargs="*", default=list(LAWS))
    arguments = parser.parse_args()
    if arguments.laws:
        print("| planted law | budgets x sizes, noise | loss at (C) | loss at (N, D) | N* | width | N* high / low |")
        print("|---|---|---|---|---|---|---|")
    for name in arguments.laws:
        for count, sizes, noise in DESIGNS:
            at = planted(LAWS[name], count, sizes, noise, arguments.seeds)
            print(
                f"| {name} | {count} x {sizes}, {noise:.1%} | {at.loss:.1%} | {at.point:.1%} | {at.size:.1%} | "
                f"{at.width:.2%} | {at.factor:.2f} |", flush=True,
            )  # fmt: skip
    print("\n| real tables | inside | median width | widest | s |\n|---|---|---|---|---|")
    sets = {}
    for name, method in METHODS.items():
        start = time.process_time()
        sets[name] = real(method)
        flat = [each for pair in sets[name].values() for each in pair]
        widths = [width for _, width in flat]
        print(
            f"| {name} | {sum(inside for inside, _ in flat)} of {len(flat)} | {np.median(widths):.1%} | "
            f"{max(widths):.1%} | {time.process_time() - start:.0f} |", flush=True,
        )  # fmt: skip
    print("\n| set, by ours | inside | widths |\n|---|---|---|")
    for name, pair in sets["ours"].items():
        print(f"| {name} | {sum(inside for inside, _ in pair)} of 2 | {' and '.join(f'{w:.1%}' for _, w in pair)} |")


if __name__ == "__main__":
    main()
