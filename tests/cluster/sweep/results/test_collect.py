"""A fit's table comes from the trials' own records; so do their states, the use of device time, and refusals."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from sweeps import begun, tiny_sweep, trained

from cluster.gangs.share import Node
from cluster.sweep.design.sizes import conventions
from cluster.sweep.results.collect import collect, loss_curves
from cluster.sweep.results.fit_commands import _table as runs_of
from cluster.sweep.train import run as run_module
from cluster.sweep.train.display import View, render, whole
from cluster.sweep.train.order import Order
from cluster.sweep.train.progress import books, progress, to_json, write_plan
from cluster.sweep.train.setting import Setting
from cluster.sweep.train.trial_state import Ledger
from configs import ConfigError, to_yaml
from configs.sections.data import PrepareConfig
from models.planning.cost import training_flops_per_token
from models.scaling.table import budgets
from trainer.data.prepare.prepare import prepare
from trainer.record.lines import Record, read_events

GRID = {
    "grid": {},
    "axes": {"train.steps": [4, 8]},
    "variants": {"dense": {}, "moe": {"experts": [4], "granularity": [2]}},
}


@pytest.fixture
def setting(tmp_path, tiny_data):
    return Setting(tiny_sweep(tmp_path / "s", tiny_data, **GRID))


def test_a_sweep_is_planned_again_only_when_what_is_known_changes(setting):
    planned = setting.plan_again(["moe-steps4"])
    assert setting.plan_again(["moe-steps4"]) is planned
    assert setting.plan() is not planned
    planned = setting.plan()
    assert setting.plan() is planned
    setting.vocab_size += 64  # as if known only once the data are prepared
    assert setting.plan().vocab_size == planned.vocab_size + 64


@pytest.fixture
def trials(setting):
    """Four trials: one finished, one finished with a loss that is not a number, one failed, one waiting."""
    planned, record = setting.plan(), begun(setting.sweep)
    write_plan(setting.sweep_dir, planned)
    first, second, third, _ = planned.trials
    trained(setting, first, record, loss=2.5)
    trained(setting, second, record, loss=None)
    trained(setting, third, record, status="FAILED", steps=2)
    return planned.trials


def test_every_finished_trial_is_a_row_and_every_other_has_a_reason(setting, trials):
    table = collect(setting.sweep)
    first, second, third, fourth = trials
    assert (table.run, table.loss.tolist(), table.convention) == ((first.name,), [2.5], "active")
    train = first.config.train
    tokens = train.steps * train.global_batch * train.seq_len
    assert table.d.tolist() == [tokens]
    assert table.c.tolist() == [training_flops_per_token(first.resolved.model, train.seq_len) * tokens]
    assert (table.c[0], table.n[0]) == (pytest.approx(first.flops), first.counts.active)
    assert {name: values[0] for name, values in table.counts.items()}["total"] == first.counts.total
    why = dict(table.excluded)
    assert "not a number" in why[second.name]
    assert why[third.name] == "failed at step 2: as the test says"
    assert why[fourth.name] == "waiting"
    assert "adamw, cosine, fp32, 4 held-out sequences of 32 tokens" in table.recipe[0]


def test_experts_are_columns(setting, trials):
    record = Record(setting.sweep_dir, 1)
    moe = next(trial for trial in trials if trial.variant == "moe" and trial.config.train.steps == 8)
    trained(setting, moe, record, loss=2.0)
    table = collect(setting.sweep)
    row = table.run.index(moe.name)
    assert {key: values[row] for key, values in table.extra.items()} == {
        "experts": 8.0, "top_k": 2.0, "active_ratio": 0.25, "granularity": 2.0,
    }  # fmt: skip
    assert table.counts["total"][row] > table.counts["active"][row] > table.counts["without_embeddings"][row]


@pytest.mark.parametrize("count", ["total", "without_embeddings"])
def test_every_command_counts_parameters_as_the_sweep_says(setting, trials, tmp_path, count):
    path = tmp_path / "sweep.yaml"
    path.write_text(to_yaml(setting.sweep.model_copy(update={"count": count})))
    _, table = runs_of(str(path), [], None, "", None, None, None)
    assert (table.convention, table.n.tolist()) == (count, [conventions(trials[0].counts)[count]])
    _, table = runs_of(str(path), [], None, "", None, "with_head", None)
    assert (table.convention, table.n.tolist()) == ("with_head", [conventions(trials[0].counts)["with_head"]])


def test_data_that_repeat_have_a_column_of_their_own(setting, trials):
    first = trials[0]
    record = Record(setting.sweep_dir / "trials" / first.name, 1)
    profile = {"splits": {"train": {"tokens": 100}}}
    inputs = [{"name": "d", "kind": "training", "digest": "ab" * 32, "source": "", "profile": profile}]
    record.event("attempt_started", inputs=inputs)
    record.event("attempt_ended", status="FINISHED", reason="", step=first.config.train.steps)
    table = collect(setting.sweep)
    assert table.extra["unique"].tolist() == [100.0]
    assert "data abababab" in table.recipe[0]


def test_the_best_learning_rate_stands_for_all(tmp_path, tiny_data):
    rules = {"lr_scale": [0.5, 1, 2], "lr": "fixed", "batch": "fixed"}
    setting = Setting(tiny_sweep(tmp_path / "s", tiny_data, grid={}, axes={"train.steps": [4]}, rules=rules))
    planned, record = setting.plan(), begun(setting.sweep)
    write_plan(setting.sweep_dir, planned)
    for trial, loss in zip(planned.trials, (2.3, 2.1, 2.2), strict=True):
        trained(setting, trial, record, loss=loss)
    table = collect(setting.sweep)
    assert (table.run, table.loss.tolist()) == ((planned.trials[1].name,), [2.1])
    assert all(f"{planned.trials[1].name} has the same model" in why for _, why in table.excluded)


def test_loss_curves_are_points_at_common_flops(setting, trials):
    trained(setting, trials[2], Record(setting.sweep_dir, 1), loss=2.2)
    points = loss_curves(setting.sweep_dir, collect(setting.sweep))
    assert set(points.run) == {trials[0].name, trials[2].name}
    c = points.c[[run == trials[2].name for run in points.run]]
    loss = points.loss[[run == trials[2].name for run in points.run]]
    assert np.all(np.diff(c) > 0)
    assert np.all(np.diff(loss) <= 0)
    assert loss[-1] == 4.0
    assert len(np.unique(budgets(points).level)) == len(np.unique(points.c))


def test_standings_and_books(setting, trials, capsys):
    _first, _, _third, fourth = trials
    found = progress(setting.sweep_dir)
    states = [found.standings[trial.name].state for trial in trials]
    assert states == ["finished", "finished", "failed", "waiting"]
    assert (found.status, found.count("failed"), found.open) == ("RUNNING", 1, 0)
    record = Record(setting.sweep_dir, 1)
    record.event("trial_started", trial=fourth.name, workers=1, cpus=1.0, gpus=0.0)
    assert progress(setting.sweep_dir).standings[fourth.name].state == "running"
    record.event("attempt_ended", status="STOPPED", reason="", step=0)
    assert progress(setting.sweep_dir).standings[fourth.name].state == "waiting"

    kept = books(Ledger(setting.sweep_dir))
    steps = sum(record["step_time"] for name in trials[:3] for record in _losses(setting, name))
    assert kept.seconds["step"] <= steps + 1e-6
    assert sum(kept.seconds.values()) >= kept.total > 0
    tree = json.loads(json.dumps(to_json(found)))
    assert tree["counts"] == {
        "waiting": 1, "running": 0, "stopped": 0, "finished": 2, "diverged": 0, "failed": 1,
    }  # fmt: skip
    assert "2/4 trials finished, 1 failed" in whole(found)
    render(found)


def _losses(setting, trial):
    from trainer.record.lines import read_metrics

    return [m for m in read_metrics(setting.sweep_dir / "trials" / trial.name) if "loss" in m]


def test_lines_for_a_pipe(setting, trials):
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    with View(setting.sweep_dir, Console(file=text)) as view:
        trained(setting, trials[3], Record(setting.sweep_dir, 1), loss=2.25)
        view.update()
    assert text.getvalue() == f"4/4 {trials[3].name}: held-out loss 2.2500, 8 steps\n"


def test_a_diverged_trial_is_left_alone_and_a_failed_one_is_not(setting, trials):
    third, fourth = trials[2], trials[3]
    assert setting.over(trials) == {trials[0].name: "", trials[1].name: ""}
    run_dir = setting.sweep_dir / "trials" / third.name
    record = Record(run_dir, 2)
    record.event("attempt_started", inputs=[])
    record.event("skipped_step", step=3, cursor=0, loss=None, in_a_row=10)
    record.event("attempt_ended", status="FAILED", reason="TrainingStopped: 10 steps", cause="nonfinite", step=3)
    sweep = Record(setting.sweep_dir, 1)
    sweep.event("trial_ended", trial=third.name, status="FAILED", kind="stopped", reason="10 steps in a row")
    assert setting.over(trials)[third.name] == "10 steps in a row"
    assert progress(setting.sweep_dir).standings[third.name].state == "diverged"
    assert fourth.name not in setting.over(trials)


def test_a_trial_of_the_same_name_and_another_config_is_refused(setting, trials, tmp_path, tiny_data):
    setting.refuse_changed(trials)
    other = Setting(tiny_sweep(tmp_path / "s", tiny_data, **GRID, set={"optim.lr": 0.5, "train.eval_every": 2}))
    with pytest.raises(ConfigError) as error:
        other.refuse_changed(other.plan().trials)
    assert f"trial {trials[0].name} was started with another config: optim.lr was 0.001 and is now 0.5" in str(
        error.value
    )
    assert "(and 2 more trials)" in str(error.value)
    same = Setting(tiny_sweep(tmp_path / "s", tiny_data, **GRID, set={"train.eval_every": 2}))
    same.refuse_changed(same.plan().trials)


def test_trials_are_not_watched_unless_the_sweep_says_so(setting, tmp_path, tiny_data):
    trial = setting.plan().trials[0]
    config = setting.config(trial)
    assert (config.train.sample_tokens, config.checkpoint.every, config.tracking.export_model) == (0, "auto", False)
    assert config.tracking.parent == str(setting.sweep_dir)
    assert config.tracking.experiment == "tiny"
    said = {"train": {"sample_tokens": 5}, "checkpoint.every": 7, "tracking.experiment": "mine"}
    own = Setting(tiny_sweep(tmp_path / "s", tiny_data, **GRID, set=said))
    config = own.config(own.plan().trials[0])
    assert (config.train.sample_tokens, config.checkpoint.every) == (5, 7)
    assert config.tracking.experiment == "mine"


def test_a_trial_takes_one_cpu_for_each_process(setting):
    trial = setting.plan().trials[0]
    gang = setting.job(trial, [Node(8.0, 0.0)]).gang
    assert (gang.workers, gang.each) == (1, (1.0, 0.0))
    assert setting.job(trial, [Node(8.0, 2.0)]).gang.each == (4.0, 1.0)
    wide = trial.config.model_copy(update={"parallel": trial.config.parallel.model_copy(update={"dp": 4})})
    assert setting.job(trial._replace(config=wide), [Node(2.0, 0.0)]).gang.each == (0.5, 0.0)


def test_one_process_runs_a_sweep(setting, trials):
    with (
        run_module._only_one(setting.sweep_dir),
        pytest.raises(ConfigError, match="sweep tiny is being run by"),
        run_module._only_one(setting.sweep_dir),
    ):
        pass
    with run_module._only_one(setting.sweep_dir):
        pass


def test_optuna_does_not_retry_trials_that_later_draws_depend_on(tmp_path, tiny_data):
    axes = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    setting = Setting(tiny_sweep(tmp_path / "s", tiny_data, optuna={"n": 4, "startup": 2, "round": 1}, axes=axes))
    planned, record = setting.plan(), begun(setting.sweep)
    assert (len(planned.trials), planned.open) == (2, 2)
    trained(setting, planned.trials[0], record, status="FAILED", steps=2)
    trained(setting, planned.trials[1], record, loss=2.0)
    write_plan(setting.sweep_dir, planned)
    more = setting.plan()
    assert (len(more.trials), more.open) == (3, 1)
    assert [trial.config for trial in more.trials[:2]] == [trial.config for trial in planned.trials]
    again = partial(run_module._Session._again, SimpleNamespace(setting=setting, gpus=None))
    order = Order(planned, setting.over(planned.trials), lambda t: setting.job(t, [Node(2, 0)]), again, record)
    task = order.next()
    assert [item.name for item in progress(setting.sweep_dir).items] == [trial.name for trial in more.trials]
    assert more.trials[2].name in dict(collect(setting.sweep).excluded)
    assert task.make().name == more.trials[2].name
    assert [e["trial"] for e in read_events(setting.sweep_dir) if e["event"] == "trial_started"][-1].endswith("002")


def test_data_without_held_out_documents_are_refused_before_a_trial(tmp_path):
    (tmp_path / "x.txt").write_text("a few words " * 20)
    prepare([tmp_path / "x.txt"], tmp_path / "data", PrepareConfig(tokenizer="bytes", held_out=0.0), progress=False)
    with pytest.raises(ConfigError, match="no held-out documents, whose loss a sweep compares"):
        Setting(tiny_sweep(tmp_path / "s", tmp_path / "data", **GRID)).prepare_data()
