"""What the API tells of sweeps: how trials stand and what their law says, by the functions of `muster sweep`."""

import json
import shlex
import time

import numpy as np
import pytest
from dashboards import serving
from sweeps import BUDGETS, isoflop_of, made, planted, trained

from cluster.sweep.results import law_page
from cluster.sweep.results.collect import collect
from cluster.sweep.results.score import keep_prediction
from cluster.sweep.train.progress import progress, to_json
from configs import ConfigError, flatten, load
from configs.sweep.definition import sweep_from_dict
from models.scaling.fitting import fit
from models.scaling.predictions import Forecast
from trainer.record.lines import Record

AXES = {"optim.lr": [0.001, 0.002], "train.steps": [4, 8]}
SECRET = 7.654321


def asked(dashboard, path):
    """The law, once it has been worked out."""
    until = time.monotonic() + 300
    while (told := dashboard.get(path).json)["working"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    return told


@pytest.fixture(scope="module")
def grid(root, tiny_data):
    setting, trials, record = made(root, tiny_data, "grid", 2, grid={}, axes=AXES)
    trained(setting, trials[2], record, status="FAILED", steps=2)
    return setting, trials


@pytest.fixture(scope="module")
def isoflop(root, tiny_data):
    generator = np.random.default_rng(0)
    return made(
        root, tiny_data, "sizes", loss=lambda trial: planted(trial, generator.normal(0, 0.004)), **isoflop_of(tiny_data)
    )


@pytest.fixture(scope="module")
def dashboard(root, grid, isoflop):
    with serving([root]) as server:
        server.look()
        yield server


def test_sweeps_are_listed(dashboard, grid, isoflop):
    found = {each["id"]: each for each in dashboard.get("/api/sweeps").json["sweeps"]}
    assert found.keys() == {"grid", "sizes"}
    assert {key: found["grid"][key] for key in ("begun", "finished", "failed", "best")} == {
        "begun": 3, "finished": 2, "failed": 1, "best": 2.0,
    }  # fmt: skip
    assert found["sizes"]["finished"] == len(isoflop[1])


def test_trials_stand_as_muster_sweep_status_says(dashboard, grid):
    setting, trials = grid
    told = dashboard.get("/api/sweeps/grid").json
    known = json.loads(json.dumps(to_json(progress(setting.sweep_dir))))
    assert {key: told[key] for key in ("name", "status", "counts", "open")} == {
        key: known[key] for key in ("name", "status", "counts", "open")
    }
    for own, same in zip(told["trials"], known["trials"], strict=True):
        shared = own.keys() & same.keys() - {"updated"}
        assert shared > {"state", "step", "steps", "loss", "eval_loss", "budget", "flops", "parameters"}
        assert {key: own[key] for key in shared} == {key: same[key] for key in shared}
    assert [each["state"] for each in told["trials"]] == ["finished", "finished", "failed", "waiting"]
    assert told["trials"][2]["reason"] == "as the test says"
    assert (told["design"], told["axes"]) == ("grid", list(AXES))
    assert told["trials"][1]["values"] == dict(trials[1].values) != told["trials"][0]["values"]
    assert told["trials"][0]["run"] == f"grid:{trials[0].name}" in dashboard.rows()
    assert told["trials"][3]["run"] is None
    assert dashboard.get("/api/sweeps/none").status == 404


@pytest.mark.slow
def test_the_law_is_that_of_the_command_line(dashboard, isoflop, muster):
    setting, trials, _ = isoflop
    told = asked(dashboard, "/api/sweeps/sizes/law")
    found = told["law"]
    table = collect(setting.sweep)
    fits = fit(table, bootstraps=0)
    assert (found["rows"], found["chosen"], found["convention"]) == (len(trials), fits.chosen, "active")
    by_name = {each["name"]: each for each in found["laws"]}
    for name, each in fits.fits.items():
        own = {item["name"]: item["value"] for item in by_name[name]["coefficients"]}
        assert own == {key: pytest.approx(value, rel=1e-9) for key, value in each.coefficients.items()}
        assert by_name[name]["error"] == pytest.approx(each.cross_validation)
        assert bool(by_name[name]["refused"]) == (name in fits.refused)
    assert found["laws"][0]["name"] == fits.chosen
    assert found["budget"] == pytest.approx(2 * BUDGETS[-1], rel=0.05)
    predicted = Forecast(table).at_budget(found["budget"]).summary()
    for key in ("loss", "run_loss", "n", "d"):
        assert found["prediction"][key] == pytest.approx(predicted[key])
    (kind,) = found["kinds"]
    assert sorted(run["run"] for level in kind["budgets"] for run in level["runs"]) == sorted(t.name for t in trials)
    (frontier,) = found["frontier"]
    assert all(a < b < c for a, b, c in zip(frontier["low"], frontier["loss"], frontier["high"], strict=True))
    assert frontier["c"][-1] > found["budget"]
    held = found["score"]["held_back"]
    assert held["until"] == pytest.approx(BUDGETS[-2], rel=0.02)
    assert {each["run"] for each in held["scores"]} > {t.name for t in trials if t.budget == BUDGETS[-1]}
    again = dashboard.get("/api/sweeps/sizes/law").json
    assert again == told, "it was not worked out again"
    assert muster(*shlex.split(found["next"]["command"])[1:])[0] == 0
    (path,) = setting.sweep_dir.glob("*-next-*.yaml")
    written = flatten(load(path))
    assert found["next"]["config"] == {key: written[key] for key in found["next"]["config"]}
    assert found["next"]["config"].keys() > {"run.name", "model.hidden_size", "train.steps", "optim.lr"}


def test_too_little_for_a_law_is_said(dashboard, grid):
    found = asked(dashboard, "/api/sweeps/grid/law")["law"]
    assert found["missing"] == "2 runs in 2 octaves of FLOPs: a scaling law needs at least 3 budgets"
    assert [each["run"] for each in found["excluded"]] == [trial.name for trial in grid[1][2:]]
    assert found["time"]["total"] >= found["time"]["seconds"]["step"] > 0
    for wrong in ("budget=0", "budget=x", "budget=1e400", "max_budget=-1", "max_budget=nan"):
        assert dashboard.get(f"/api/sweeps/grid/law?{wrong}").status == 400
    none = asked(dashboard, "/api/sweeps/grid/law?max_budget=1")["law"]
    assert "--max-budget 1 leaves no run" in none["error"]


@pytest.mark.parametrize(
    "named",
    [
        {"base": "below.yaml"}, {"set": {"plugins": ["x.py"]}}, {"set": {"model.from": "folder"}},
        {"set": {"model": {"from": "folder"}}}, {"variants": {"a": {"set": {"train.init_from": "folder"}}}},
        {"axes": {"train.init_from": ["folder"]}}, {"axes": {"plugins": [["x.py"]]}},
    ],
)  # fmt: skip
def test_the_next_trial_of_what_names_files_or_code_is_not_made(named):
    sweep = sweep_from_dict({"base": "dense-small", "isoflop": {"budgets": [1e13]}})
    law_page._refuse_outside(sweep)
    with pytest.raises(ConfigError, match=r"not (read|loaded) here"):
        law_page._refuse_outside(sweep_from_dict(sweep.model_dump(exclude_none=True) | named))


@pytest.fixture
def alone(tmp_path, tiny_data):
    """A sweep of a stranger, in a root of its own."""
    setting, trials, record = made(tmp_path / "runs", tiny_data, "s", 2, grid={}, axes=AXES)
    record.close()
    return setting.sweep_dir, trials


def everything(root):
    with serving([root]) as server:
        server.look()
        answers = [server.get("/api/sweeps"), server.get("/api/sweeps/s")]
        law = asked(server, "/api/sweeps/s/law") if answers[1].status == 200 else {}
        return answers[1], json.dumps(law), "\n".join([each.body.decode() for each in answers])


def outside(tmp_path):
    """A run beside the root."""
    run = tmp_path / "secret" / "s-next-1e9"
    record = Record(run, 1)
    record.event("attempt_started")
    record.metrics({"step": 4, "loss": SECRET, "tokens": 1})
    record.metrics({"step": 4, "eval_loss": SECRET})
    record.event("attempt_ended", status="FINISHED", reason="", step=4)
    record.close()
    (run / "config.yaml").write_text("run: {name: s-next-1e9}\n")
    return run


def test_nothing_that_a_sweep_names_is_run_or_read(tmp_path, alone):
    folder, _ = alone
    (tmp_path / "plugin.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    for path in (folder / "sweep.yaml", *(folder / "trials").glob("*/config.yaml")):
        text = path.read_text()
        named = f"[{tmp_path / 'plugin.py'}]"
        path.write_text(
            text.replace("set: {}", f"set: {{plugins: {named}}}").replace("plugins: []", f"plugins: {named}")
        )
        assert path.read_text() != text
    prediction = {
        "budget": 1e9, "run_loss": {"value": 2.0, "low": 1.9, "high": 2.1}, "form": "approach3",
    }  # fmt: skip
    run = outside(tmp_path)
    keep_prediction(folder, prediction, run / "config.yaml", run.name)
    keep_prediction(folder, prediction, folder / "none.yaml", "../../secret/s-next-1e9")
    status, told, shown = everything(tmp_path / "runs")
    assert status.status == 200
    assert "plugins are not loaded here" in told
    assert str(SECRET) not in told + shown
    assert not (tmp_path / "ran").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["plan.json", "sweep.yaml", "predictions.jsonl", "trials", "trials/x"])
def test_no_link_of_a_sweep_is_followed(tmp_path, alone, name):
    folder, trials = alone
    path, away = folder / name.replace("/x", f"/{trials[0].name}"), tmp_path / "away"
    if path.exists():
        path.rename(away)
    else:
        away.write_text(json.dumps({"run": "x", "config": "x", "run_loss": {"value": SECRET}}))
    path.symlink_to(away)
    status, told, shown = everything(tmp_path / "runs")
    assert str(SECRET) not in told + shown
    assert '"eval_loss": 2.0' not in shown or name in ("sweep.yaml", "predictions.jsonl")
    if status.status == 200:
        assert any(word in told + shown for word in ("symbolic link", "is a link", "cannot be read"))


def test_texts_of_a_sweep_are_texts(tmp_path, alone):
    folder, trials = alone
    text = "<script>alert(1)</script>\x1b[31m\u202e"
    plan = json.loads((folder / "plan.json").read_text())
    plan["trials"][3]["variant"] = text
    (folder / "plan.json").write_text(json.dumps(plan))
    record = Record(folder, 1)
    record.event("trial_ended", trial=trials[3].name, status="FAILED", kind="", reason=text)
    record.close()
    status, told, shown = everything(tmp_path / "runs")
    assert status.json["trials"][3]["state"] == "failed"
    assert status.json["trials"][3]["reason"] == status.json["trials"][3]["variant"]
    assert r"<script>alert(1)</script>\\x1b[31m\\u202e" in told
    assert "\\u001b" not in told + shown
    assert "\\u202e" not in (told + shown).replace("\\\\u202e", "")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "{}", '{"trials": [{}]}'])
def test_a_plan_that_is_none_is_said(tmp_path, alone, text):
    (alone[0] / "plan.json").write_text(text)
    status, _, _ = everything(tmp_path / "runs")
    assert status.status == 409
    assert "plan.json is not what `muster sweep run` writes" in status.json["error"]
