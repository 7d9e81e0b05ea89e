"""Every second of a run stands in one book: a written-out life with a kill, a restart and a pause, and a real run."""

import pytest

from trainer.record.goodput import BOOKS, Step, book, productive, read_steps, total


def event(time: float, attempt: int, name: str, **details) -> dict:
    return {"time": time, "attempt": attempt, "event": name, **details}


def test_a_life_written_out():
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
    steps = [
        Step(1, 1, 20, 8, 2), Step(2, 1, 30, 10, 1), Step(3, 1, 40, 9, 0),  # step 3 is done again
        Step(3, 2, 70, 10, 0),
        Step(4, 3, 125, 5, 1),
    ]  # fmt: skip
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
def test_only_what_nobody_wanted_is_down_time(status, book_of_the_gap):
    events = [
        event(0, 0, "resolved", began=0), event(1, 1, "attempt_started"),
        event(9, 1, "attempt_ended", status=status) if status else event(9, 1, "worker_lost"),
        event(110, 1, "resolved", began=109), event(111, 2, "attempt_started"), event(120, 2, "attempt_ended"),
    ]  # fmt: skip
    first, second = book(events, [Step(1, 1, 8, 5, 0), Step(2, 2, 119, 5, 0)])
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
    first, second, third = book(events, [Step(1, 1, 30, 5, 0), Step(2, 2, 70, 5, 0), Step(3, 3, 138, 5, 0)])
    assert [attempt.seconds["queue"] for attempt in (first, second, third)] == [10, 15, 30]
    assert second.seconds["startup"] == 70 - 5 - 40 - 15
    assert (third.seconds["down"], third.seconds["paused"]) == (0, 20)
    assert sum(total([first, second, third]).values()) == pytest.approx(140)


def test_steps_that_were_not_recorded_are_steps():
    """With train.log_every=10 the time between two records is that of ten steps."""
    events = [event(0, 0, "resolved", began=0), event(1, 1, "attempt_started"), event(40, 1, "attempt_ended")]
    [attempt] = book(events, [Step(10, 1, 20, 2, 0), Step(20, 1, 40, 2, 0)])
    assert attempt.seconds["step"] == 22
    assert attempt.seconds["startup"] == 18


def test_a_run_still_going_and_one_that_never_took_a_step():
    events = [event(0, 0, "resolved", began=0), event(1, 1, "attempt_started"), event(9, 1, "plan")]
    [attempt] = book(events, [])
    assert attempt.seconds == dict.fromkeys(BOOKS, 0.0) | {"startup": 9}
    assert book([event(0, 0, "resolved", began=0)], []) == []


def test_lines_are_read_without_what_is_not_needed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 3, "attempt": 2, "time": 1795377604.89, "data_wait": 2.6e-05, "step_time": 0.7, "x": []}\n'
        '{"step": 3, "attempt": 2, "time": 1795377605.0, "eval_loss": 8.3}\n'
        '{"step": 4, "attempt": 2, "ti'
    )
    assert list(read_steps(path)) == [Step(3, 2, 1795377604.89, 0.7, 2.6e-05)]
