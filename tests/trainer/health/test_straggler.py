"""A rank that is slower than the others is named, although a whole step takes equally long on all of them."""

import socket

import pytest
from faults import slow_down
from ranks import run_ranks
from support import tiny

from configs import to_yaml
from trainer.health.clock import DeviceOwnTime
from trainer.health.straggler import WINDOW, Stragglers, slow_ranks
from trainer.record.lines import read_events, read_metrics
from trainer.tracking.flat import scalars


def test_the_slow_are_named_with_their_factor():
    assert slow_ranks([[1.0, 1.1, 1.6, 1.0]] * 50, [0] * 4) == {2: 1.6}
    assert slow_ranks([[1.0, 3.0]] * 50, [0, 0]) == {1: 3.0}
    assert slow_ranks([[1.0, 1.1, 1.4, 1.0]] * 50, [0] * 4) == {}


def test_a_single_slow_step_names_nobody():
    assert slow_ranks([[1.0, 1.0]] * 49 + [[1.0, 500.0]], [0, 0]) == {}


def test_stages_of_a_pipeline_are_compared_with_themselves():
    assert slow_ranks([[1.0, 1.0, 1.0, 3.0, 3.0, 6.0]] * 50, [0, 0, 0, 1, 1, 1]) == {5: 2.0}
    assert slow_ranks([[1.0, 3.0]] * 50, [0, 1]) == {}


def test_each_is_reported_once_and_when_it_recovers():
    stragglers = Stragglers([0, 0], ["a", "b"])
    told = []
    for step in range(1, 4 * WINDOW + 1):
        changes = stragglers.after_step([1.0, 2.0 if step <= 2 * WINDOW else 1.0])
        told += [(step, change.event, change.details["rank"], change.details["host"]) for change in changes]
    assert told == [(WINDOW, "straggler", 1, "b"), (3 * WINDOW, "straggler_recovered", 1, "b")]


def test_trackers_are_shown_the_slowest_and_the_median():
    assert scalars({"step": 1, "rank_time": [1.0, 4.0, 2.0]}) == {"time_rank_max": 4.0, "time_rank_median": 2.0}


class Device:
    """A stream at some point in time, and its events: each takes the time at which it is recorded."""

    def __init__(self) -> None:
        self.now, self.done, self.made, self.training, self.broken = 0.0, 0.0, 0, True, False

    def event(self) -> "Event":
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        if self.device.broken:
            raise RuntimeError("CUDA error")
        self.at = self.device.now

    def query(self) -> bool:
        return self.at <= self.device.done

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "not ready"
        return end.at - self.at


def step_on(device: Device, clock: DeviceOwnTime, computes: float, waits: float) -> float:
    """Compute, wait for others twice, compute; in milliseconds. Returns what the clock tells."""
    clock.begin()
    device.now += computes / 2
    for _ in range(2):
        with clock.waiting():
            device.now += waits / 2
    device.now += computes / 2
    return clock.seconds()


def test_on_a_gpu_waits_are_left_out_and_told_when_the_device_is_there():
    device = Device()
    clock = DeviceOwnTime(device.event, lambda: device.training)
    assert step_on(device, clock, 8, 2) == 0  # the device has done nothing of it yet
    device.done = device.now
    assert step_on(device, clock, 6, 100) == 0.008
    assert step_on(device, clock, 7, 1) == 0.008  # it is behind
    device.done = device.now
    assert step_on(device, clock, 5, 1) == 0.007  # of the last that it is done with
    device.training = False
    device.done = device.now
    assert step_on(device, clock, 3, 4) == 0.005
    device.done = device.now
    assert step_on(device, clock, 3, 4) == 0.007  # other streams' waits are not the training's
    made = device.made
    for _ in range(100):
        device.done = device.now
        step_on(device, clock, 3, 4)
    assert device.made == made, "events are used again"


def test_a_measurement_that_fails_does_not_fail_the_step():
    device = Device()
    clock = DeviceOwnTime(device.event, lambda: True)
    step_on(device, clock, 8, 2)
    device.done = device.now
    device.broken = True
    assert step_on(device, clock, 6, 2) == 0.008
    device.broken = False
    assert step_on(device, clock, 4, 2) == 0.008
    device.done = device.now
    assert step_on(device, clock, 4, 2) == 0.004


def test_a_rank_that_has_measured_nothing_yet_is_compared_with_nobody():
    stragglers = Stragglers([0, 0], ["a", "b"])
    assert not any(stragglers.after_step([1.0, 0.0]) for _ in range(2 * WINDOW))


@pytest.mark.slow
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
