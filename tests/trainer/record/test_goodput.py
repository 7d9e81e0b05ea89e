"""Every second of a run is in one category: hand-written runs with a kill, a restart and a pause, and a real run."""

import json
import random
import signal
import time

import numpy as np
import pytest
from faults import kill_at_step
from support import tiny, train_in_process

from trainer.record import goodput as goodput_module
from trainer.record.goodput import BOOKS, Steps, book, goodput, productive, read_steps, total
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run


def of(*rows: tuple) -> Steps:
    """Records as (step, attempt, time, seconds, waited)."""
    columns = np.array(rows, float).reshape(-1, 5).T
    return Steps(columns[0].astype(int), columns[1].astype(int), *columns[2:])


def event(time: float, attempt: int, name: str, **details) -> dict:
    return {"time": time, "attempt": attempt, "event": name, **details}


def test_a_hand_written_run():
    """Launched at 0, killed at 40, started again by the supervisor, stopped at 80, launched anew at 100."""
    events = [
        event(5, 0, "resolved", began=0),
        event(10, 1, "attempt_started"),
        event(31, 1, "checkpoint", step=2, stall_s=0.5),
        event(45, 1, "worker_lost"),
        event(50, 2, "attempt_started"),
        event(73, 2, "evaluation", seconds=3.0),
        event(80, 2, "attempt_ended", status="STOPPED"),
        event(110, 2, "resolved", began=100),
        event(112, 3, "attempt_started"),
        event(130, 3, "attempt_ended", status="FINISHED"),
    ]
    steps = of(
        (1, 1, 20, 8, 2), (2, 1, 30, 10, 1), (3, 1, 40, 9, 0),  # step 3 is done again
        (3, 2, 70, 10, 0),
        (4, 3, 125, 5, 1),
    )  # fmt: skip
    first, second, third = book(events, steps)
    assert first.seconds == {
        "step": 15, "data_wait": 3, "startup": 12, "lost": 9 + 5, "other": 0.5, "checkpoint": 0.5, "evaluation": 0,
        "down": 0, "paused": 0, "queue": 0,
    }  # fmt: skip
    assert second.seconds == {
        "step": 10, "data_wait": 0, "startup": 70 - 45 - 10, "lost": 0, "other": 7, "checkpoint": 0, "evaluation": 3,
        "down": 0, "paused": 0, "queue": 0,
    }  # fmt: skip
    assert (third.seconds["down"], third.seconds["paused"]) == (0, 20)
    assert third.seconds["startup"] == 20
    whole = total([first, second, third])
    assert sum(whole.values()) == pytest.approx(130)
    assert productive(whole) == pytest.approx((15 + 10 + 4) / (130 - 20))


@pytest.mark.parametrize(
    ("status", "book_of_the_gap"), [("STOPPED", "paused"), ("FINISHED", "paused"), ("FAILED", "down"), ("", "down")]
)
def test_a_stop_on_purpose_is_not_down_time(status, book_of_the_gap):
    events = [
        event(0, 0, "resolved", began=0), event(1, 1, "attempt_started"),
        event(9, 1, "attempt_ended", status=status) if status else event(9, 1, "worker_lost"),
        event(110, 1, "resolved", began=109), event(111, 2, "attempt_started"), event(120, 2, "attempt_ended"),
    ]  # fmt: skip
    first, second = book(events, of((1, 1, 8, 5, 0), (2, 2, 119, 5, 0)))
    assert second.seconds[book_of_the_gap] == 100
    seconds = total([first, second])
    assert productive(seconds) == pytest.approx(10 / (20 if book_of_the_gap == "paused" else 120))


def test_time_in_the_queue_and_for_room():
    """Submitted at 0, launched at 10; a machine is lost at 40, and there is room again at 60; sent again at 100."""
    events = [
        event(12, 0, "resolved", began=10, submitted=0),
        event(15, 1, "attempt_started"),
        event(40, 1, "worker_lost"),
        event(45, 1, "waiting"),
        event(60, 2, "attempt_started"),
        event(80, 2, "attempt_ended", status="STOPPED"),
        event(131, 2, "resolved", began=130, submitted=100),
        event(132, 3, "attempt_started"),
        event(140, 3, "attempt_ended"),
    ]
    first, second, third = book(events, of((1, 1, 30, 5, 0), (2, 2, 70, 5, 0), (3, 3, 138, 5, 0)))
    assert [attempt.seconds["queue"] for attempt in (first, second, third)] == [10, 15, 30]
    assert second.seconds["startup"] == 70 - 5 - 40 - 15
    assert (third.seconds["down"], third.seconds["paused"]) == (0, 20)
    assert sum(total([first, second, third]).values()) == pytest.approx(140)


