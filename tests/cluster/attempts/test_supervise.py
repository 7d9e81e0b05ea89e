"""The supervisor's transitions, for a given story of machines and attempts; real ones are in tests/faults."""

from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import resolved

from cluster.attempts import supervise
from cluster.attempts.failures import Failure, Final
from cluster.attempts.supervise import PATIENCE, Supervisor
from cluster.gangs.ray_nodes import Machine
from cluster.gangs.share import Node, Share
from configs import to_yaml
from trainer.record.lines import Record, read_events
from trainer.run.stop import request_stop, stop_requested

GONE = Failure(1, "the process is gone (signal SIGKILL)", lost=True)


class Told:
    """A gang with room for as many workers as it is told, and attempts that end as told.

    Args:
        rooms: number of workers that fit, for each attempt; 0: none until it is asked again.
        attempts: how each ends, or what happens in it.
    """

    each, group = Share(1.0, 0.0), 1

    def __init__(self, run_dir: Path, rooms: list[int], attempts: list) -> None:
        self.run_dir, self.rooms, self.attempts = run_dir, rooms, attempts
        self.sizes: list[int] = []
        self.patience: list[float] = []
        self.avoided: list[set[str]] = []
        self.members: list = []

    def gather(self, workers: int, avoid: Collection[str]) -> bool:
        if workers > self.rooms[0]:
            if workers == 1:
                self.rooms.pop(0)
            return False
        self.members = [SimpleNamespace(node="here")] * workers
        self.sizes.append(workers)
        self.avoided.append(set(avoid))
        return True

    def room_for(self, workers: int, avoid: Collection[str]) -> list[int] | None:
        return [workers] if workers <= self.rooms[0] else None

    def unreached(self) -> set[str]:
        return {"there"}

    def attempt(self, run_dir: Path, folder: str, patience: float, meanwhile: Callable[[], None]):
        self.patience.append(patience)
        Record(run_dir, len(self.patience)).event("attempt_started")
        if len(self.rooms) > 1:
            self.rooms.pop(0)
        story = self.attempts.pop(0)
        if callable(story):
            story(meanwhile)
            return ["STOPPED"], []
        return ([], [story]) if isinstance(story, Failure) else ([story], [])


@pytest.fixture
def cluster(monkeypatch):
    """Machines, and those draining, as set by tests."""
    found = {"machines": [Machine("here", "10.0.0.1", Node(0.0, 0.0), Node(4.0, 0.0))], "draining": {}}
    monkeypatch.setattr(supervise, "machines", lambda: found["machines"])
    monkeypatch.setattr(supervise, "draining", lambda: found["draining"])
    monkeypatch.setattr(supervise, "SHRINK_AFTER", 0.0)
    monkeypatch.setattr(supervise, "LOOK_EVERY", 0.0)
    return found


def supervised(tmp_path: Path, rooms: list[int], attempts: list, joined: bool = True, **sections):
    (tmp_path / "config.yaml").write_text(to_yaml(resolved(**sections)))
    gang = Told(tmp_path, rooms, attempts)
    return Supervisor(tmp_path, gang, joined, "/"), gang  # type: ignore[arg-type]


def policies(run_dir: Path) -> list[tuple[str, str]]:
    return [(event["action"], event["reason"]) for event in read_events(run_dir) if event["event"] == "policy"]


def test_a_lost_process_is_followed_by_an_attempt_that_waits_for_the_lock(tmp_path, cluster):
    supervisor, gang = supervised(tmp_path, [1], [GONE, "FINISHED"])
    assert supervisor.run() == "FINISHED"
    assert gang.patience == [0.0, PATIENCE]
    assert gang.avoided == [set(), {"there"}]  # it did not answer after the failure


def test_a_machine_that_cannot_train_is_left_out_if_the_others_suffice(tmp_path, cluster):
    bad = Failure(0, "host-0: wrong products", broken=(0,))
    supervisor, _ = supervised(tmp_path, [1], [bad, "FINISHED"])
    with pytest.raises(Final, match="host-0: wrong products; without it the cluster is too small"):
        supervisor.run()
    cluster["machines"].append(Machine("other", "10.0.0.2", Node(4.0, 0.0), Node(4.0, 0.0)))
    supervisor, gang = supervised(tmp_path, [1], [bad, "FINISHED"])
    assert supervisor.run() == "FINISHED"
    assert gang.avoided == [set(), {"here", "there"}]
    kinds = [event["kind"] for event in read_events(tmp_path) if event["event"] == "worker_failed"]
    assert kinds == ["infrastructure"] * 2


def test_one_failure_too_many_ends_the_run(tmp_path, cluster):
    supervisor, gang = supervised(tmp_path, [1], [GONE] * 5)
    with pytest.raises(Final, match=r"4 infrastructure failures .*; rank 1: the process is gone"):
        supervisor.run()
    assert len(gang.sizes) == 4


@pytest.mark.parametrize("joined", [True, False])
def test_the_users_stop_ends_the_run(tmp_path, cluster, joined):
    supervisor, gang = supervised(tmp_path, [1], [lambda look: request_stop(tmp_path), "FINISHED"], joined)
    assert supervisor.run() == "STOPPED"
    assert not stop_requested(tmp_path)
    assert len(gang.sizes) == 1


def test_a_stop_while_waiting_for_room_ends_the_run(tmp_path, cluster):
    supervisor, gang = supervised(tmp_path, [1, 0], [GONE])
    gang.gather = lambda workers, avoid: bool(request_stop(tmp_path))  # type: ignore[method-assign]
    assert supervisor.run() == "STOPPED"
    [waiting] = [event for event in read_events(tmp_path) if event["event"] == "waiting"]
    assert "needs 1 process of 1 CPU and" in waiting["reason"]


def test_a_signal_to_a_process_ends_the_run_only_on_a_private_ray(tmp_path, cluster):
    supervisor, _ = supervised(tmp_path, [1], [lambda look: None, "FINISHED"], joined=False)
    assert supervisor.run() == "STOPPED"
    supervisor, _ = supervised(tmp_path, [1], [lambda look: None, "FINISHED"], joined=True)
    assert supervisor.run() == "FINISHED"
    assert policies(tmp_path) == [("retry", "a process was told to stop, but the run was not")]


def test_an_elastic_run_shrinks_and_grows(tmp_path, cluster):
    def grow(look):
        look()
        assert not stop_requested(tmp_path)  # no room yet
        gang.rooms[0] = 4
        look()
        assert stop_requested(tmp_path)

    elastic = {"cluster": {"workers": [1, 4]}}
    supervisor, gang = supervised(tmp_path, [4, 2, 2, 4], [GONE, grow, "FINISHED"], **elastic)
    assert supervisor.run() == "FINISHED"
    assert gang.sizes == [4, 2, 4]
    sizes = [reason.partition(";")[0] for action, reason in policies(tmp_path) if action == "resize"]
    assert sizes == [f"{n} processes on 1 machine" for n in (4, 2, 4)]
    assert ("retry", "there is room for 4 processes, 2 are training: growing") in policies(tmp_path)


def test_a_machine_about_to_leave_is_left_after_a_checkpoint(tmp_path, cluster):
    def drain(look):
        cluster["draining"] = {"elsewhere": 0}
        look()
        assert not stop_requested(tmp_path)
        cluster["draining"] = {"here": 0}
        look()

    supervisor, gang = supervised(tmp_path, [1], [drain, "FINISHED"])
    assert supervisor.run() == "FINISHED"
    assert gang.avoided == [set(), {"here"}]
    assert policies(tmp_path) == [("retry", "10.0.0.1 will leave: continuing without it")]
