"""`checkpoint.every: auto`: Daly's published figures, what the failures say, what a checkpoint costs, and real runs."""

import itertools
import signal
import time

import pytest
from faults import first_checkpoint, kill_at_step, trained
from support import prepare_tiny, tiny, train_in_process
from teams import in_team

from trainer.checkpoint import cadence
from trainer.checkpoint.cadence import PRIOR, Cadence, Past, choose, daly, failure_rate, is_due, past
from trainer.record.lines import Record, read_events, read_metrics
from trainer.run.folder import prepare_run

HOUR = 3600.0


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (HOUR / 4, 9.1)])
def test_interval_matches_dalys_figures(mtbf, minutes):
    """Figures 3 to 5 of the paper: checkpoints that take five minutes."""
    assert daly(300, mtbf) / 60 == pytest.approx(minutes, rel=0.01)


def test_a_checkpoint_that_costs_more_than_twice_the_mtbf():
    assert daly(500, 200) == 200


def test_without_failures_the_prior_holds():
    assert failure_rate(0, 0) == PRIOR
    assert failure_rate(0, 0.1 / PRIOR) == pytest.approx(PRIOR, rel=0.5)
    assert 0.2 * PRIOR < failure_rate(0, 1 / PRIOR) < PRIOR  # for the prior's mean time to a failure
    assert failure_rate(419, 419 / PRIOR) == pytest.approx(PRIOR, rel=0.03)
    assert failure_rate(2, 20 / PRIOR) == pytest.approx(0.1 * PRIOR, rel=0.5)  # more reliable machines than the prior's


@pytest.mark.parametrize("seconds", [60.0, 600.0, HOUR])
def test_a_few_failures_outweigh_the_prior(seconds):
    """One failure settles the order of magnitude, thirty the rate, even if the prior is up to a million times lower."""
    assert 1 / 3 < failure_rate(1, seconds) * seconds < 1
    assert failure_rate(30, 30 * seconds) * 30 * seconds == pytest.approx(29.67, rel=0.03)  # a gamma's median


def event(time: float, attempt: int, name: str, **details) -> dict:
    return {"time": time, "attempt": attempt, "event": name, **details}


def test_failures_are_counted_from_the_record():
    events = [
        event(0, 0, "resolved"),
        event(10, 1, "attempt_started", world_size=4),
        event(100, 1, "checkpoint"),
        event(110, 1, "worker_lost", kind="infrastructure"),
        event(120, 2, "attempt_started", world_size=4),
        event(150, 2, "hang"),
        event(151, 2, "worker_lost", kind="hang"),
        event(160, 3, "attempt_started", world_size=2),  # under torchrun: nothing recorded its end
        event(200, 3, "checkpoint"),
        event(205, 3, "resolved"),  # launched again
        event(210, 4, "attempt_started", world_size=2),
        event(215, 4, "failure"),
        event(215, 4, "attempt_ended", status="FAILED"),
        event(216, 4, "worker_failed", kind="error"),  # the user's own error
        event(220, 5, "attempt_started", world_size=2),
        event(230, 5, "attempt_ended", status="STOPPED"),  # on request
        event(240, 6, "attempt_started", world_size=2),
    ]
    assert past(events, 6) == Past(3, 4 * 100 + 4 * 31 + 2 * 40 + 2 * 6 + 2 * 10)
    assert past(events, 1) == Past(0, 0)


def test_bounds():
    assert choose(1.0, 0.1, 0.5, 75.0)._asdict() == {
        "every": round(daly(1, 75) / 0.5), "interval_s": daly(1, 75), "by": "daly", "step_s": 0.5, "cost_s": 1.0,
        "write_s": 0.1, "mtbf_s": 75.0,
    }  # fmt: skip
    assert choose(0.01, 30, 0.5, 75)[:3] == (240, 120.0, "write")
    assert choose(5.0, 30, 2.0, 1e8)[:3] == (900, 1800.0, "most_lost")
    assert choose(0.0, 0.0, 40.0, 75.0).every == 1  # at most once a step
    assert choose(5.0, 3, 2.0, 1e8, age=200)[:3] == (50, 100.0, "age")
    assert choose(5.0, 30, 2.0, 1e8, age=200)[:3] == (60, 120.0, "write")
    assert choose(5.0, 3, 2.0, 1e8, age=4000)[:3] == (900, 1800.0, "most_lost")