def test_steps_that_were_not_recorded_are_counted():
    """With train.log_every=10 the time between two records is that of ten steps."""
    events = [event(0, 0, "resolved", began=0), event(1, 1, "attempt_started"), event(40, 1, "attempt_ended")]
    [attempt] = book(events, of((10, 1, 20, 2, 0), (20, 1, 40, 2, 0)))
    assert attempt.seconds["step"] == 22
    assert attempt.seconds["startup"] == 18


def test_a_run_still_going_and_one_that_never_took_a_step():
    events = [event(0, 0, "resolved", began=0), event(1, 1, "attempt_started"), event(9, 1, "plan")]
    [attempt] = book(events, of())
    assert attempt.seconds == dict.fromkeys(BOOKS, 0.0) | {"startup": 9}
    assert book([event(0, 0, "resolved", began=0)], of()) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_long_record_is_booked_some_marks_at_a_time(monkeypatch, seed):
    """Attempts that were killed or went back, steps that were not recorded, and a clock that was set back."""
    draw = random.Random(seed)
    rows, events, now, step = [], [], 1000.0, 0
    for attempt in range(1, 5):
        events.append(event(now, attempt, "attempt_started"))
        for _ in range(draw.randrange(60)):
            step, now = step + draw.choice([1, 1, 1, 5]), now + draw.random() * 2
            if seed > 3 and draw.random() < 0.05:
                now -= 5.0
            rows.append((step, attempt, now, draw.random(), draw.random() / 4))
            if draw.random() < 0.2:
                now += draw.choice([0.0, 0.5])
                events.append(event(now, attempt, "evaluation", seconds=0.3))
            if draw.random() < 0.1:
                events.append(event(now, attempt, "checkpoint", stall_s=0.01))
        if draw.random() < 0.5:
            events.append(event(now + 1.0, attempt, "attempt_ended", status="FAILED"))
        step, now = max(0, step - draw.randrange(10)), now + 3.0
    whole = book(events, of(*rows))
    monkeypatch.setattr(goodput_module, "BLOCK", 3)
    for mine, known in zip(book(events, of(*rows)), whole, strict=True):
        assert (mine.number, mine.began, mine.ended) == (known.number, known.began, known.ended)
        assert mine.seconds == pytest.approx(known.seconds)
    assert total(whole)["step"] > 0


def test_a_records_fields_may_stand_in_any_order_with_others_between(tmp_path):
    lines = [
        {"step": 3, "attempt": 2, "time": 17.5, "step_time": 0.7, "new": 1, "data_wait": 2.6e-05, "x": [1]},
        {"step": 3, "attempt": 2, "time": 18.0, "eval_loss": 8.3},
        {"step": 4, "attempt": 2, "time": 19.0, "loss": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "attempt": 2, "ti'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [column.tolist() for column in read_steps(tmp_path)] == [[3], [2], [17.5], [0.7], [2.6e-05]]


@pytest.mark.slow
def test_a_real_run_that_was_killed_and_went_on(tmp_path, tiny_data):
    run = {"name": "run", "root": str(tmp_path)}
    train = {"steps": 6, "eval_every": 3, "micro_batch": 2}
    config = tiny(run=run, data={"path": str(tiny_data)}, train=train, checkpoint={"every": 3})
    run_dir = prepare_run(config, began=time.time())
    assert train_in_process(run_dir, kill_at_step, 6, signal.SIGKILL) == -signal.SIGKILL
    first_life = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    prepare_run(config, began=time.time())
    assert train_in_process(run_dir) == 0
    events, books = read_events(run_dir), goodput(run_dir)
    assert [each.number for each in books] == [1, 2]
    whole = total(books)
    assert min(whole.values()) >= 0

    began = next(event["began"] for event in events if event["event"] == "resolved")
    assert sum(whole.values()) == pytest.approx(events[-1]["time"] - began)
    counted = [record for record in read_metrics(run_dir) if "loss" in record]
    assert whole["step"] == pytest.approx(sum(each["step_time"] - each["data_wait"] for each in counted), rel=0.02)
    assert whole["data_wait"] == pytest.approx(sum(each["data_wait"] for each in counted), rel=0.02, abs=1e-3)
    evaluated = [event["seconds"] for event in events if event["event"] == "evaluation"]
    assert whole["evaluation"] == pytest.approx(sum(evaluated), rel=0.02)
    resumed = next(event["step"] for event in events if event["event"] == "resumed")
    again = [each["step_time"] for each in first_life if each["step"] > resumed and "loss" in each]
    assert again, "the attempt was killed between two checkpoints"
    assert books[0].seconds["lost"] >= 0.98 * sum(again)
    assert books[1].seconds["lost"] == 0
    assert all(each.seconds["startup"] > 0 for each in books)
    assert books[1].seconds["down"] > 0
