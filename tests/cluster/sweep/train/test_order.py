"""Which trial goes next: the largest first, branches after their trunk, a search by what came before."""

from functools import partial

import pytest
from sweeps import begun, tiny_sweep

from cluster.attempts.tasks import Ended
from cluster.gangs.share import Share
from cluster.server.waiting import Gang
from cluster.sweep.design.plan import plan
from cluster.sweep.train.order import Job, Order
from cluster.sweep.train.trial_state import last_ends
from configs import ConfigError
from trainer.checkpoint.manifest import folder
from trainer.record.lines import read_events


@pytest.fixture
def make(tmp_path, tiny_data):
    """An order of a sweep's trials, each of one process unless `workers` says otherwise."""

    def make(workers=lambda trial: 1, over=(), again=None, **sections):
        sweep = tiny_sweep(tmp_path / "s", tiny_data, **sections)
        planned = plan(sweep, 320)

        def job(trial):
            return Job(trial, trial.config, Gang(workers(trial), Share(1.0, 0.0)))

        return Order(planned, dict(over), job, again or (lambda failed: planned), begun(sweep)), planned, sweep

    return make


def take(order):
    """Start the next trial and return its folder; None: none now."""
    task = order.next()
    return task and task.make()


AXES = {"grid": {}, "axes": {"train.steps": [3, 9, 6]}}


def test_largest_gangs_first_then_longest_trials(make):
    order, _, _ = make(workers=lambda trial: 2 if trial.config.train.steps == 3 else 1, **AXES)
    names = []
    while order.more():
        names.append(take(order).name)
    assert names == ["steps3", "steps9", "steps6"]
    assert take(order) is None
    assert len(order.training()) == 3


def test_what_is_over_is_not_trained(make):
    order, _, sweep = make(over={"steps9": "", "steps6": "it diverged"}, **AXES)
    run_dir = take(order)
    assert (run_dir.name, order.more()) == ("steps3", False)
    order.ended(Ended(run_dir, "FAILED", "no memory", "failure"))
    assert order.failed() == {"steps6": "it diverged", "steps3": "no memory"}
    assert last_ends(read_events(sweep.folder))["steps3"]["reason"] == "no memory"


def test_one_that_cannot_begin_fails_alone(make, monkeypatch):
    order, _, _ = make(**AXES)

    def refuse(config, **_):
        raise ConfigError("no such file")

    monkeypatch.setattr("cluster.sweep.train.order.prepare_run", refuse)
    assert take(order) is None
    assert order.failed() == {"steps9": "no such file"}
    assert order.more()


LADDER = {
    "ladder": {"parameters": [30e3], "tokens_per_parameter": [2, 4]},
    "rules": {"schedule": "wsd_branches", "batch": "fixed"},
    "shape": {"head_dim": 16, "aspect_ratio": 16, "ffn_multiple": 16},
}


def branches(make):
    order, planned, sweep = make(**LADDER)
    trunk, branch = planned.trials
    assert branch.after == trunk.name
    return order, trunk, branch, sweep


def test_a_branch_waits_for_the_checkpoint_of_its_trunk(make):
    order, trunk, branch, _sweep = branches(make)
    first = take(order)
    assert first.name == trunk.name
    assert (take(order), order.more()) == (None, True)
    start = folder(first, branch.from_step)
    start.mkdir(parents=True)
    (start / "manifest.json").write_text("{}")
    second = take(order)
    assert second.name == branch.name
    [forked] = [event for event in read_events(second) if event["event"] == "forked"]
    assert forked["checkpoint"] == str(start.resolve())


def test_a_branch_whose_trunk_fails_fails_with_the_reason(make):
    order, trunk, branch, _ = branches(make)
    order.ended(Ended(take(order), "FAILED", "the data are damaged", "stopped"))
    assert take(order) is None
    assert not order.more()
    assert f"{trunk.name} has no checkpoint at step {branch.from_step}" in order.failed()[branch.name]
    assert "the data are damaged" in order.failed()[branch.name]


def test_a_search_draws_on_when_a_round_has_ended(make, tmp_path, tiny_data):
    losses = {}
    sections = {
        "optuna": {"n": 5, "startup": 2, "round": 2},
        "axes": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
    }
    sweep = tiny_sweep(tmp_path / "s", tiny_data, **sections)

    def again(failed):
        return plan(sweep, 320, losses | dict.fromkeys(failed, float("nan")))

    order, _, _ = make(again=again, **sections)
    seen = []
    while order.more():
        running = list(iter(partial(take, order), None))
        assert len(running) == (1 if len(seen) == 4 else 2)
        for run_dir in running:
            failed = len(seen) == 1
            seen.append(run_dir.name)
            losses |= {} if failed else {run_dir.name: 1.0 / len(seen)}
            order.ended(Ended(run_dir, "FAILED" if failed else "FINISHED", "no" if failed else ""))
    assert len(set(seen)) == 5
