"""`muster sweep plan`: its table, its numbers as JSON, its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.record.lines import Record

TEXT = """
name: tiny
base: dense-small
isoflop: {budgets: [1e13, 3e13, 1e14]}
shape: {head_dim: 16, aspect_ratio: 32, ffn_multiple: 16}
variants: {dense: {}, moe: {experts: 8, granularity: 2}}
set: {model.vocab_size: 512, data.prepare.vocab_size: 512}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(TEXT)
    return "sweep.yaml"


def test_numbers(file, muster):
    code, out, err = muster("sweep", "plan", file, "--gpus", "2", "--usd-per-gpu-hour", "3", "--gpu", "cpu", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    trials, totals = plan["trials"], plan["totals"]
    assert totals["trials"] == len(trials) == 30
    assert totals["flops"] == pytest.approx(sum(trial["flops"] for trial in trials))
    assert totals["device_hours"] == pytest.approx(sum(trial["device_hours"] for trial in trials))
    assert totals["usd"] == pytest.approx(3 * totals["device_hours"])
    assert totals["device_hours"] / 2 <= totals["hours"] < totals["device_hours"]
    assert all(abs(trial["off"]) <= 0.01 for trial in trials)
    assert {trial["variant"] for trial in trials} == {"dense", "moe"}


def test_table(file, muster):
    code, out, _ = muster("sweep", "plan", file, "isoflop.sizes=3", "rules.lr=fixed", "--gpu", "cpu")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "tiny: 18 trials on 1 x cpu, N counted as active"
    assert lines[1].split() == [
        "trial", "N", "total", "shape", "D", "D/N", "steps", "batch", "lr", "FLOPs", "off", "by", "hours"]  # fmt: skip
    assert sum(line.startswith(("dense-", "moe-")) for line in lines) == 18
    assert "hours on 1 device\n" in out
    assert "warning: off-centre: by 20 tokens per parameter fewer than 3 sizes" in out


def test_branches_and_searches(file, muster):
    ladder = "ladder={parameters: [3e5], tokens_per_parameter: [5, 20]}"
    _, out, _ = muster("sweep", "plan", file, "isoflop=null", ladder, "rules.schedule=wsd_branches", "variants={}")
    assert "of dense-" in out
    search = ["isoflop=null", "optuna={n: 20, budget: 1e13}", "variants={}"]
    _, out, _ = muster("sweep", "plan", file, *search, "axes.optim.betas=[[0.9, 0.95], [0.9, 0.99]]")
    assert "12 more trials will be chosen by the losses of these" in out
    assert "optim.betas=[0.9, 0.9" in out


def test_finished_trials_are_taken_into_account(file, muster):
    out = json.loads(muster("sweep", "plan", file, "--json")[1])
    for trial in out["trials"]:
        run = Path("runs/tiny/trials") / trial["name"]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("")
        record = Record(run, 1)
        record.event("attempt_started", device="cpu")
        record.metrics({"step": 1, "loss": 1.0})
        record.metrics({"step": 1, "eval_loss": 1.0 / trial["parameters"]["active"]})
        record.event("attempt_ended", status="FINISHED")
        record.close()
    warned = json.loads(muster("sweep", "plan", file, "--json")[1])["warnings"]
    assert any("the size with the lowest loss is at the edge of its budget" in line for line in warned)


REFUSED = {
    "file": (["missing.yaml"], "no sweep 'missing.yaml'"),
    "key": (["sweep.yaml", "isoflop.budget=1"], "unknown key isoflop.budget: did you mean isoflop.budgets?"),
    "device": (["sweep.yaml", "--gpu", "h300"], "--gpu h300: should be one of h100"),
    "devices": (["sweep.yaml", "--gpus", "0"], "--gpus 0: should be 1 to 1,048,576"),
    "too few": (["sweep.yaml", "--gpus", "1", "set.parallel.dp=2"], "--gpus 1: a trial takes 2 devices"),
    "price": (["sweep.yaml", "--usd-per-gpu-hour", "-1"], "should be a price, 0 to 1,000,000"),
    "budget": (["sweep.yaml", "isoflop.budgets=[1e9]"], "isoflop.budgets=1e9: a budget of 1e+09 FLOPs is too small"),
    "base": (["sweep.yaml", "base=quikstart"], "did you mean quickstart?"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(file, muster, arguments, message):
    code, out, err = muster("sweep", "plan", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_plan_needs_no_torch(file):
    code = (
        "import sys; from configs.sweep.definition import load_sweep; from cluster.sweep.design.plan import plan;"
        "import cluster.sweep.design.next_run;"
        "from cluster.sweep.design.show import costs; from models.planning.devices import cpu;"
        "found = plan(load_sweep('sweep.yaml'), 512); costs(found, cpu(), 2, None);"
        "print(*{'torch', 'ray', 'deepspeed', 'mlflow', 'matplotlib', 'optuna', 'scipy'} & sys.modules.keys())"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={"PYTHONPATH": str(root)})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
