"""A run that hangs: its time limit, the rank that is named, and the stacks that two real processes leave."""

import json

import pytest
from faults import hold_interpreter, stand_still
from ranks import run_ranks
from support import tiny, train_in_process

from configs import to_yaml
from trainer.health.stands import Stand, read_stand
from trainer.health.watchdog import bound, suspects
from trainer.record.lines import read_events, read_metrics, summary
from trainer.run.folder import prepare_run

COLLECTIVE = "/site-packages/torch/distributed/distributed_c10d.py:3251 in all_reduce"


def test_a_step_is_bounded_by_the_steps_before_it():
    assert bound("step", [2.0, 3.0, 2.0], floor=5, timeout=1800) == 30
    assert bound("data", [0.1, 0.2], floor=5, timeout=1800) == 5


@pytest.mark.parametrize("phase", ["start", "rollback", "evaluation", "checkpoint", "end"])
def test_phases_outside_a_step_have_the_time_of_a_collective(phase):
    assert bound(phase, [0.1] * 50, floor=5, timeout=1800) == 1800


def test_the_first_steps_may_compile():
    assert bound("step", [], floor=5, timeout=1800) == 1800


WAITS = Stand(7, "step", [COLLECTIVE])


@pytest.mark.parametrize(
    ("stands", "named"),
    [
        ([WAITS, None, WAITS], [1]),
        ([WAITS, Stand(7, "data", ["/a/loader.py:50 in __next__"]), WAITS], [1]),
        ([WAITS, Stand(6, "checkpoint", [COLLECTIVE])], [1]),
        ([WAITS, WAITS, Stand(7, "step", ["/a/model.py:1 in forward"])], [2]),
        ([WAITS, WAITS], []),
        ([Stand(7, "step", ["/a/model.py:1 in forward"])], []),
    ],
    ids=["silent", "reads data", "a step behind", "outside of the collective", "all wait", "alone"],
)
def test_the_rank_that_others_wait_for_is_named(stands, named):
    assert suspects(dict(enumerate(stands))) == named


def test_the_flight_recorders_come_before_the_stacks():
    outside = Stand(7, "step", ["/a/model.py:1 in forward"])
    assert suspects({0: WAITS, 1: outside, 2: WAITS}, waited_for=[2]) == [2]
    assert suspects({0: WAITS, 1: outside, 2: None}, waited_for=[1]) == [2], "it could not even say where it stood"
    assert suspects({0: WAITS, 1: outside}, stacks_tell=False) == []


def test_the_training_thread_is_found_among_the_stacks(tmp_path):
    head = {"rank": 0, "step": 7, "phase": "step", "thread": "0x00007f02"}
    (tmp_path / "s.txt").write_text(
        f"{json.dumps(head)}\nThread 0x00007f01 (most recent call first):\n"
        '  File "/a/threading.py", line 3 in wait\n\nThread 0x00007f02 (most recent call first):\n'
        '  File "/a/model.py", line 12 in forward\n  File "/a/loop.py", line 150 in _steps\n\n'
        'Current thread 0x00007f03 (most recent call first):\n  File "/a/watchdog.py", line 1 in run\n'
    )
    assert read_stand(tmp_path / "s.txt") == Stand(7, "step", ["/a/model.py:12 in forward", "/a/loop.py:150 in _steps"])
    (tmp_path / "c.txt").write_text(
        'Timeout (0:00:10)!\nThread 0x00007f02:\n  File "/a/model.py", line 12 in forward\n'
    )
    assert read_stand(tmp_path / "c.txt") is None


def losses(run_dir):
    return [(m["step"], m.get("loss"), m.get("eval_loss"), m.get("grad_norm")) for m in read_metrics(run_dir)]


@pytest.mark.slow
def test_two_processes_one_of_which_hangs(tmp_path, tiny_data):
    config = tiny(
        run={"name": "still", "root": str(tmp_path / "runs")},
        data={"path": str(tiny_data)},
        parallel={"dp": 2, "zero_stage": 2},
        checkpoint={"every": 4},
        cluster={"hang_timeout": 1.0},
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    run_dir = tmp_path / "runs" / "still"

    first = run_ranks(tmp_path, ["c.yaml"], before=stand_still, given=(1, 6))
    assert [code for code, _ in first] == [1, 1]
    [hang] = [event for event in read_events(run_dir) if event["event"] == "hang"]
    assert (hang["step"], hang["phase"], hang["suspects"]) == (6, "step", [1])
    assert hang["seconds"] >= hang["bound"] >= 1.0  # ten times a step, where the machine is slow
    assert hang["stacks"] == ["stacks/attempt-01-rank-0000.txt", "stacks/attempt-01-rank-0001.txt"]
    assert "rank 1 is in" in hang["reason"]
    assert "in stand_here" in hang["reason"]
    assert "others wait in all_reduce" in hang["reason"]
    assert summary(run_dir)["reason"] == hang["reason"]
    stood = [read_stand(run_dir / name) for name in hang["stacks"]]
    assert [stand.waits for stand in stood] == [True, False]
    assert "in stand_here" in stood[1].frames[0]

    assert [code for code, _ in run_ranks(tmp_path, ["c.yaml"])] == [0, 0]
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [4]
    assert [code for code, _ in run_ranks(tmp_path, ["c.yaml", "run.name=clean"])] == [0, 0]
    assert losses(run_dir) == losses(tmp_path / "runs" / "clean")
    assert not (tmp_path / "runs" / "clean" / "stacks").exists()


def test_a_process_whose_interpreter_is_held_ends_with_its_stacks(tmp_path, tiny_data):
    config = tiny(
        run={"name": "held", "root": str(tmp_path)}, data={"path": str(tiny_data)}, cluster={"hang_timeout": 1.0}
    )
    run_dir = prepare_run(config)
    assert train_in_process(run_dir, hold_interpreter, 5) == 1
    text = (run_dir / "stacks" / "attempt-01-rank-0000.txt").read_text()
    assert "in hold_here" in text
