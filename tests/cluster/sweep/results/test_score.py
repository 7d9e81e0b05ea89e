"""Predictions are scored on the runs that they were made for, and fits on budgets that they have not seen."""

import json
import time

import numpy as np
import pytest
from sweeps import tiny_sweep

from cluster.sweep.results.fit_commands import predicted_runs
from cluster.sweep.results.score import keep_prediction, score_runs
from cluster.sweep.train.setting import Setting
from configs import ConfigError, to_yaml
from models.scaling.scoring import score, to_json
from models.scaling.table import Table
from trainer.record.lines import Record
from trainer.run.folder import prepare_run


def prediction(value, budget=1e9):
    return {
        "budget": budget, "run_loss": {"value": value, "low": value - 0.1, "high": value + 0.1},
        "n": {"value": 1e5, "low": 1e5, "high": 1e5}, "d": {"value": 1e6, "low": 1e6, "high": 1e6},
        "form": "approach3", "convention": "active", "level": 0.95,
    }  # fmt: skip


@pytest.fixture
def sweep(tmp_path, tiny_data):
    sweep = tiny_sweep(tmp_path / "s", tiny_data, grid={}, axes={"train.steps": [4, 8]})
    sweep.folder.mkdir(parents=True)
    return sweep


def write_run(sweep, name, loss=None):
    """Write the config of a predicted run, and its record if it has finished with a loss."""
    setting = Setting(sweep)
    trial = setting.plan().trials[0]
    run = trial.config.run.model_copy(update={"name": name, "root": sweep.root})
    config = trial.config.model_copy(update={"run": run, "data": setting.config(trial).data})
    path = sweep.folder / f"{name}.yaml"
    path.write_text(to_yaml(config))
    if loss is not None:
        record = Record(prepare_run(config), 1)
        record.event("attempt_started")
        record.metrics({"step": 4, "loss": loss, "tokens": 1})
        record.metrics({"step": 4, "eval_loss": loss, "eval_tokens": 1})
        record.event("attempt_ended", status="FINISHED", reason="", step=4)
    return path


def test_a_prediction_is_scored_once_its_run_has_finished(sweep, muster, tmp_path):
    for name, value in (("good", 2.0), ("bad", 1.5), ("open", 1.8)):
        keep_prediction(sweep.folder, prediction(value), write_run(sweep, name), name)
    write_run(sweep, "good", 2.05)
    write_run(sweep, "bad", 2.0)
    found = {each.run: each for each in score_runs(sweep.folder)}
    assert (found["good"].loss, found["good"].inside, found["bad"].inside) == (2.05, True, False)
    assert found["bad"].error == pytest.approx(1 / 3)
    assert (found["open"].loss, found["open"].status) == (None, "NEW")
    assert found["good"].budget != 1e9  # what it spent
    drawn = [(each.loss, each.low, each.high, each.found) for each in predicted_runs(sweep.folder)]
    assert drawn == [(2.0, 1.9, 2.1, 2.05), (1.5, 1.4, 1.6, 2.0), (1.8, 1.8 - 0.1, 1.8 + 0.1, None)]
    told = to_json(list(found.values()))
    assert (told["finished"], told["inside"]) == (2, 1)

    path = tmp_path / "sweep.yaml"
    path.write_text(f"{{name: tiny, base: {sweep.base}, grid: {{}}, axes: {{train.steps: [4, 8]}}}}")
    code, out, err = muster("sweep", "score", str(path), f"root={sweep.root}")
    assert (code, err) == (0, "")
    assert "1 of 2 inside the interval, mean absolute error 17.92%" in out
    assert json.loads(muster("sweep", "score", str(path), f"root={sweep.root}", "--json")[1]) == json.loads(
        (sweep.folder / "score.json").read_text()
    )


def test_a_prediction_made_afterwards_does_not_count(sweep):
    path = write_run(sweep, "run", 2.0)
    time.sleep(0.01)
    keep_prediction(sweep.folder, prediction(2.0), path, "run")
    [found] = score_runs(sweep.folder)
    assert (found.status, found.counts) == ("AFTERWARDS", False)
    assert predicted_runs(sweep.folder) == []


def test_nothing_predicted_is_said(sweep):
    with pytest.raises(ConfigError, match="muster sweep next"):
        score_runs(sweep.folder)
    assert predicted_runs(sweep.folder) == []


def law(n, d):
    return 1.7 + 400 / n**0.34 + 400 / d**0.28


def simulated():
    """A planted law at four budgets of five sizes, with little noise."""
    rng = np.random.default_rng(0)
    c = np.repeat([1e15, 1e16, 1e17, 1e18], 5)
    n = np.sqrt(c / 6 / 20) * np.tile(np.geomspace(1 / 3, 3, 5), 4)
    d = c / (6 * n)
    return Table(n=n, d=d, c=c, loss=law(n, d) * np.exp(rng.normal(0, 1e-3, 20)), convention="active")


def test_a_fit_of_smaller_budgets_is_scored_on_larger_ones():
    found, left_out = score(simulated(), 1e17)
    assert left_out == []
    assert len(found) == 6  # five runs, and the best of the budget
    assert all(abs(each.error) < 0.02 for each in found)
    assert to_json(found)["inside"] >= 5
    assert found[-1].run == "best of 1e18"
    with pytest.raises(ConfigError, match="choose a value with runs on both sides"):
        score(simulated(), 1e20)


def test_a_single_run_is_not_the_best_of_its_budget():
    table = simulated()
    one_left = table.take(np.arange(len(table)) < 16)
    found, _ = score(one_left, 1e17)
    assert [each.run for each in found] == ["row 16"]


def test_runs_at_random_flops_have_no_best_of_a_budget():
    rng = np.random.default_rng(0)
    c = np.exp(rng.uniform(np.log(1e18), np.log(1e20), 60))
    n = np.sqrt(c / 6 / 20) * np.exp(rng.uniform(-1, 1, 60))
    d = c / (6 * n)
    found, _ = score(Table(n=n, d=d, c=c, loss=law(n, d) * np.exp(rng.normal(0, 1e-3, 60))), 6e19)
    assert 3 < len(found) == (c > 6.06e19).sum()
    assert all(each.run.startswith("row") for each in found)
