"""What follows a failure, for given histories."""

import pytest
from support import resolved

from cluster.attempts.failures import Failure
from cluster.attempts.policy import Past, decide, history, kind_of, memory_advice
from configs import load, resolve


def lost(step: int, saved: int) -> Past:
    return Past("infrastructure", step, saved)


def test_infrastructure_may_fail_forever_while_checkpoints_advance():
    past = [lost(step + 3, step) for step in range(0, 4000, 10)]
    assert all(decide(past[: i + 1], 3).action == "retry" for i in range(len(past)))


def test_infrastructure_failures_without_a_new_checkpoint_have_a_budget():
    past = [lost(7, 0)] + [lost(13, 10)] * 4
    assert [decide(past[: i + 1], 3).action for i in range(5)] == ["retry"] * 4 + ["stop"]
    assert (
        decide(past, 3).reason == "4 infrastructure failures since the checkpoint of step 10, cluster.max_failures is 3"
    )
    assert decide(past[:1], 0).action == "stop"
    assert "before the first checkpoint" in decide(past[:1], 0).reason


def test_a_hang_shares_the_budget_of_infrastructure():
    past = [lost(13, 10), Past("hang", 14, 10)]
    assert decide(past, 1) == (
        "stop",
        "2 infrastructure failures (1 of them hung) since the checkpoint of step 10, cluster.max_failures is 1",
    )
    assert decide(past, 2).action == "retry"


def test_an_error_gets_a_second_chance_and_more_while_there_is_progress():
    error = Past("error", 30, 20)
    assert decide([error], 3).action == "retry"
    assert decide([error, Past("error", 40, 40)], 3).action == "retry"
    assert decide([error, lost(31, 20), error], 3) == ("stop", "failed twice in a row after step 30")


def test_memory_stops_at_once():
    assert decide([Past("memory", 0, 0)], 3).action == "stop"


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Failure(0, "OutOfMemoryError: CUDA out of memory", fault="memory"), "memory"),
        (Failure(0, "RuntimeError: Broken pipe", fault="connection"), "infrastructure"),
        (Failure(0, "host-0: wrong products", broken=(0,)), "infrastructure"),
        (Failure(0, "the process is gone", lost=True), "infrastructure"),
        (Failure(0, "ValueError: no"), "error"),
    ],
)
def test_kinds(failure, kind):
    assert kind_of(failure) == kind


def test_history_begins_at_the_last_launch():
    events = [
        {"event": "resolved"},
        {"event": "worker_failed", "step": 3, "kind": "error"},
        {"event": "resolved"},
        {"event": "checkpoint", "step": 10},
        {"event": "worker_lost", "step": 13, "kind": "infrastructure"},
    ]
    assert history(events) == [lost(13, 10)]


def test_advice_names_what_needs_less():
    big = {"hidden_size": 1024, "num_heads": 16, "head_dim": 64, "num_layers": 8, "intermediate_size": 4096}
    advice = memory_advice(
        resolved(model=big, train={"micro_batch": 4, "seq_len": 2048}, parallel={"dp": 8}), cpu=False
    )
    assert "train.micro_batch=2" in advice
    assert "train.activation_checkpointing=full" in advice
    assert "parallel.zero_stage=1" in memory_advice(
        resolved(model=big | {"num_layers": 48}, parallel={"dp": 4}), cpu=False
    )
    convnet, _ = resolve(load("digits-convnet"))
    advice = memory_advice(convnet, cpu=True)
    assert advice == "the planner has formulas for decoders only: set train.micro_batch=16, or lower model.*"
    least = {"micro_batch": 1, "activation_checkpointing": "full", "seq_len": 2048}
    assert "more devices" in memory_advice(resolved(model=big, train=least), cpu=False)
