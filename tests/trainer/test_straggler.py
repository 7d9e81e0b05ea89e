"""A rank that is slower than the others is named, though every whole step lasts as long on all of them."""

import socket

import pytest
from faults import slow_down
from ranks import run_ranks
from support import tiny

from configs import to_yaml
from trainer.record import read_events, read_metrics
from trainer.straggler import WINDOW, Stragglers, slow_ranks
from trainer.tracking.flat import scalars


def test_the_slow_are_named_with_their_factor():
    assert slow_ranks([[1.0, 1.1, 1.6, 1.0]] * 50, [0] * 4) == {2: 1.6}
    assert slow_ranks([[1.0, 3.0]] * 50, [0, 0]) == {1: 3.0}
    assert slow_ranks([[1.0, 1.1, 1.4, 1.0]] * 50, [0] * 4) == {}


def test_a_hiccup_names_nobody():
    assert slow_ranks([[1.0, 1.0]] * 49 + [[1.0, 500.0]], [0, 0]) == {}


def test_stages_of_a_pipeline_are_compared_with_themselves():
    assert slow_ranks([[1.0, 1.0, 1.0, 3.0, 3.0, 6.0]] * 50, [0, 0, 0, 1, 1, 1]) == {5: 2.0}
    assert slow_ranks([[1.0, 3.0]] * 50, [0, 1]) == {}


def test_each_is_told_once_and_when_it_is_over():
    stragglers = Stragglers([0, 0], ["a", "b"])
    told = []
    for step in range(1, 4 * WINDOW + 1):
        changes = stragglers.after_step([1.0, 2.0 if step <= 2 * WINDOW else 1.0])
        told += [(step, change.event, change.details["rank"], change.details["host"]) for change in changes]
    assert told == [(WINDOW, "straggler", 1, "b"), (3 * WINDOW, "straggler_recovered", 1, "b")]


def test_trackers_are_shown_the_slowest_and_the_median():
    assert scalars({"step": 1, "rank_time": [1.0, 4.0, 2.0]}) == {"rank_time/max": 4.0, "rank_time/median": 2.0}


@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_one_of_which_is_slow(tmp_path, tiny_data, stage):
    config = tiny(
        run={"name": "slow", "root": str(tmp_path)},
        data={"path": str(tiny_data)},
        train={"steps": 10},
        parallel={"dp": 2, "zero_stage": stage},
        checkpoint={"every": 0},
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert [code for code, _ in run_ranks(tmp_path, ["c.yaml"], before=slow_down, given=(1, 10))] == [0, 0]
    [told] = [event for event in read_events(tmp_path / "slow") if event["event"] == "straggler"]
    assert (told["rank"], told["step"], told["host"]) == (1, 10, socket.gethostname())
    steps = [record for record in read_metrics(tmp_path / "slow") if "loss" in record]
    assert [len(record["rank_time"]) for record in steps] == [2] * 10