def test_a_young_run_that_dies_loses_at_most_a_third(tmp_path, monkeypatch):
    """However rare failures are by the prior, at the price of a few more checkpoints."""
    clock = [0.0]
    monkeypatch.setattr(cadence.time, "monotonic", lambda: clock[0])
    chosen, saves, took = Cadence([], 1, Record(tmp_path, 1)), [0.0], None
    for step in range(1, 7201):
        clock[0] += 0.5
        chosen.step_took(0.5, False, took)
        if is_due("auto", step, round(2 * saves[-1]), chosen.every):
            saves.append(clock[0])
            chosen.began_write(took)
            took = (0.02, 0.2)
    assert saves[1] == 5.0
    assert max((after - before) / after for before, after in itertools.pairwise(saves[1:])) < 0.51
    assert max((after - before) / after for before, after in itertools.pairwise(saves[3:])) < 0.36
    assert len(saves) < 25


def test_due():
    assert [step for step in range(1, 13) if is_due(4, step, 0, 0)] == [4, 8, 12]
    assert not any(is_due(0, step, 0, 0) for step in range(13))
    assert [step for step in range(6, 12) if is_due("auto", step, 5, 3)] == [8, 9, 10, 11]


def stopped_after(seconds: float) -> list[dict]:
    """Events of a run that trained this long without a failure."""
    return [event(0, 1, "attempt_started", world_size=1), event(seconds, 1, "attempt_ended", status="STOPPED")]


def cadences(folder):
    return [event for event in read_events(folder) if event["event"] == "cadence"]


def test_cost_is_the_extra_time_of_the_steps_during_the_write(tmp_path):
    chosen = Cadence(stopped_after(2 * HOUR), 1, Record(tmp_path, 2))
    assert chosen.every == cadence.FIRST
    for _ in range(10):
        chosen.step_took(0.5, False, None)
    chosen.began_write(None)
    chosen.step_took(1.5, True, None)
    chosen.step_took(0.75, True, (0.01, 0.9))
    assert cadences(tmp_path) == []  # not before a step without a write
    chosen.step_took(0.5, False, (0.01, 0.9))
    [told] = cadences(tmp_path)
    assert told["cost_s"] == pytest.approx(1.25)
    assert (told["write_s"], told["step_s"], told["by"], told["failures"]) == (0.9, 0.5, "most_lost", 0)
    assert told["every"] == chosen.every == 3600
    chosen.began_write((0.01, 0.9))
    chosen.step_took(1.0, True, None)
    chosen.step_took(0.5, False, None)  # this one was not written: it is not counted
    chosen.began_write(None)
    chosen.step_took(0.5, False, (2.0, 2.0))  # in the foreground
    assert chosen.every == 3600
    assert len(cadences(tmp_path)) == 1


def test_a_new_attempt_uses_earlier_measurements(tmp_path):
    """After a failure in the first two minutes the interval shrinks at once; small changes are ignored."""
    now = time.time()
    told = event(now - 60, 1, "cadence", every=3600, cost_s=1.25, write_s=0.9, step_s=0.5)
    events = [
        event(now - 120, 1, "attempt_started", world_size=1),
        told,
        event(now, 1, "worker_lost", kind="infrastructure"),
    ]
    chosen = Cadence(events, 1, Record(tmp_path, 2))
    [again] = cadences(tmp_path)
    assert again["failures"] == 1
    assert again["mtbf_s"] == pytest.approx(1 / failure_rate(1, 120), rel=0.01)
    assert chosen.every == again["every"] == round(daly(1.25, again["mtbf_s"]) / 0.5)
    same = Cadence([*events[:1], told | {"every": chosen.every + 2}, *events[2:]], 1, Record(tmp_path, 2))
    assert same.every == chosen.every + 2
    assert len(cadences(tmp_path)) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(prepare_tiny(tmp_path_factory.mktemp("data")))


def made(root, data, name, **sections):
    checkpoint = {"every": "auto"}
    return prepare_run(tiny(run={"root": str(root), "name": name}, data={"path": data}, checkpoint=checkpoint,
                            train={"steps": 24}, **sections))  # fmt: skip


def saved(run_dir):
    return [(event["attempt"], event["step"]) for event in read_events(run_dir) if event["event"] == "checkpoint"]


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


def test_a_killed_run_continues_as_if_uninterrupted(tmp_path, data):
    """The first checkpoint comes after `FIRST` steps; the times of checkpoints change nothing in the training."""
    whole, killed = (made(tmp_path, data, name) for name in ("whole", "killed"))
    assert train_in_process(whole) == 0
    assert saved(whole)[0] == (1, cadence.FIRST)
    assert saved(whole)[-1] == (1, 24)
    assert train_in_process(killed, kill_at_step, 22, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(killed) == 0
    assert losses(killed) == losses(whole)
    assert past(read_events(killed), 2).failures == 1


@pytest.mark.slow
def test_all_processes_follow_rank_0(tmp_path, data):
    run_dir = made(tmp_path, data, "two", parallel={"dp": 2})
    assert in_team(2, trained, run_dir, first_checkpoint, (0, 1), 3, 5) == ["FINISHED", "FINISHED"]
    assert [step for _, step in saved(run_dir)] == [*range(3, 25, 3)]
