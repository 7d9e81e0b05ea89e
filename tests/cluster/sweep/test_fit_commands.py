"""`muster sweep fit` and `predict` on a table: every coefficient as JSON, mistakes in one message."""

import json

import numpy as np
import pytest
from laws import HOFFMANN, isoflop

from cluster.sweep.forms import Approach3

COLUMNS = "n=params,d=tokens,c=flops,loss=val"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    runs = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    rows = [f"{n},{d},{c},{loss}" for n, d, c, loss in zip(runs.n, runs.d, runs.c, runs.loss, strict=True)]
    path.write_text("\n".join(["params,tokens,flops,val", *rows, "1e8,1e9,6e17,nan"]) + "\n")
    return path


def test_fit_says_everything(muster, table):
    code, out, err = muster(
        "sweep", "fit", "--table", str(table), "--columns", COLUMNS, "--bootstraps", "100", "--json"
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["chosen"] == "approach3"
    law = found["approach3"]
    assert {"E", "A", "B", "alpha", "beta"} <= law.keys()
    for name, value in HOFFMANN.items():
        assert law["intervals"][name][0] < value < law["intervals"][name][1]
    assert law["converged"] is True
    assert law["objective"] == "Huber(0.001) on log loss"
    assert found["excluded"] == [{"run": "row 36", "why": "loss=nan"}]
    assert found["convention"] == "given"
    assert {"a", "b", "valleys"} <= found["approach2"].keys()


def test_predict_at_a_budget_and_at_a_size(muster, table):
    options = ("--columns", COLUMNS, "--form", "approach3", "--json")
    code, out, err = muster(
        "sweep", "predict", "--table", str(table), *options, "--budget", "1e21", "--n", "1e9", "--d", "2e10"
    )
    assert (code, err) == (0, "")
    best, given = json.loads(out)["predictions"]
    form = Approach3()
    n = np.geomspace(1e8, 1e11, 4000)
    losses = np.exp(form.log_loss(form.parameters(HOFFMANN)[None], {"n": n, "d": 1e21 / (6 * n)})[0])
    assert best["loss"]["low"] < losses.min() < best["loss"]["high"]
    assert best["n"]["low"] < n[losses.argmin()] < best["n"]["high"]
    assert best["loss"]["high"] / best["loss"]["low"] < 1.06
    assert 6 * best["n"]["value"] * best["d"]["value"] == pytest.approx(1e21, rel=1e-6)
    x = {"n": np.array([1e9]), "d": np.array([2e10])}
    truth = float(np.exp(form.log_loss(form.parameters(HOFFMANN)[None], x))[0, 0])
    assert given["loss"]["low"] < truth < given["loss"]["high"]
    assert given["budget"] == pytest.approx(1.2e20)


def with_experts(folder, dense, moe, factor):
    """A table of two kinds of models; the losses of those with 8 experts are multiplied by the factor."""
    rows = [
        f"{n},{d},{c},{loss * times},{experts}"
        for runs, experts, times in ((dense, 1, 1.0), (moe, 8, factor))
        for n, d, c, loss in zip(runs.n, runs.d, runs.c, runs.loss, strict=True)
    ]
    path = folder / "runs.csv"
    path.write_text("\n".join(["n,d,c,loss,experts", *rows]) + "\n")
    return path


def test_a_given_model_is_predicted_for_each_kind(muster, tmp_path):
    dense = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    path = with_experts(tmp_path, dense, dense, 0.97)
    model = ("--n", "1e9", "--d", "2e10")
    code, out, err = muster("sweep", "predict", "--table", str(path), *model, "--json")
    assert (code, err) == (0, "")
    losses = {each["shape"]["experts"]: each["loss"]["value"] for each in json.loads(out)["predictions"]}
    assert losses[8] == pytest.approx(0.97 * losses[1], rel=2e-3)
    _, shown, _ = muster("sweep", "predict", "--table", str(path), *model)
    assert "of one run" in shown
    assert "experts=8" in shown


@pytest.mark.parametrize(("better", "rivals"), [(0.9, []), (0.999, [1])])
def test_kinds_that_cannot_be_told_apart_are_said(muster, tmp_path, better, rivals):
    dense, moe = (isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002, seed=seed) for seed in (0, 1))
    path = with_experts(tmp_path, dense, moe, better)
    code, out, err = muster("sweep", "predict", "--table", str(path), "--budget", "3e20", "--json")
    assert (code, err) == (0, "")
    [found] = json.loads(out)["predictions"]
    kinds = sorted([found["shape"]["experts"], *(each["shape"]["experts"] for each in found["rivals"])])
    assert kinds == sorted([8, *rivals])
    for each in found["rivals"]:
        assert found["loss"]["value"] <= each["loss"]["value"]
        assert each["loss"]["low"] <= found["loss"]["high"]
        assert each["n"]["low"] < each["n"]["value"] < each["n"]["high"]
    shown = muster("sweep", "predict", "--table", str(path), "--budget", "3e20")[1]
    assert ("cannot be told from the best one" in shown) == bool(rivals)


def test_a_table_is_scored_on_its_largest_budget(muster, table):
    options = ("--table", str(table), "--columns", COLUMNS, "--max-budget", "5e19")
    code, out, err = muster("sweep", "score", *options, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["finished"], len(found["scores"])) == (8, 8)  # seven sizes, and the best of them
    assert found["inside"] >= 7
    assert found["mean_absolute_error"] < 0.01
    assert "inside the interval" in muster("sweep", "score", *options)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit",), "name one thing to fit: SWEEP.yaml, or a table with --table FILE"),
        (("fit", "--table", "none.csv"), "--table none.csv: no such file"),
        (("fit", "--table", "{}", "--columns", "n"), "--columns n: should be NAME=VALUE"),
        (("fit", "--table", "{}", "--columns", COLUMNS, "--form", "hofman"), "--form hofman: no such form"),
        (
            ("fit", "--table", "{}", "--columns", COLUMNS, "--max-budget", "1.1e18"),
            "at 1 budgets: a scaling law needs 3",
        ),
        (("score", "--table", "{}"), "with --max-budget C also --table FILE"),
        (("score", "--table", "{}", "--columns", COLUMNS, "--max-budget", "1e21"), "some should lie on each side"),
        (("predict", "--table", "{}"), "needs --budget C"),
        (("predict", "--table", "{}", "--budget", "0"), "--budget 0: should be above 0"),
        (("plot", "--table", "{}", "--columns", COLUMNS), "needs --out FOLDER"),
    ],
)
def test_mistakes(muster, table, arguments, words):
    code, _, err = muster("sweep", *(each.format(table) for each in arguments))
    assert code == 2
    assert words in err
    assert "Traceback" not in err
