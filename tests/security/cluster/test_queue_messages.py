"""Whatever reaches the queue is taken or refused with its reason, and the queue goes on."""

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dashboards import TOKEN, serving
from hostile_messages import GOOD, HOSTILE, JOB, submit, zipped
from hypothesis import given, settings
from hypothesis import strategies as some
from muster_cluster import ROOT
from no_hang import ends
from queues import Client

from cluster.gangs.share import Node, Share
from cluster.server.jobs import job_queue
from cluster.server.messages import MOST_WORKERS, BadMessage, Conflict, Known, NoJob, Submit
from cluster.server.pack import read_message
from cluster.server.submit import job_of
from cluster.server.waiting import Gang, Waiting, fold, gang_of, place, startable
from configs import ConfigError

quick = settings(max_examples=300, deadline=None, derandomize=True, database=None)

EACH_BOUNDED = """
import json, resource, sys
from hostile_messages import GOOD, HOSTILE
from cluster.server.pack import BadMessage, read_message
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))  # ends what does not end
refused = []
for name, make in HOSTILE.items():
    content = make()
    try:
        read_message(content)
    except BadMessage:
        refused.append(name)
# Not getrusage: it starts with the peak of the process that started this one.
hwm = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"refused": refused, "mb": int(hwm.split()[1]) / 1024}))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_is_refused_with_its_reason(name):
    with pytest.raises(BadMessage) as error:
        read_message(HOSTILE[name]())
    assert 0 < len(str(error.value)) < 400
    assert str(error.value).isprintable()


def test_a_good_message_is_taken():
    assert read_message(GOOD).model_dump() == submit()


def test_a_refusal_takes_little_time_and_memory():
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers' / 'hostile'}"
    done = subprocess.run(
        [sys.executable, "-c", EACH_BOUNDED], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["refused"] == list(HOSTILE)
    assert found["mb"] < 500


VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20)
    | some.sampled_from([10**12, -1, 0, 1, 64, 0.5, "submit", "retry", "stop", "job-a", "/r", "true"]),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
WORKERS = some.integers(1, 300) | some.integers(1, MOST_WORKERS)
PARTS = some.sampled_from([0, 0.0001, 0.01, 0.33, 1, 2, 7.5, 100_000])
PROPER = some.fixed_dictionaries(
    {key: some.just(value) for key, value in JOB.items()}
    | {"workers": WORKERS, "most": WORKERS, "group": WORKERS, "cpus": PARTS, "gpus": PARTS,
       "priority": some.integers(-(2**31), 2**31 - 1)}
)  # fmt: skip
SIZES = some.sampled_from([0.0, 0.5, 1.0, 8.0, 1e6, -1.0]), some.sampled_from([0.0, 0.5, 8.0])
NODES = some.lists(some.builds(Node, *SIZES), max_size=8)


def read_or_refuse(content: bytes) -> Submit | None:
    """Nothing else comes of a message."""
    try:
        return read_message(content)
    except BadMessage as error:
        if not str(error):
            raise
        return None


@quick
@given(some.data())
def test_any_message_is_taken_or_refused(data):
    """And what is taken never stops the one who schedules."""
    job = data.draw(PROPER)
    for key in data.draw(some.lists(some.sampled_from(sorted(job)), max_size=2)):
        job[key] = data.draw(VALUES)
    message = {"do": "submit", "id": "job-a", "job": job} | data.draw(some.dictionaries(
        some.sampled_from(["do", "id", "job", "new", "now", "x"]), VALUES, max_size=2
    ))  # fmt: skip
    taken = read_or_refuse(zipped(message))
    if taken is not None:
        waiting = Waiting(taken.id, gang_of(taken.job), taken.job.priority, 0.0)
        free, total = data.draw(NODES), data.draw(NODES)
        total = (total + [Node(8, 8)] * len(free))[: len(free)]
        assert startable([waiting], [waiting.gang], free, total) in ([], ["job-a"])
        left = place(waiting.gang, free, total)
        assert left is None or len(left) == len(free)


@quick
@given(some.data())
def test_any_damage_to_a_zip_is_taken_or_refused(data):
    changed = bytearray(GOOD)
    for _ in range(data.draw(some.integers(1, 4))):
        at, how = data.draw(some.integers(0, len(changed))), data.draw(some.sampled_from(["put", "cut", "add"]))
        value = data.draw(some.binary(min_size=1, max_size=8))
        changed[at : at + (0 if how == "add" else len(value))] = b"" if how == "cut" else value
    taken = read_or_refuse(bytes(changed))
    assert taken is None or taken.id.startswith("job-")


FIRST = {"id": "job-a", **JOB, "state": "QUEUED", "submitted": 1.0, "time": 1.0}


def line(**changes: object) -> str:
    return json.dumps({"id": "job-a"} | changes)


@pytest.mark.parametrize(
    "bad",
    [
        "", "noise", '{"id": ', '{"id": "job-a"', '{"id": []}', '{"id": {}}', '{"id": 1}', '{"id": null}', "[]",
        '{"id": "job-a", "workers": ' + "9" * 5000 + "}", '{"id": ' + "[" * 10**5, line(state="W"), line(state=None),
        line(workers=0), line(workers=10**12), line(workers=True), line(cpus=math.nan), line(cpus=0, gpus=0),
        line(submitted=math.inf), line(submitted="now"), line(time=None), line(reason="x" * 10**5), line(priority=True),
        line(run_dir="r"), line(command="true\nfalse"), line(group=0), line(exit_code=True), line(sha256="0"),
        line(user="root"), json.dumps({"id": "job-b", "state": "RUNNING", "time": 1.0}),
        json.dumps(FIRST | {"id": "../x"}), json.dumps(FIRST | {"id": "muster-queue-1"}),
    ],
)  # fmt: skip
def test_a_bad_line_of_the_journal_is_skipped(bad):
    skipped: list[str] = []
    assert fold([bad, json.dumps(FIRST), bad, line(state="RUNNING", time=2.0), bad], skipped.append) == {
        "job-a": Known(**FIRST | {"state": "RUNNING", "time": 2.0})
    }
    assert skipped == [bad] * 3


@quick
@given(some.lists(some.dictionaries(some.sampled_from([*FIRST, "x"]), VALUES, max_size=4), max_size=4), some.randoms())
def test_any_line_of_the_journal_leaves_proper_jobs(changes, chance: random.Random):
    lines = [json.dumps(FIRST), *(json.dumps({"id": "job-a"} | change) for change in changes)]
    lines += [text[: chance.randrange(len(text))] for text in lines]
    jobs = fold(lines)
    for job in jobs.values():
        startable([Waiting(job.id, gang_of(job), job.priority, job.submitted)], [], [Node(8, 8)], [Node(8, 8)])
    assert fold(json.dumps(job.entry()) for job in jobs.values()) == jobs


def test_many_workers_on_many_machines_are_placed_in_no_time():
    nodes = [Node(96.0 + index % 5, 8.0) for index in range(1000)]
    waiting = [Waiting(f"job-{index}", Gang(MOST_WORKERS - index, Share(1, 1), 8), 0, 0) for index in range(1000)]
    with ends():
        assert startable(waiting, [], nodes, nodes) == []
        assert startable([Waiting("job-a", Gang(90_000, Share(1, 0), 8), 0, 0)], [], nodes, nodes) == ["job-a"]


# A server's queue, without Ray.


def test_each_message_on_its_own(queue):
    here = queue.make()
    with serving([], board=here.board) as server:

        def send(content: bytes):
            shown = {"authorization": f"Bearer {TOKEN}", "content_type": "application/zip"}
            return server.ask("POST", "/api/jobs", content, **shown)

        for name, make in HOSTILE.items():
            answer = send(make())
            assert (name, answer.status) == (name, 400)
            assert 0 < len(answer.json["error"]) < 400
        assert send(GOOD).status == 200
        assert [(job.id, job.state) for job in here.jobs.values()] == [("job-a", "QUEUED")]
        assert sorted(path.name for path in queue.folder.iterdir()) == ["job-a.zip", "journal.jsonl"]
    assert queue.make().jobs == here.jobs


def test_what_cannot_be_done_is_refused(queue):
    here = queue.make()
    here.send(GOOD)
    here.tick()
    for do in (lambda: here.queue.stop("job-b", True), lambda: here.queue.retry("job-b", "job-c")):
        with pytest.raises(NoJob, match="there is no job job-b"):
            do()
    with pytest.raises(Conflict, match="job-a is QUEUED: stop it first"):
        here.queue.retry("job-a", "job-c")
    with pytest.raises(Conflict, match="job-a is the id of another job"):
        here.send(zipped(submit(command="something else")))
    assert list(here.jobs) == ["job-a"]


def test_the_same_twice_is_done_once(queue):
    here = queue.make()
    assert here.send(GOOD) == here.send(GOOD)
    first = here.queue.stop("job-a", False)
    assert first.state == "CANCELLED"
    assert here.queue.stop("job-a", False) == first
    again = here.queue.retry("job-a", "job-b")
    assert here.queue.retry("job-a", "job-b") == again
    assert here.queue.set_priority("job-b", 7) == here.queue.set_priority("job-b", 7)
    lines = (queue.folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["job-a", "job-a", "job-b", "job-b"]
    assert queue.make().jobs == here.jobs
    assert here.jobs["job-b"].priority == 7


def test_a_queue_has_an_end(queue, monkeypatch):
    monkeypatch.setattr(job_queue, "MOST_ACTIVE", 2)
    here = queue.make()
    for index in range(2):
        here.send(zipped(submit(f"job-{index}")))
    with pytest.raises(Conflict, match="2 jobs are already waiting or running"):
        here.send(zipped(submit("job-2")))
    assert list(here.jobs) == ["job-0", "job-1"]


class BadClient(Client):
    """A job API that raises what nobody expects of it."""

    def submit_job(self, **_):
        raise TypeError("an \x1b[31munexpected\n answer")

    def get_job_info(self, id):
        raise KeyError(id)


def test_a_job_that_cannot_be_handled_fails_alone(queue, monkeypatch):
    from ray.experimental import internal_kv

    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda *_: None)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda *_: None)
    queue.machines.append(queue.room)
    here = queue.make(BadClient())
    for id in ("job-a", "job-b"):
        here.send(zipped(submit(id)))
    here.tick()
    assert [job.state for job in here.jobs.values()] == ["FAILED", "FAILED"]
    assert here.jobs["job-a"].reason == r"could not be started: an \x1b[31munexpected answer"
    here.queue._note("job-a", state="RUNNING")
    here.tick()
    assert here.jobs["job-a"].state == "FAILED"
    assert "KeyError" in here.jobs["job-a"].reason
    assert queue.make().jobs == here.jobs


def test_a_job_api_that_does_not_answer_ends_no_job(queue):
    def silent(id):
        raise ConnectionError("nobody there")

    here = queue.make(SimpleNamespace(get_job_info=silent, list_jobs=list))
    here.send(GOOD)
    here.queue._note("job-a", state="RUNNING")
    here.tick()
    assert here.jobs["job-a"].state == "RUNNING"


@pytest.mark.parametrize("thousands", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_million_lines_of_a_journal(queue, capsys, thousands):
    """Torn, endless and foreign ones among them: they are named once, and the newest jobs are kept."""
    with (queue.folder / "journal.jsonl").open("w") as file:
        file.write(json.dumps(FIRST) + "\n" + "x" * (3 * job_queue.LONGEST_LINE) + "\n" + '{"id": "job-a", "st\n')
        for index in range(250 * thousands):
            text = json.dumps(FIRST | {"id": f"job-{index}", "state": "FAILED"})
            file.write(f"{text}\n\n" + '{"id": "job-a", "state": "RUNNING", "time": 2.0}\nnoise\n')
    here = queue.make()
    assert len(here.jobs) == 1 + job_queue.KEPT_JOBS
    assert here.jobs["job-a"].state == "RUNNING"
    [said] = capsys.readouterr().out.splitlines()
    assert said.startswith(f"skipped {500 * thousands + 2:,} lines of {queue.folder / 'journal.jsonl'}")
    assert (queue.folder / "journal.jsonl").stat().st_size < 2e6


# A live one.


@pytest.mark.ray
def test_a_live_queue_goes_on(live, live_queue):
    names = [name for name in HOSTILE if name not in ("bomb of many", "many files", "endless directory")][::4]
    for name in [*names, "empty"]:
        with pytest.raises(ConfigError, match=r"the queue of .* refused it: "):
            live_queue.send(HOSTILE[name]())
    live_queue.send(zipped(submit("job-live"), {"work/sent.txt": b"as sent"}))
    assert live_queue.ended("job-live") == "FINISHED"
    assert "as sent" in live.muster("logs", "job-live")


@pytest.mark.slow
@pytest.mark.ray
def test_a_live_queue_starts_again_from_a_damaged_journal(live, live_queue):
    [journal] = Path(live.runs.parent).glob("queue/journal.jsonl")
    before = live.muster("jobs", "--json")
    server = live.server_process()
    with journal.open("a") as file:
        file.write('{"id": "job-live", "workers": 0}\n{"id": {}}\n' + json.dumps(FIRST | {"id": "job-x", "group": 0}))
    server.send_signal(signal.SIGKILL)
    live_queue.send(zipped(submit("job-again", command="true")))
    assert live_queue.ended("job-again") == "FINISHED"
    ids = [job["id"] for job in json.loads(before)]
    assert [job["id"] for job in json.loads(live.muster("jobs", "--json"))] == [*ids, "job-again"]


@pytest.mark.ray
def test_who_asks_for_what_is_refused_is_told(live):
    with live.client() as cluster, pytest.raises(ConfigError, match=r"the queue of .* refused it: there is no job"):
        cluster.retry("job-none", "job-new")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            "parallel.dp=1000000",
            "the run asks for 1,000,000 processes, and a job has at most 100000: lower parallel.dp",
        ),
        ("parallel.dp=100000000000", "parallel.dp=100000000000: should be less than or equal to 1048576"),
        ("cluster.workers=[2, 100000000000]", "cluster.workers.1=100000000000: should be less than or equal to 16384"),
    ],
)
def test_more_processes_than_a_job_has_are_refused_before_anything_is_sent(muster, tmp_path, tiny_data, asked, why):
    (tmp_path / "run.yaml").write_text(f"run: {{root: {tmp_path}}}\ndata: {{path: {tiny_data}}}\n")
    code, _, err = muster("submit", str(tmp_path / "run.yaml"), asked, "train.global_batch=1000000", "--queue")
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith(f"{why}\n")


def test_a_job_that_the_queue_would_refuse_is_not_sent():
    with pytest.raises(ConfigError, match=r"the queue would refuse this job: priority: should be less than 2147483648"):
        job_of(**JOB | {"priority": 10**30})
