"""The queue's journal is the truth: what it cannot write does not happen, and what it says is found again."""

import resource
from pathlib import Path

import psutil
import pytest
from hostile_messages import GOOD, submit, zipped
from queues import Client, Queue

from cluster.server.jobs import job_queue
from cluster.server.jobs.job_queue import JobQueue, NotWritten, locked, queue_folder
from cluster.server.jobs.ray_link import Hello, Unreachable
from cluster.server.jobs.scheduler import Scheduler
from configs import ConfigError


@pytest.fixture
def here(tmp_path) -> Queue:
    return Queue(tmp_path)


def journal(here: Queue) -> Path:
    return here.queue.here / "journal.jsonl"


def test_what_cannot_be_written_has_not_happened(here):
    """And half a line that was written before the disk was full spoils none of the next."""
    here.send(GOOD)
    before, size = here.jobs, journal(here).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(NotWritten):
            here.queue.stop("job-a", False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert here.jobs == before
    assert journal(here).stat().st_size == size
    here.queue.set_priority("job-a", 3)
    assert JobQueue(here.queue.here).jobs() == here.jobs
    assert here.jobs["job-a"].priority == 3


def test_a_journal_that_has_grown_is_written_anew(here, monkeypatch):
    monkeypatch.setattr(job_queue, "COMPACTED_AFTER", 10)
    here.send(GOOD)
    for priority in range(20):
        here.queue.set_priority("job-a", priority)
    here.send(zipped(submit("job-b")))
    assert len(journal(here).read_text().splitlines()) == 2
    here.queue.set_priority("job-a", 99)
    assert JobQueue(here.queue.here).jobs() == here.jobs


def test_of_jobs_that_have_ended_the_newest_are_kept(here, monkeypatch):
    monkeypatch.setattr(job_queue, "KEPT_JOBS", 3)
    monkeypatch.setattr(job_queue, "KEPT_PACKAGES", 2)
    for number in range(6):
        here.send(zipped(submit(f"job-{number}")))
        here.queue.stop(f"job-{number}", True)
    here.send(zipped(submit("job-waits")))
    assert list(here.jobs) == ["job-3", "job-4", "job-5", "job-waits"]
    assert sorted(path.stem for path in here.queue.here.glob("*.zip")) == ["job-4", "job-5", "job-waits"]


def test_a_job_that_is_being_started_is_not_said_to_be_cancelled(here):
    """It is when Ray has said that it was not started; else it is stopped."""
    for id, was_started, state in (("job-a", False, "CANCELLED"), ("job-b", True, "RUNNING")):
        here.send(zipped(submit(id)))
        assert here.queue.begin(id) is not None
        assert here.queue.stop(id, False).state == "QUEUED"
        assert here.queue.begin(id) is None
        here.queue.settle(id, was_started)
        job = here.queue.job(id)
        assert (job.state, job.stopping) == (state, "checkpoint")


def test_only_what_waits_gets_another_priority(here):
    here.send(GOOD)
    here.queue.stop("job-a", True)
    with pytest.raises(job_queue.Conflict, match="job-a is CANCELLED"):
        here.queue.set_priority("job-a", 3)


def test_stop_at_once_overrules_a_checkpoint_and_not_the_other_way(here):
    here.send(GOOD)
    here.queue.begin("job-a")
    here.queue.settle("job-a", started=True)
    assert here.queue.stop("job-a", False).stopping == "checkpoint"
    assert here.queue.stop("job-a", True).stopping == "now"
    assert here.queue.stop("job-a", False).stopping == "now"


def test_a_folder_is_one_servers(tmp_path):
    folder = tmp_path / "queue"
    with (
        locked(folder),
        pytest.raises(ConfigError, match="another queue keeps its state in"),
        locked(folder),
    ):
        pass
    with locked(folder):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_the_journal_of_a_head_is_found_by_any_of_its_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MUSTER_QUEUE", raising=False)
    above = tmp_path / ".muster" / "queue"
    assert queue_folder("127.0.0.1:6379") == above / "127.0.0.1-6379"
    own = [each.address for entries in psutil.net_if_addrs().values() for each in entries]
    ip = next((ip for ip in own if ip.count(".") == 3 and not ip.startswith("127.")), None)
    if ip is None:
        pytest.skip("this machine has no address but loopback's")
    (above / f"{ip}-6379").mkdir(parents=True)
    (above / f"{ip}-6379" / "journal.jsonl").write_text("")
    assert queue_folder("127.0.0.1:6379") == above / f"{ip}-6379"
    assert queue_folder("127.0.0.1:6380") == above / "127.0.0.1-6380"
    assert queue_folder("192.0.2.99:6379") == above / "192.0.2.99-6379"
    monkeypatch.setenv("MUSTER_QUEUE", str(tmp_path / "given"))
    assert queue_folder("127.0.0.1:6379") == tmp_path / "given"


# The scheduler.


class Scripted:
    """A line to a Ray of which a test says what it answers, and when it is gone."""

    address = "127.0.0.1:6379"

    def __init__(self) -> None:
        self.connected: Hello | None = None
        self.gone = ""
        self.running: dict[str, dict] = {}
        self.calls: list[tuple[str, str]] = []
        self.lose_at = ""

    def connect(self) -> Hello:
        if self.gone:
            raise Unreachable(self.gone)
        self.connected = Hello(Path("/nowhere"), "http://127.0.0.1:8265")
        return self.connected

    def call(self, what, **arguments):
        if what == "start":
            self.running[arguments["id"]] = RUNS
        if what in ("start", "stop", "signal"):
            self.calls.append((what, arguments["id"]))
        if self.gone or what == self.lose_at:
            self.connected = None
            raise Unreachable(self.gone or "its process here has ended")
        if what == "known":
            return list(self.running)
        if what == "look":
            machine = {"id": "a", "name": "one", "address": "10.0.0.1", "free": (8, 0), "total": (8, 0)}
            jobs = {id: self.running.get(id, {"gone": True}) for id in arguments["jobs"]}
            return {"jobs": jobs, "places": [], "machines": [machine]}
        return None

    def close(self) -> None:
        self.connected = None


RUNS = {"status": "RUNNING", "ended": False, "exit_code": None, "message": "", "driver": "01"}


@pytest.fixture
def ray(tmp_path) -> Scripted:
    return Scripted()


def scheduler(tmp_path: Path, ray: Scripted) -> Scheduler:
    return Scheduler(JobQueue(tmp_path), ray)


def lost_at_a_start(tmp_path: Path, ray: Scripted) -> Scheduler:
    """Ray went away between the start of job-a and its answer."""
    Queue(tmp_path).send(GOOD)
    here = scheduler(tmp_path, ray)
    ray.lose_at = "start"
    with pytest.raises(Unreachable):
        here.tick()
    return here


def test_a_job_whose_start_was_not_answered_is_started_once(tmp_path, ray):
    """Ray is lost, and the server too, between the start and its answer."""
    here = lost_at_a_start(tmp_path, ray)
    assert here.queue.job("job-a").state == "QUEUED"
    ray.lose_at = ""
    here = scheduler(tmp_path, ray)
    assert here.queue.unsettled() == ["job-a"]
    here.tick()
    assert here.queue.job("job-a").state == "RUNNING"
    assert ray.calls == [("start", "job-a")]


def test_a_job_that_was_cancelled_while_nobody_knew_whether_it_runs_is_stopped(tmp_path, ray):
    here = lost_at_a_start(tmp_path, ray)
    ray.lose_at, ray.gone = "", "the head is gone"
    here = scheduler(tmp_path, ray)
    with pytest.raises(Unreachable):
        here.tick()
    assert here.queue.stop("job-a", False).state == "QUEUED"
    ray.gone = ""
    here.tick()
    assert (here.queue.job("job-a").state, here.queue.job("job-a").stopping) == ("RUNNING", "checkpoint")
    here.tick()
    assert ray.calls == [("start", "job-a"), ("stop", "job-a")]


def test_a_stop_is_passed_on_once_and_at_once_with_a_second_signal(tmp_path, ray):
    Queue(tmp_path).send(GOOD)
    here = scheduler(tmp_path, ray)
    here.tick()
    here.queue.stop("job-a", False)
    here.tick()
    here.tick()
    assert ray.calls[1:] == [("stop", "job-a")]
    here.queue.stop("job-a", True)
    here.tick()
    assert ray.calls[2:] == [("signal", "job-a")]


def test_jobs_of_a_head_that_is_gone_are_lost_and_the_others_start(tmp_path, ray):
    here = Queue(tmp_path)
    for id in ("job-a", "job-b"):
        here.send(zipped(submit(id, cpus=8)))
    own = scheduler(tmp_path, ray)
    own.tick()  # nobody says that it is placed yet, so that it still holds its room
    assert [job.state for job in own.queue.jobs().values()] == ["RUNNING", "QUEUED"]
    ray.connected, ray.running = None, {}  # a new head at the old address
    own.tick()
    assert [job.state for job in own.queue.jobs().values()] == ["LOST", "QUEUED"]
    own.tick()
    assert [job.state for job in own.queue.jobs().values()] == ["LOST", "RUNNING"]


def test_what_a_thread_says_of_a_ray_that_comes_and_goes(tmp_path, ray, capfd):
    here = Queue(tmp_path, Client())
    here.scheduler.link = ray
    ray.gone = "nobody there"
    seen = here.scheduler
    for _ in range(2):
        with pytest.raises(Unreachable) as error:
            seen.tick()
        seen._away(error.value)
    assert (seen.seen.reachable, seen.seen.why) == (False, "nobody there")
    [problem] = here.board.problems()
    assert (problem["what"], problem["why"]) == ("Ray does not answer", "nobody there")
    here.send(GOOD)
    here.queue._unsettled.clear()
    assert here.board.row("job-a")["outlook"]["why"] == "waits for Ray, which does not answer: nobody there"
    ray.gone = ""
    seen.tick()
    assert seen.seen.reachable
    assert here.board.problems() == []
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "muster: cannot reach Ray at 127.0.0.1:6379: nobody there",
        "muster: connected to Ray at 127.0.0.1:6379",
    ]
