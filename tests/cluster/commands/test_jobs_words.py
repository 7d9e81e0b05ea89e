"""How jobs are described: why they wait or failed, how far they are; a real cluster is in test_jobs.py."""

import io
from types import SimpleNamespace

import pytest

from cluster.commands import jobs
from cluster.commands.listing import show
from cluster.gangs.share import Node
from cluster.server.messages import Known
from cluster.server.outlook import (
    Outlook,
    gang_words,
    how_far,
    last_words,
    outlook,
    probable_starts,
    running_outlook,
    told,
    why_waiting,
)
from configs import ConfigError, from_dict, to_yaml
from trainer.record.lines import Record
from trainer.record.terminal import Console

JOB = Known(
    id="job-a", name="a", state="FINISHED", workers=1, most=3, cpus=2.0, gpus=0.0, group=1, priority=0, submitted=1.0,
    time=1.0, run_dir="/nowhere", command="true",
)  # fmt: skip


def test_output_of_a_rank_is_that_of_the_newest_attempt(tmp_path):
    """Attempts are ordered by number: the hundredth comes after the ninety-ninth."""
    (tmp_path / "logs").mkdir()
    for attempt in ("01", "99", "100"):
        (tmp_path / "logs" / f"attempt-{attempt}-rank-0002.log").write_text(attempt)
    assert list(jobs._rank_output(tmp_path, 2, False, lambda: True)) == ["100"]
    with pytest.raises(ConfigError, match="there is only rank 2"):
        list(jobs._rank_output(tmp_path, 3, False, lambda: True))


def test_a_gang_in_words():
    assert gang_words(JOB) == "1 to 3 x (2 CPU)"
    assert gang_words(JOB.changed(most=1, gpus=1.0)) == "1 x (2 CPU, 1 GPU)"
    assert gang_words(JOB.changed(most=1)) == "1 x (2 CPU)"


def test_why_each_job_waits():
    found = {
        "job-runs": JOB.changed(state="RUNNING"),
        "job-low": JOB.changed(state="QUEUED", submitted=2.0),
        "job-huge": JOB.changed(state="QUEUED", workers=9, most=9, priority=7),
        "job-high": JOB.changed(state="QUEUED", submitted=3.0, priority=5),
        "job-done": JOB,
    }
    why = why_waiting(found, [Node(4, 0)])
    assert why == {
        "job-huge": "no room even on an empty cluster: 9 x (2 CPU); waits for machines to join",
        "job-high": "waits for room for 1 to 3 x (2 CPU) beside job-runs",
        "job-low": "1 ahead of it: job-high",
    }
    del found["job-runs"]
    assert "starts in a moment" in why_waiting(found, [Node(4, 0)])["job-high"]


def test_when_jobs_probably_start():
    found = {
        "job-1": JOB.changed(id="job-1", state="RUNNING"),
        "job-2": JOB.changed(id="job-2", state="RUNNING"),
        "job-low": JOB.changed(id="job-low", state="QUEUED", submitted=2.0),
        "job-wide": JOB.changed(id="job-wide", state="QUEUED", workers=2, submitted=3.0, priority=5),
        "job-huge": JOB.changed(id="job-huge", state="QUEUED", workers=9, priority=9),
    }
    nodes = [Node(4, 0)]  # each running job holds 2 CPUs, job-wide wants 4
    assert probable_starts(found, {"job-1": 50.0, "job-2": 20.0}, nodes) == {"job-wide": 50.0}
    assert probable_starts(found, {"job-1": 50.0, "job-2": 20.0}, [Node(6, 0)]) == {"job-wide": 20.0, "job-low": 50.0}
    assert probable_starts(found, {"job-1": 50.0}, nodes) == {}  # nobody knows when job-2 ends
    assert probable_starts(found, {"job-1": 50.0}, [Node(1, 0)]) == {}
    assert probable_starts({"job-low": found["job-low"]}, {}, nodes) == {"job-low": 0.0}


CRASH = "Traceback (most recent call last):\n  File x\nRuntimeError: boom\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("step 1/2 loss\nmuster: data.path=x: no such folder\n", "data.path=x: no such folder"),
        ("muster: a key\nis wrong:\nset it\nmore\n", "a key is wrong: set it"),
        ("muster: rank 1: E: bad\n  File y\nOutput of the workers: /r/logs\n", "rank 1: E: bad"),
        ("muster: nothing is sent\n" + CRASH, "RuntimeError: boom"),
        (f"muster: Ray failed\n{CRASH}", "RuntimeError: boom"),
        ("bash: muster: command not found", "bash: muster: command not found"),
        ("muster: http://me:secret@host\n", "http://me:***@host"),
        ("muster: \x1b[31mred\n", r"\x1b[31mred"),
        ("\n \n", ""),
    ],
)
def test_the_reason_of_a_failed_job_is_its_own_message(output, said):
    assert last_words(output) == said.replace("***", last_words("muster: http://me:secret@host")[10:-5])
    assert "secret" not in last_words(output)


