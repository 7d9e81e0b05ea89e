"""`muster sweep fit` and `predict` on a table: every coefficient as JSON, mistakes in one message."""

import json
from dataclasses import replace

import numpy as np
import pytest
from laws import HOFFMANN, isoflop
from scaling_coverage import LAWS
from scaling_tables import Design, ladder, planted

from models.scaling.forms.dense import Approach3, DataConstrained

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
    options = ("--columns", "n=params,d=tokens,loss=val", "--form", "approach3", "--json")
    code, out, err = muster(
        "sweep", "predict", "--table", str(table), *options, "--budget", "1e21", "--n", "1e9", "--d", "2e10"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["notes"] == ["c is 6 n d, as the table has no column of FLOPs"]
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
    """A table of two kinds of models; losses of those with 8 experts are multiplied by `times`."""
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
def test_kinds_that_cannot_be_distinguished_are_reported(muster, tmp_path, better, rivals):
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
    assert ("cannot be distinguished from the best one" in shown) == bool(rivals)


def test_a_table_is_scored_on_its_largest_budget(muster, table):
    options = ("--table", str(table), "--columns", COLUMNS, "--max-budget", "5e19")
    code, out, err = muster("sweep", "score", *options, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["finished"], len(found["scores"])) == (8, 8)  # seven sizes, and the best of them
    assert found["inside"] >= 7
    assert found["mean_absolute_error"] < 0.01
    assert "inside the interval" in muster("sweep", "score", *options)[1]


def write(path, runs, *names):
    """Write a table as CSV, with some of its extra columns."""
    columns = [runs.n, runs.d, runs.c, runs.loss, *(runs.extra[name] for name in names)]
    lines = [",".join(f"{value:.10g}" for value in row) for row in zip(*columns, strict=True)]
    path.write_text("\n".join([",".join(["n", "d", "c", "loss", *names]), *lines]) + "\n")
    return str(path)


@pytest.mark.slow
def test_if_every_form_is_refused_fit_lists_plot_draws_and_predict_refuses(muster, tmp_path):
    runs = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    path = write(tmp_path / "runs.csv", replace(runs, loss=runs.loss * (runs.c / runs.c[0]) ** 0.1))
    code, out, err = muster("sweep", "fit", "--table", path, "--bootstraps", "20")
    assert (code, err) == (0, "")
    for each in ("refused (floor): approach3: ", "refused (floor): kaplan: ", "refused (floor): overtraining: "):
        assert each in out
    assert "approach 2 (parabolas of 5 budgets)" in out
    assert "no form is chosen" in out
    for command in (("predict", "--budget", "1e21"), ("predict", "--budget", "1e21", "--form", "approach3")):
        code, out, err = muster("sweep", *command, "--table", path)
        assert (code, out) == (2, "")
        assert "the data do not determine it" in err
    code, out, err = muster("sweep", "plot", "--table", path, "--out", str(tmp_path / "plots"), "--budget", "1e21")
    assert code == 0
    assert [line.rpartition("/")[2] for line in out.split()] == ["isoflop.png", "frontier.png", "sweep.html"]
    assert "no law is drawn: no form is reliable" in err
    assert "no prediction is drawn" in err


def test_too_few_budgets_are_drawn(muster, tmp_path):
    path = write(tmp_path / "runs.csv", isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e19, 2)))
    code, out, err = muster("sweep", "plot", "--table", path, "--out", str(tmp_path / "plots"))
    assert (code, "frontier.png" in out) == (0, True)
    assert "no law is drawn: 14 runs at 2 budgets: a scaling law needs at least 3 budgets" in err


def test_json_is_strict(muster, tmp_path):
    """With three sizes a parabola has no error estimate: null in the JSON, and not NaN, which only Python reads."""
    path = write(tmp_path / "runs.csv", isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), sizes=3))
    code, out, _ = muster("sweep", "fit", "--table", path, "--bootstraps", "20", "--json")
    assert code == 0

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(out, parse_constant=refuse)
    assert [each["std"] for each in found["approach2"]["valleys"]] == [None] * len(found["approach2"]["valleys"])


REPEATED = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.35, "beta": 0.35, "R_D": 15.4, "R_N": 5.3}


