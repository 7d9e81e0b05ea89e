"""Many runs on a few warm gangs of a real Ray: each is trained once, and a mistake fails only its own run."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from trials import train_all

from trainer.record.lines import read_events, read_metrics


@pytest.mark.ray
@pytest.mark.slow
def test_every_run_is_trained_once(tmp_path, tiny_data):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        ended = process.submit(train_all, tmp_path, tiny_data).result(900)  # takes 2 minutes at a load of 6 per core
    statuses = [(name, status) for name, status, _ in ended]
    assert sorted(statuses[:4]) == [("a", "FINISHED"), ("b", "FINISHED"), ("c", "FINISHED"), ("wrong", "FAILED")]
    assert sorted(statuses[4:]) == [("a", "FINISHED"), ("d", "FINISHED")]
    [reason] = [reason for name, _, reason in ended if name == "wrong"]
    assert "missing.py" in reason
    for name in ("a", "b", "c", "d"):
        begun = [event for event in read_events(tmp_path / name) if event["event"] == "attempt_started"]
        assert len(begun) == 1
        assert [m["step"] for m in read_metrics(tmp_path / name) if "loss" in m] == [1, 2, 3, 4, 5, 6]