def test_how_far_a_run_is(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(from_dict({"train": {"steps": 50}})))
    assert how_far(JOB.changed(run_dir=str(tmp_path))) == (0, 50, None, "")
    record = Record(tmp_path, 1)
    record.event("waiting", reason="for room on the cluster: needs 2 processes")
    assert how_far(JOB.changed(run_dir=str(tmp_path))).why == "waits for room on the cluster: needs 2 processes"
    record.event("attempt_started")
    for step in range(1, 11):
        record.metrics({"step": step, "loss": 1.0}, at=1000.0 + 3 * step)
    assert how_far(JOB.changed(run_dir=str(tmp_path))) == (10, 50, pytest.approx(120.0), "")


def test_a_run_whose_folder_is_elsewhere_is_known_by_its_output():
    output = (
        "attempt 1  1 process on cpu\nstep 5/20  loss 3.1  5,000 tok/s  eta 1 h 12 min\n"
        "step 7/20  loss 3  eta 12 s  skipped\n"
    )
    assert told(output)[:3] == (7, 20, 12.0)
    assert told(output.partition("step 7")[0])[:3] == (5, 20, 4320.0)
    assert told("nothing yet\n")[0] is None
    running = {"job-a": JOB.changed(state="RUNNING", stopping="checkpoint")}
    [seen] = outlook(running, [], lambda job: running_outlook(job, lambda id: output)).values()
    assert seen == (7, 20, 12.0, "stops after a checkpoint")
    [seen] = outlook({"job-a": JOB.changed(state="FAILED", reason="no such file")}, [], lambda job: Outlook()).values()
    assert seen.why == "no such file"


LONG = "job-a-name-of-a-run-that-somebody-thought-about-for-long-0123456789-3f9a1c"


@pytest.mark.parametrize("width", [20, 60, 80, 300])
@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_whole_however_narrow_the_terminal(width, terminal):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal)
    show(console, ("job", "state", "step", "eta", "why"), [[LONG, "FAILED", "1/2", "", "because " * 20]])
    assert LONG in out.getvalue()
    assert out.getvalue().split().count("because") == 20
    assert ("eta" in out.getvalue()) is False  # no job has one
    if not terminal:
        assert len(out.getvalue().splitlines()) == 2


def test_a_job_is_also_known_by_its_runs_name():
    found = {
        "job-1": JOB.changed(id="job-1", state="RUNNING"),
        "job-2": JOB.changed(id="job-2", submitted=9.0),
        "job-3": JOB.changed(id="job-3", name="b", submitted=10.0),
    }
    assert jobs._known(found, "a").id == "job-1"
    assert jobs._known(found, "job-2").id == "job-2"
    with pytest.raises(ConfigError, match="no job or run 'c'"):
        jobs._known(found, "c")


def test_logs_of_a_run_by_name_and_by_its_id(muster, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "one"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(from_dict({})))
    (run_dir / "tracking.json").write_text('{"run_id": "0123456789abcdef0123456789abcdef"}')
    record = Record(run_dir, 1)
    record.event("attempt_started")
    record.event("attempt_ended", status="FINISHED", step=1)
    (run_dir / "logs" / "attempt-01-rank-0000.log").write_text("hello\n")
    for named in ("one", str(run_dir), "0123456789abcdef0123456789abcdef", "01234567"):
        assert muster("logs", named, "--root", str(tmp_path), "--follow") == (0, "hello\n", "")
    code, _, err = muster("logs", "one", "--root", str(tmp_path), "--rank", "5")
    assert (code, "no output of rank 5" in err) == (2, True)
    code, _, err = muster("logs", "oen", "--root", str(tmp_path))
    assert (code, len(err.splitlines())) == (2, 2)
    assert "did you mean one?" in err


def test_watch_shows_what_is_new_and_outlives_a_silent_cluster(capsys, monkeypatch):
    failed = JOB.changed(state="FAILED", reason="why"), Outlook(why="why")
    looks = [{"job-a": (JOB, Outlook())}, {"job-a": (JOB, Outlook())}, ConfigError("refused"), {"job-a": failed}]

    def look():
        if not looks:
            raise KeyboardInterrupt
        found = looks.pop(0)
        if isinstance(found, ConfigError):
            raise found
        return found

    monkeypatch.setattr(jobs, "api_url", lambda address: address)
    monkeypatch.setattr(jobs, "Cluster", lambda address: SimpleNamespace(url="http://head", board=look))
    monkeypatch.setattr(jobs, "WATCH_EVERY", 0.0)
    monkeypatch.setattr(jobs, "ago", lambda then: "1 h ago")
    with pytest.raises(KeyboardInterrupt):
        jobs.jobs("http://head", watch=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["job", "state"], ["job-a", "FINISHED"], ["http://head", "does"], ["job", "state"], ["job-a", "FAILED"],
    ]  # fmt: skip
    assert lines[-1].endswith("  a  why")


def test_a_run_is_followed_while_it_may_go_on(tmp_path, monkeypatch):
    assert jobs._has_ended(tmp_path)  # it was never launched
    record = Record(tmp_path, 0)
    record.event("resolved")
    assert not jobs._has_ended(tmp_path)
    record = Record(tmp_path, 1)
    record.event("attempt_started")
    assert not jobs._has_ended(tmp_path)
    record.event("attempt_ended", status="FAILED", step=1)
    assert not jobs._has_ended(tmp_path)  # it may be started again
    monkeypatch.setattr(jobs, "RESTARTS", 0.0)
    assert jobs._has_ended(tmp_path)
