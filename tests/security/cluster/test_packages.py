"""What a job runs is what was sent: packages are bounded before anyone inflates them, and checked before each start."""

import hashlib
import json
import re

import pytest
from hostile_messages import GOOD, submit, zipped
from queues import Client

from cluster.server import pack
from cluster.server.messages import BadMessage

FAILING = zipped(submit("job-p", command="sh tool.sh"), {"work/tool.sh": b"echo as sent; exit 3\n"})


@pytest.fixture
def store(monkeypatch):
    """What Ray is given to run: by its name, what lies in Ray's store."""
    from ray.experimental import internal_kv

    found: dict[str, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_put", found.__setitem__)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda name: found.pop(name.decode(), None))
    return found


def test_a_job_runs_its_own_copy_of_what_was_sent(queue, store):
    queue.machines.append(queue.room)
    here = queue.make(client := Client())
    here.send(GOOD)
    here.tick()
    [job] = client.started
    assert job["runtime_env"]["working_dir"] == "gcs://job-a.zip"
    assert job["entrypoint"] == "cd work && exec cat sent.txt"
    assert store == {"gcs://job-a.zip": GOOD}
    assert here.jobs["job-a"].sha256 == hashlib.sha256(GOOD).hexdigest()
    here.tick()
    here.queue.retry("job-a", "job-b")
    here.tick()
    assert store["gcs://job-b.zip"] == GOOD  # under a name of its own, never what an earlier job has left unpacked


def test_a_run_is_told_when_it_was_submitted(queue, store):
    """Also the job of an older client, whose command has the overrides."""
    queue.machines.append(queue.room)
    here = queue.make(client := Client())
    here.send(zipped(submit(command="muster train moe.yaml run.name=a")))
    here.tick()
    when = here.jobs["job-a"].submitted
    assert client.started[0]["entrypoint"] == f"cd work && exec muster train moe.yaml run.name=a --submitted={when}"
    assert client.started[0]["runtime_env"]["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}


def swap(path):
    path.write_bytes(zipped(submit(), {"work/sent.txt": b"swapped"}))


def link(path):
    swap(path.with_name("other.zip"))
    path.unlink()
    path.symlink_to("other.zip")


def forget(path):
    journal = path.with_name("journal.jsonl")
    jobs = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps({k: v for k, v in job.items() if k != "sha256"}) + "\n" for job in jobs))


CHANGES = {
    "swapped": (swap, "its SHA-256 differs"),
    "cut": (lambda path: path.write_bytes(GOOD[:-1]), "its SHA-256 differs"),
    "gone": (lambda path: path.unlink(), "is no longer kept"),
    "a link": (link, "is no longer kept"),
    "no digest": (forget, "its SHA-256 differs"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_package_is_not_started_after_a_restart(queue, store, change):
    here = queue.make()
    here.send(GOOD)
    here.tick()
    do, words = CHANGES[change]
    do(queue.folder / "job-a.zip")
    queue.machines.append(queue.room)
    here = queue.make(client := Client())
    here.tick()
    assert here.jobs["job-a"].state == "FAILED"
    assert words in here.jobs["job-a"].reason
    assert (client.started, store) == ([], {})


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_package_is_not_retried(queue, store, change):
    queue.machines.append(queue.room)
    here = queue.make(client := Client())
    here.send(GOOD)
    here.tick()
    here.tick()
    assert here.jobs["job-a"].state == "LOST"
    do, words = CHANGES[change]
    do(queue.folder / "job-a.zip")
    here = queue.make(client)
    with pytest.raises(BadMessage, match=re.escape(words)):
        here.queue.retry("job-a", "job-b")
    here.tick()
    assert list(here.jobs) == ["job-a"]
    assert len(client.started) == 1


def test_a_package_is_never_written_through_a_link(queue, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "file"
    other.write_text("kept")
    (queue.folder / "job-a.zip").symlink_to(other)
    (queue.folder / "journal.jsonl").symlink_to(other)
    queue.make().send(GOOD)
    assert other.read_text() == "kept"
    assert (queue.folder / "job-a.zip").read_bytes() == GOOD
    assert not (queue.folder / "journal.jsonl").is_symlink()


def test_what_is_packed_is_taken_up_to_the_limit(tmp_path, monkeypatch):
    """Both sides count alike."""
    monkeypatch.setattr(pack, "LIMIT", 20_000)
    (tmp_path / "zeros").write_bytes(bytes(19_000))
    message = json.dumps(submit())

    def packed() -> bytes:
        pack.write_zip(target := tmp_path.parent / f"{tmp_path.name}.zip", tmp_path, pack.files(tmp_path), message)
        return target.read_bytes()

    assert pack.read_message(packed()).model_dump() == submit()
    (tmp_path / "zeros").write_bytes(bytes(20_001))
    with pytest.raises(BadMessage, match=r"it unpacks to .* and the limit is 20 kB"):
        pack.read_message(packed())


# A live one.


@pytest.mark.slow
@pytest.mark.ray
def test_only_what_was_sent_runs_at_a_retry(live, live_queue):
    live_queue.send(FAILING)
    assert live_queue.ended("job-p") == "FAILED"
    assert "as sent\n" in live.muster("logs", "job-p")
    unpacked = list(live.folder.glob(f"ray/session_2*/runtime_resources/working_dir_files/*/{pack.TOP}/tool.sh"))
    assert unpacked
    for path in unpacked:
        path.write_text("echo swapped; exit 3\n")
    again = live.muster("retry", "job-p").splitlines()[0]
    assert live_queue.ended(again) == "FAILED"
    output = live.muster("logs", again)
    assert "as sent\n" in output
    assert "swapped" not in output
    swap(live.runs.parent / "queue" / "job-p.zip")
    out = live.muster("retry", "job-p", code=2)
    assert "refused it: the package of job-p is not what was sent (its SHA-256 differs): submit it again" in out
    assert len(out.splitlines()) == 1


@pytest.mark.ray
def test_the_queues_folder_is_its_owners(live):
    folder = live.runs.parent / "queue"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}
