"""Published results, reproduced from the published runs (data/README.md)."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.scaling.fitting import LEAST_SQUARES, Fit, Table, fit, read_table
from models.scaling.isoflop import approach2, power_law

DATA = Path(__file__).parent / "data"
ROUTERS = ("S-Base", "RL-R", "Hash")
# All runs have one number of tokens: FLOPs of a step stand for those of a run, and steps for tokens.
ROUTED = {"run": "hyper_id", "recipe": "router_type", "n": "dense_parameter_count", "d": "step", "c": "flops_per_step",
          "experts": "num_experts", "loss": "loss_validation"}  # fmt: skip


def predicted(found: Fit, target: Table) -> np.ndarray:
    return np.exp(found.form.log_loss(found.solution.parameters[None], target.columns)[0])


def test_gadre_over_training():
    points = {(11, 20), (79, 20), (154, 20), (412, 20), (11, 320)}
    table = read_table(DATA / "gadre_runs.csv")
    mine = np.array([(round(n / 1e6), round(d / n)) in points for n, d in zip(table.n, table.d, strict=True)])
    assert mine.sum() == 5
    found = fit(table.take(mine), ["overtraining"], LEAST_SQUARES, bootstraps=0).best
    for name, published in {"rpj-open_lm_1b-32.0": 0.7103, "rpj-open_lm_7b-1.0": 0.7320}.items():
        target = table.take(np.array([run == name for run in table.run]))
        error = 100 * abs(predicted(found, target) / target.loss - 1).item()
        assert error == pytest.approx(published, abs=5e-5), name


def porian(name: str) -> dict[str, list[dict[str, str]]]:
    """Rows by configuration."""
    rows: dict[str, list[dict[str, str]]] = {}
    with (DATA / name).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["set"], []).append(row)
    return rows


def numbers(rows: list[dict[str, str]], *names: str) -> list[np.ndarray]:
    return [np.array([float(row[name]) for row in rows]) for name in names]


def test_porian_exponents():
    optima, published = porian("porian_optima.csv"), porian("porian_exponents.csv")
    assert len(published) == 15
    for key, rows in published.items():
        c, n, std = numbers(optima[key], "flops", "n", "n_std")
        (exponent,) = numbers(rows, "exponent")
        assert power_law(c, n, std).exponent == pytest.approx(exponent.item(), abs=5e-5), key


def test_porian_exponents_from_the_runs_themselves():
    """Approach 2 on single runs. The publication interpolates between them, so that most agree, not all."""
    runs, published = porian("porian_runs.csv"), porian("porian_exponents.csv")
    inside, errors = 0, []
    for key, rows in published.items():
        c, n, d, loss = numbers(runs[key], "flops", "n", "tokens", "loss")
        (exponent, low, high) = (v.item() for v in numbers(rows, "exponent", "low", "high"))
        found = approach2(Table(n=n, d=d, c=c, loss=loss)).n.exponent
        inside += low <= found <= high
        errors.append(found - exponent)
    assert inside >= 10
    assert np.sqrt(np.mean(np.square(errors))) < 0.02


SMALL, LARGE = {"model_size_label": "15M,25M,55M,130M,370M"}, {"model_size_label": "1.3B"}


def routed(router: str, where: dict[str, str]) -> tuple[Table, np.ndarray]:
    """The runs of one router, the dense models (one expert under any router), and which rows are routed."""
    table = read_table(DATA / "clark_runs.csv", ROUTED, where)
    table = table.take(np.array([recipe in (router, "Dense") for recipe in table.recipe]))
    return replace(table, recipe=()), np.array(table.recipe) == router


def held_out(**where: str) -> tuple[float, float]:
    """R2 and mean absolute relative error (%) on the 28 models of 1.3B, which no choice has seen."""
    guesses, truth, dense = [], [], []
    for router in ROUTERS:
        small, _ = routed(router, SMALL | where)
        large, has_routes = routed(router, LARGE)
        assert small.n.max() < large.n.min()
        loss = predicted(fit(small, bootstraps=0).best, large)
        guesses += [*loss[has_routes]]
        truth += [*large.loss[has_routes]]
        # The one dense model stands under each router: the mean of the three is the guess.
        dense.append((loss[~has_routes].item(), large.loss[~has_routes].item()))
    p, y = (np.array([*each, mean]) for each, mean in zip((guesses, truth), np.mean(dense, axis=0), strict=True))
    assert len(y) == 28
    return 1 - np.sum((p - y) ** 2) / np.sum((y - y.mean()) ** 2), 100 * np.mean(np.abs(p / y - 1))


@pytest.mark.slow
def test_clark_held_out_models_with_a_form_chosen_on_smaller_ones():
    """Runs of the one recipe of the paper's fits: one expert per token, every second layer routed, no wider layers."""
    r2, error = held_out(k="1", routing_frequency="0.5", flop_increase="1")
    assert error < 1.1
    assert r2 > 0.833


@pytest.mark.slow
def test_sldbench_split_with_all_of_its_training_rows():
    """They differ in experts per token and in routed layers too, which the laws here do not model."""
    r2, error = held_out()
    assert error < 1.1
    assert r2 > 0.833
