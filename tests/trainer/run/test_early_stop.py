"""Runs that end, or lower their learning rate, when the held-out loss no longer improves."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from faults import kill_at_step, trained
from plugin_runs import numbers, state
from support import train_in_process
from teams import in_team

from configs import load
from trainer.bookkeeping import after_evaluation, ends_early
from trainer.checkpoint.manifest import committed
from trainer.record.lines import Record, read_events, read_metrics
from trainer.run.folder import is_finished, prepare_run
from trainer.state import TrainState

# It overfits: the held-out loss is lowest before the fortieth step, and rises then.
KEYS = ("optim.lr=0.1", "optim.schedule=constant", "train.eval_every=5", "train.steps=200", "checkpoint.every=20")
EARLY = (*KEYS, "train.early_stop.patience=4")
PLATEAU = (*KEYS, "train.steps=60", "optim.schedule=plateau", "optim.plateau_patience=2", "optim.plateau_factor=0.5",
           "optim.min_lr_ratio=0")  # fmt: skip


def make(root: Path, *keys: str) -> Path:
    return prepare_run(load("wine", [f"run.root={root}", "tracking.enabled=false", *keys]))


def evaluations(run_dir: Path) -> dict[int, float]:
    return {m["step"]: m["eval_loss"] for m in read_metrics(run_dir) if "eval_loss" in m}


@pytest.fixture(scope="module")
def early(tmp_path_factory) -> Path:
    run_dir = make(tmp_path_factory.mktemp("early"), *EARLY)
    assert train_in_process(run_dir) == 0
    return run_dir


def test_it_ends_after_so_many_evaluations_without_an_improvement(early):
    found = evaluations(early)
    best = min(found, key=lambda step: found[step])
    last = best + 4 * 5
    assert max(found) == last < 200
    [ended] = [event for event in read_events(early) if event["event"] == "attempt_ended"]
    assert (ended["status"], ended["cause"], ended["step"], ended["in_a_row"]) == ("FINISHED", "early_stop", last, 4)
    assert ended["reason"] == "no lower held-out loss in 4 evaluations"
    assert committed(early)[-1] == last
    assert is_finished(early)


def test_it_is_finished_until_the_patience_is_raised(tmp_path, early, muster):
    last = max(evaluations(early))
    early = shutil.copytree(early, tmp_path / "wine")
    keys = [f"run.root={early.parent}", "tracking.enabled=false", *EARLY]
    code, out, _ = muster("train", "wine", *keys, "train.steps=300")
    assert code == 0
    assert (
        f"is finished (at step {last}: no lower held-out loss in 4 evaluations): raise train.early_stop.patience" in out
    )
    code, out, _ = muster("runs", "--root", str(early.parent), "--json")
    assert [run["status"] for run in json.loads(out)] == ["FINISHED"]
    more = make(early.parent, *KEYS, "train.steps=300", "train.early_stop.patience=6")
    assert train_in_process(more) == 0
    assert max(evaluations(more)) == last + 10
    assert is_finished(more)
    assert not is_finished(make(early.parent, *KEYS, "train.early_stop.patience=null"))


@pytest.mark.slow
def test_every_topology_ends_at_the_same_step(tmp_path, early):
    run_dir = make(tmp_path, *EARLY, "parallel.dp=2", "parallel.zero_stage=1")
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    before = {step: loss for step, loss in evaluations(early).items() if step in evaluations(run_dir)}
    assert evaluations(run_dir) == pytest.approx(before, abs=1e-5)
    assert committed(run_dir)[-1] == committed(tmp_path / "wine")[-1]
    assert [e["in_a_row"] for e in read_events(run_dir) if e["event"] == "attempt_ended"] == [4]


@pytest.mark.parametrize("keys", [EARLY, pytest.param(PLATEAU, marks=pytest.mark.slow)], ids=["early_stop", "plateau"])
def test_a_kill_changes_nothing(tmp_path, early, keys):
    """The evaluations before it still count."""
    whole = early if keys == EARLY else make(tmp_path / "whole", *keys)
    killed = make(tmp_path / "killed", *keys, "checkpoint.background=false")
    if keys != EARLY:
        assert train_in_process(whole) == 0
    assert train_in_process(killed, kill_at_step, 23, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(killed) == 0
    assert committed(killed)[-1] == committed(whole)[-1]
    assert state(killed, committed(whole)[-1]) == state(whole, committed(whole)[-1])
    assert numbers(killed) == numbers(whole)


def test_a_plateau_lowers_the_learning_rate_for_every_step_after_it(tmp_path):
    run_dir = make(tmp_path, *PLATEAU)
    assert train_in_process(run_dir) == 0
    drops = [(event["step"], event["lr_drops"]) for event in read_events(run_dir) if event["event"] == "plateau"]
    assert len(drops) >= 2
    assert [number for _, number in drops] == list(range(1, len(drops) + 1))
    rates = {m["step"]: m["lr"] for m in read_metrics(run_dir) if "lr" in m}
    assert rates == pytest.approx({step: 0.1 * 0.5 ** sum(at < step for at, _ in drops) for step in rates})


def test_what_counts_as_an_improvement(tmp_path):
    config = load("wine", [*KEYS, "train.early_stop.patience=3", "train.early_stop.min_delta=0.1"])
    state, record = TrainState(), Record(tmp_path, 1)
    seen = []
    for loss in (1.0, 0.95, float("nan"), 0.85, 0.8, 0.76):
        after_evaluation(state, loss, config, record)
        seen.append((state.best_eval_loss, state.since_best, ends_early(state, config)))
    record.close()
    assert seen == [
        (1.0, 0, False),
        (1.0, 1, False),
        (1.0, 2, False),
        (0.85, 0, False),
        (0.85, 1, False),
        (0.85, 2, False),
    ]
    after_evaluation(state, 0.76, config, None)
    assert ends_early(state, config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.early_stop.patience=3", "train.eval_every=0"], "train.early_stop.patience needs evaluations during"),
        (["optim.schedule=plateau", "train.eval_every=0"], "optim.schedule=plateau needs evaluations during the run"),
        (["optim.swa_from=1000"], "optim.swa_from=1000 is past the last step, 100"),
        (["optim.swa_from=50", "optim.ema_decay=0.9"], "optim.swa_from=50 and optim.ema_decay exclude each other"),
        (["train.early_stop.patience=0"], "train.early_stop.patience"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(muster, keys, message):
    code, _, err = muster("train", "wine", *keys)
    assert code == 2
    assert message in err