def optimum_of(budget, unique):
    n = np.geomspace(1e8, 1e12, 20000)
    d = budget / (6 * n)
    x = {"n": n, "d": d, "unique": np.minimum(d, unique)}
    form = DataConstrained()
    losses = np.exp(form.log_loss(form.parameters(REPEATED)[None], x)[0])
    return n[losses.argmin()], losses.min()


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """Every model trained with three numbers of unique tokens."""
    runs = isoflop(DataConstrained(), REPEATED, budgets=(1e18, 1e20, 5), noise=0.002, sizes=15, unique=(2e8, 1e9, 1e12))
    return write(tmp_path_factory.mktemp("repeated") / "runs.csv", runs, "unique")


@pytest.mark.parametrize("unique", [None, 1e9])
def test_repeated_data_are_predicted_by_their_own_law(muster, repeated, unique):
    given = () if unique is None else ("--unique", f"{unique:g}")
    code, out, err = muster("sweep", "predict", "--table", repeated, "--budget", "1e21", *given, "--json")
    assert (code, err) == (0, "")
    [found] = json.loads(out)["predictions"]
    n, loss = optimum_of(1e21, unique or np.inf)
    assert (found["form"], found["unique"]) == ("data_constrained", unique)
    assert found["loss"]["value"] == pytest.approx(loss, rel=0.01)
    assert found["n"]["low"] < n < found["n"]["high"]
    assert found["n"]["high"] < 2 * found["n"]["low"]
    assert any("--unique" in each for each in found["warnings"]) == (unique is None)


def test_one_corpus_for_all_runs_is_repeated_data_too(muster, tmp_path):
    runs = isoflop(DataConstrained(), REPEATED, budgets=(1e18, 1e20, 5), noise=0.002, sizes=9, unique=(2e9,))
    path = write(tmp_path / "runs.csv", runs, "unique")
    code, out, err = muster("sweep", "predict", "--table", path, "--budget", "1e21", "--unique", "2e9", "--json")
    assert (code, err) == (0, "")
    [found] = json.loads(out)["predictions"]
    n, loss = optimum_of(1e21, 2e9)
    assert found["form"] == "data_constrained"
    assert found["loss"]["low"] < loss < found["loss"]["high"] < 1.1 * found["loss"]["low"]
    assert found["n"]["low"] < n < found["n"]["high"]


def test_runs_with_too_little_repetition_are_left_out_and_reported(muster, tmp_path):
    """A prediction that would repeat tokens is refused, not made as if they were new."""
    runs = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    unique = np.where(np.arange(len(runs)) == 3, runs.d / 1.5, runs.d)
    path = write(tmp_path / "runs.csv", replace(runs, extra={"unique": unique}), "unique")
    code, out, err = muster("sweep", "predict", "--table", path, "--budget", "1e21", "--json")
    assert (code, err) == (0, "")
    [found] = json.loads(out)["predictions"]
    assert "data_constrained" not in found["form"]
    assert "1 of 35 runs repeat tokens and are left out: data_constrained" in found["warnings"][0]
    code, _, err = muster("sweep", "predict", "--table", path, "--budget", "1e21", "--unique", "1e9")
    assert code == 2
    assert "the value of repeated tokens is unknown, as 1 of 35 runs repeat" in err


