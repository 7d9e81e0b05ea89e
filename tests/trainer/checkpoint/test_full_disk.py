"""A disk that really is full: the run says so, keeps its last good checkpoint, and ends as if nothing had happened."""

import os
import subprocess

import pytest
import torch
from faults import fill, full_disk, small_files, trained
from support import tiny
from teams import in_team

from configs import ConfigError
from configs.sections.train import ProfileConfig
from trainer.checkpoint import manifest
from trainer.checkpoint.store import Reader
from trainer.observe.tracing import Profiler
from trainer.record.lines import Record, read_events, read_metrics
from trainer.run.folder import is_finished, prepare_run
from trainer.tracking.start import read_state, write_state

STEPS = 12


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # files of the record are still open


def make(root, data):
    return prepare_run(
        tiny(
            run={"name": "run", "root": str(root)},
            data={"path": str(data)},
            train={"steps": STEPS, "micro_batch": 1, "eval_every": 3, "sample_tokens": 4},
            checkpoint={"every": 2, "keep": 2},
            parallel={"dp": 2, "zero_stage": 1},
            cluster={"timeout": 60},
        )
    )


def final_state(run_dir):
    reader = Reader(manifest.folder(run_dir, STEPS))
    return {(k, n): reader.read(k, n).numpy().tobytes() for k in reader.states for n in reader.manifest.shapes[k]}


def losses(run_dir):
    return [(m["step"], m.get("loss"), m.get("eval_loss"), m.get("grad_norm")) for m in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data):
    run_dir = make(tmp_path_factory.mktemp("clean"), tiny_data)
    assert in_team(2, trained, run_dir) == ["FINISHED"] * 2
    assert os.path.getsize(manifest.folder(run_dir, STEPS) / "rank-00001.safetensors") > 65536
    return run_dir


def assert_went_on(run_dir, clean, reason):
    events = read_events(run_dir)
    failed = [event for event in events if event["event"] == "checkpoint_failed"]
    assert [(event["step"], event["last_good"]) for event in failed] == [(6, 4), (8, 4)]
    assert all(reason in event["reason"] for event in failed), failed
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 4, 10, 12]
    assert not list((run_dir / "checkpoints").glob("step-*[68]"))
    assert losses(run_dir) == losses(clean)
    assert final_state(run_dir) == final_state(clean)


@pytest.mark.slow
def test_a_full_disk_does_not_stop_training(disk, tiny_data, clean):
    run_dir = make(disk, tiny_data)
    assert in_team(2, trained, run_dir, full_disk, (0,), disk, 5, 9) == ["FINISHED"] * 2
    assert_went_on(run_dir, clean, "rank 0 could not write its shard")
    unwritten = [event["file"] for event in read_events(run_dir) if event["event"] == "not_written"]
    assert "step-00000006" in unwritten


@pytest.mark.slow
def test_rank_0_names_the_rank_that_cannot_write(tmp_path, tiny_data, clean):
    run_dir = make(tmp_path, tiny_data)
    assert in_team(2, trained, run_dir, small_files, (1,), 65536, 5, 9) == ["FINISHED"] * 2
    assert_went_on(run_dir, clean, "rank 1 could not write its shard: ")


@pytest.mark.slow
def test_a_run_whose_disk_stays_full_is_finished_by_the_next_attempt(disk, tiny_data, clean):
    run_dir = make(disk, tiny_data)
    told = in_team(2, trained, run_dir, full_disk, (0,), disk, 9, STEPS)
    assert all("the last checkpoint could not be written" in each and "rank 0" in each for each in told)
    assert not is_finished(run_dir)
    assert manifest.committed(run_dir) == [6, 8]
    (disk / "ballast").unlink()
    assert in_team(2, trained, run_dir) == ["FINISHED"] * 2
    assert losses(run_dir) == losses(clean)
    assert final_state(run_dir) == final_state(clean)


def test_the_record_waits_for_free_space_and_loses_nothing(disk, capsys):
    record = Record(disk, 1)
    fill(disk / "ballast")
    for step in range(1, 101):
        record.metrics({"step": step, "loss": 1 / step, "text": "x" * 100})
        if step == 60:
            (disk / "ballast").unlink()
    assert [(m["step"], m["loss"]) for m in read_metrics(disk)] == [(step, 1 / step) for step in range(1, 101)]
    assert (
        capsys.readouterr().err
        == f"{disk}/metrics.jsonl: No space left on device; lines are kept in memory until there is room\n"
    )
    record.close()
    assert capsys.readouterr().err == ""


def test_what_could_not_be_written_is_reported_at_the_end(disk, capsys):
    record = Record(disk, 1)
    fill(disk / "ballast")
    record.event("attempt_ended", status="FINISHED")
    record.close()
    err = capsys.readouterr().err
    assert "the disk is full; its last 1 line is lost" in err
    assert '"event": "attempt_ended"' in err


def test_a_disk_that_is_already_full_gives_one_message(disk, tiny_data):
    fill(disk / "ballast")
    with pytest.raises(
        ConfigError, match=r"^\S+: cannot be written \(No space left on device\): make room, or .*run\.root$"
    ):
        make(disk, tiny_data)
    (disk / "ballast").unlink()
    run_dir = make(disk, tiny_data)
    assert not list(run_dir.glob(".config*"))


def test_an_unwritable_root_gives_one_message(tmp_path, tiny_data):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot be written \(Not a directory\): choose .*run\.root$"):
        make(tmp_path / "file", tiny_data)


def test_a_profile_that_does_not_fit_is_an_event(disk, tiny_data):
    profiler, record = Profiler(disk, ProfileConfig(start=1, steps=1), enabled=True), Record(disk, 1)
    profiler.before(1)
    torch.ones(8) @ torch.ones(8)
    fill(disk / "ballast")
    profiler.after(1, record)
    (disk / "ballast").unlink()
    record.close()
    [event] = read_events(disk)
    assert (event["event"], event["file"]) == ("not_written", "steps-1-1")
    assert "No space left on device" in event["reason"]


def test_what_was_sent_is_recorded_once_there_is_free_space(disk, capsys):
    write_state(disk, {"offset": 1})
    fill(disk / "ballast")
    write_state(disk, {"offset": 2, "error": "x" * 10_000})
    assert read_state(disk) == {"offset": 1}
    assert capsys.readouterr().err == f"{disk}/tracking.json: No space left on device\n"
    (disk / "ballast").unlink()
    write_state(disk, {"offset": 3})
    assert read_state(disk) == {"offset": 3}
    assert sorted(path.name for path in disk.iterdir()) == ["tracking.json"]
