"""What the README shows for scripts and notebooks runs, and gives the same results as the commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from laws import HOFFMANN, isoflop
from support import tiny, train_in_process
from sweeps import begun, tiny_sweep, trained

from cluster import api
from cluster.sweep.train.progress import write_plan
from cluster.sweep.train.setting import Setting
from configs import ConfigError, to_yaml
from models.scaling.forms.dense import Approach3
from trainer.record.lines import Record
from trainer.run.folder import prepare_run

README = Path(__file__).parents[2] / "cluster" / "README.md"
COLUMNS = {"n": "params", "d": "tokens", "c": "flops", "loss": "val"}


@pytest.fixture(scope="module")
def frame():
    runs = isoflop(Approach3(), HOFFMANN, budgets=(1e18, 1e20, 5), noise=0.002)
    return pd.DataFrame({"params": runs.n, "tokens": runs.d, "flops": runs.c, "val": runs.loss})


def run_script(folder, code):
    """Run a script and return what it printed."""
    (folder / "script.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.ray
@pytest.mark.slow
def test_what_readme_shows_runs(tmp_path, tiny_data, frame):
    [code] = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 25
    shutil.copytree(tiny_data, tmp_path / "data" / "tokens")
    frame.to_csv(tmp_path / "runs.csv", index=False)
    lines = run_script(tmp_path, code)
    shown = [line.split() for line in lines if re.fullmatch(r"\d+ \S+ \S+", line)]
    # Each step once, and the evaluation after the last.
    assert [line[0] for line in shown] == ["1", "2", "3", "4", "4"]
    found = api.metrics("api", tmp_path / "runs")
    assert list(found.index) == [1, 2, 3, 4]
    assert found["loss"][3] == float(shown[2][1])
    assert found["eval_loss"][4] == float(shown[4][2])
    [run] = api.runs(tmp_path / "runs", keys=["optim.lr"]).itertuples()
    assert (run.Index, run.status, run.step) == ("api", "FINISHED", 4)
    assert any(line.startswith("Interval(value=") for line in lines)


STOPPING = """
from cluster.api import train

def stop(record):
    raise KeyError("enough")

asked = {"run.name": "api", "train.steps": 500, "data.path": "data/tokens"}
try:
    train("quickstart", asked, on_metrics=stop)
except KeyError as error:
    print("stopped", error)