def test_repeated_data_are_scored_as_each_run_had_them(muster, repeated):
    code, out, err = muster("sweep", "score", "--table", repeated, "--max-budget", "5e19", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["finished"] == 16
    assert found["inside"] >= 14
    assert found["mean_absolute_error"] < 0.005


def test_without_repeating_runs_the_value_of_repeated_tokens_is_unknown(muster, table):
    options = ("--columns", COLUMNS, "--budget", "1e21")
    code, _, err = muster("sweep", "predict", "--table", str(table), *options, "--unique", "1e9")
    assert code == 2
    assert "tokens but only 1e+09 are unique: the value of repeated tokens is unknown" in err
    assert muster("sweep", "predict", "--table", str(table), *options, "--unique", "1e12")[0] == 0


def test_a_law_of_several_kinds_of_models_needs_four(muster, tmp_path):
    dense = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    path = with_experts(tmp_path, dense, dense, 0.97)
    code, _, err = muster("sweep", "predict", "--table", str(path), "--budget", "1e21", "--form", "ludziejewski")
    assert code == 2
    assert "a law of several kinds of models needs runs of at least 4, such as four numbers of experts, but the" in err
    code, _, err = muster("sweep", "predict", "--table", str(path), "--budget", "1e21", "--kind", "experts=3")
    assert code == 2
    assert "but the table has 2" in err
    for kind, message in (
        ("expert=3", "--kind expert=3: should be one of experts, top_k, granularity, active_ratio"),
        ("experts=many", "--kind experts=many: 'many' is not a number"),
        ("experts=0.5", "--kind experts=0.5: no model has that"),
        ("experts", "--kind experts: should be NAME=VALUE"),
    ):
        code, _, err = muster("sweep", "predict", "--table", str(path), "--budget", "1e21", "--kind", kind)
        assert code == 2
        assert message in err


def test_a_kind_can_be_named(muster, tmp_path):
    """One of the table's own: the others are not predicted then."""
    dense = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    path = with_experts(tmp_path, dense, dense, 0.97)
    found = []
    for kind in ([], ["--kind", "experts=1"]):
        code, out, _ = muster("sweep", "predict", "--table", str(path), "--budget", "1e21", "--json", *kind)
        assert code == 0
        found.append(json.loads(out)["predictions"])
    assert [each[0]["shape"]["experts"] for each in found] == [8, 1]
    assert found[1][0]["rivals"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fit",), "give one thing to fit: SWEEP.yaml, or --table FILE"),
        (("fit", "--table", "none.csv"), "--table none.csv: no such file"),
        (("fit", "--table", "{}", "--columns", "n"), "--columns n: should be NAME=VALUE"),
        (("fit", "--table", "{}", "--columns", COLUMNS, "--form", "hofman"), "--form hofman: no such form"),
        (
            ("fit", "--table", "{}", "--columns", COLUMNS, "--max-budget", "1.1e18"),
            "at 1 budget: a scaling law needs at least 3 budgets",
        ),
        (("score", "--table", "{}"), "--table FILE with --max-budget C"),
        (
            ("score", "--table", "{}", "--columns", COLUMNS, "--max-budget", "1e21"),
            "choose a value with runs on both sides",
        ),
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


def test_duplicate_or_incomplete_options_are_refused(muster, table, tmp_path):
    (tmp_path / "file").touch()
    for command, words in {
        (
            "fit",
            "--where",
            "val=a",
            "--where",
            "val=b",
        ): "--where names val twice: --where val=A,B takes the rows of both",
        ("fit", "--columns", "n=params,n=tokens"): "--columns names n twice",
        ("predict", "--budget", "1e21", "--n", "1e9"): "or both --n and --d of a model",
        ("predict", "--d", "1e9"): "or both --n and --d of a model",
        ("plot", "--columns", COLUMNS, "--out", str(tmp_path / "file")): "file: cannot create this folder",
        ("plot", "--columns", COLUMNS, "--out", str(tmp_path / "file" / "x")): "x: cannot create this folder",
    }.items():
        code, out, err = muster("sweep", *command, "--table", str(table))
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert words in err


def test_a_best_size_that_the_runs_do_not_determine_is_a_range(muster, tmp_path):
    design = Design(ladder(1e8 * 4.0 ** np.arange(5), (20, 40)), 0.01)
    runs = planted(LAWS["Hoffmann et al."], design, 0)
    path = tmp_path / "ladder.csv"
    path.write_text(
        "n,d,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in zip(runs.n, runs.d, runs.loss, strict=True))
    )
    code, out, err = muster("sweep", "predict", "--table", str(path), "--budget", "1e23", "--json")
    assert (code, err) == (0, "")
    [found] = json.loads(out)["predictions"]
    assert (found["n"]["value"], found["d"]["value"]) == (None, None)
    assert found["n"]["high"] > 10 * found["n"]["low"]
    shown = muster("sweep", "predict", "--table", str(path), "--budget", "1e23")[1]
    assert "nan" not in shown
    assert f"[{found['n']['low']:.3g}," in shown
    assert f"{found['n']['high']:.3g}]" in shown
    assert "warning: no best size is given for 1e+23 FLOPs" in shown