for wrong in ({"optim.lr": 1}, {"plugins": ["nothing"], "run.name": "other"}):
    try:
        train("quickstart", asked | wrong)
    except ValueError as error:
        print("refused", str(error).replace("\\n", " "))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_callback_that_raises_stops_the_run_with_a_checkpoint(tmp_path, tiny_data):
    shutil.copytree(tiny_data, tmp_path / "data" / "tokens")
    lines = run_script(tmp_path, STOPPING)
    assert "stopped 'enough'" in lines
    refused = [line for line in lines if line.startswith("refused")]
    assert "run api exists with another config: optim.lr was 0.002 and is now 1.0" in refused[0]
    assert "nothing" in refused[1]
    assert 1 <= max(api.metrics("api", tmp_path / "runs").index) < 500
    assert list((tmp_path / "runs" / "api" / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.slow
def test_repeated_steps_count_once(tmp_path, tiny_data):
    run_dir = prepare_run(
        tiny(run={"root": str(tmp_path), "name": "again"}, data={"path": str(tiny_data)}, train={"steps": 3})
    )
    assert train_in_process(run_dir) == 0
    before = api.metrics("again", tmp_path)
    assert list(before.index) == [1, 2, 3]
    assert before["eval_loss"].notna().tolist() == [False, False, True]
    record = Record(run_dir, 2)
    record.metrics({"step": 2, "loss": 1.25})
    record.close()
    after = api.metrics(run_dir)
    assert list(after.index) == [1, 2]
    assert after["loss"].tolist() == [before["loss"][1], 1.25]
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 5
    found = api.runs(tmp_path, keys=["model.num_layers"])
    assert found.loc["again", ["step", "model.num_layers"]].tolist() == [2, 2]
    with pytest.raises(ConfigError, match=r"has no key optim\.rate"):
        api.runs(tmp_path, keys=["optim.rate"])
    with pytest.raises(ConfigError, match=r"no run 'agin'.*did you mean again"):
        api.metrics("agin", tmp_path)
    with pytest.raises(ConfigError, match=r"root names another folder$"):
        api.metrics("nosuch", tmp_path)
    assert api.runs(tmp_path, keys="model.num_layers").columns.equals(found.columns)
    with pytest.raises(ConfigError, match=r"^root=.*nothing: no such folder$"):
        api.runs(tmp_path / "nothing")


def test_a_frame_and_a_file_are_fitted_and_predicted_alike(tmp_path, frame):
    frame.to_parquet(tmp_path / "runs.parquet")
    kinds = [api.fit(source, columns=COLUMNS) for source in (frame, tmp_path / "runs.parquet")]
    assert kinds[0].best.coefficients == kinds[1].best.coefficients
    low, high = kinds[0].best.intervals["alpha"]
    assert low < HOFFMANN["alpha"] < high
    renamed = frame.rename(columns={theirs: ours for ours, theirs in COLUMNS.items()})
    found = api.predict(renamed, 1e21, max_budget=5e19)
    assert 6 * found.n.value * found.d.value == pytest.approx(1e21, rel=1e-6)
    assert found.loss.low < found.loss.value < found.loss.high
    with pytest.raises(ConfigError, match="the data frame has no column n"):
        api.fit(frame)
    with pytest.raises(ConfigError, match="budget=-1"):
        api.predict(renamed, -1)
    with pytest.raises(ConfigError, match="a scaling law needs at least 3 budgets"):
        api.fit(renamed, max_budget=1e18)


def test_numbers_given_as_text_and_columns_named_by_numbers_are_accepted(frame):
    numbered = frame.rename(columns={"params": 0})
    names = {"n": 0, "d": "tokens", "c": "flops", "loss": "val"}
    expected = api.predict(frame, 1e21, columns=COLUMNS, max_budget=5e19).loss
    assert api.predict(numbered.assign(k=3), "1e21", columns=names, where={"k": 3}, max_budget="5e19").loss == expected
    assert api.fit(frame, columns=COLUMNS, forms="kaplan").fits.keys() == {"kaplan"}
    for wrong in (0, -1, float("nan"), 1e300, "much", True, [], None):
        for name in ("budget", "unique", "max_budget"):
            if wrong is not None or name == "budget":
                with pytest.raises(ConfigError, match=f"^{name}=.*: should be a number above 0, at most 1e\\+30"):
                    api.predict(frame, **{"budget": 1e21, "columns": COLUMNS, name: wrong})


def test_messages_name_arguments(frame, tmp_path):
    def told(call, *given, **named):
        with pytest.raises(ConfigError) as caught:
            call(*given, **named)
        assert "--" not in str(caught.value)
        return str(caught.value)

    assert 'name it, such as columns={"n": ..., "loss": ...}; the file has' in told(api.fit, frame)
    assert told(api.fit, frame, columns={"q": "n"}).startswith("columns=q=n: no such column")
    assert told(api.fit, frame, columns=COLUMNS, where={"q": 1}).startswith("where=q=1: the data frame has")
    assert told(api.fit, frame, columns=["n"]).startswith("columns=")
    assert told(api.fit, frame, columns=COLUMNS, forms=["nope"]).startswith("form=nope: no such form")
    assert told(api.fit, frame, columns=COLUMNS, max_budget=1).startswith("max_budget=1 leaves no run")
    assert told(api.fit, tmp_path / "none.csv").endswith("none.csv: no such file")
    assert told(api.fit, dict(frame)).startswith("source=")
    mixed = frame.assign(recipe=["", "z"] * (len(frame) // 2) + ["z"] * (len(frame) % 2))
    assert told(api.fit, mixed, columns=COLUMNS).endswith(
        '((empty), z), whose losses cannot be compared: choose one with where={"recipe": ...}'
    )


def test_a_sweep_is_read_by_its_file(tmp_path, tiny_data):
    sweep = tiny_sweep(tmp_path, tiny_data, grid={}, axes={"train.steps": [4, 8, 16], "optim.lr": [1e-3]})
    setting = Setting(sweep)
    planned, record = setting.plan(), begun(sweep)
    write_plan(setting.sweep_dir, planned)
    (tmp_path / "sweep.yaml").write_text(to_yaml(sweep))
    with pytest.raises(ConfigError, match="no trial has finished yet"):
        api.fit(tmp_path / "sweep.yaml")
    for number, trial in enumerate(planned.trials):
        trained(setting, trial, record, loss=5.0 - number)
    with pytest.raises(ConfigError, match="a sweep: columns and where are for tables"):
        api.fit(tmp_path / "sweep.yaml", columns=COLUMNS)
    fits = api.fit(tmp_path / "sweep.yaml")
    assert sorted(fits.table.loss) == [3.0, 4.0, 5.0]
    assert fits.chosen is None  # three runs of one size determine no law
    with pytest.raises(ConfigError):
        api.predict(tmp_path / "sweep.yaml", 1e12)
    assert sorted(api.runs(sweep.folder / "trials").eval_loss) == [3.0, 4.0, 5.0]


def test_mistakes_are_raised(tmp_path):
    for overrides in ({"optim.rate": 1}, ["optim.rate=1"], "optim.rate=1"):
        with pytest.raises(ConfigError, match=r"unknown key optim\.rate"):
            api.train("quickstart", overrides)
    with pytest.raises(ConfigError, match=r"model.from=.*not a Hugging Face model folder"):
        api.train("quickstart", {"model.from": str(tmp_path)})
