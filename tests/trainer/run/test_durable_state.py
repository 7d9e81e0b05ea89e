"""run.json: what a resume depends on survives a crash that loses the end of the logs; older runs resume without it."""

import json
import signal

import pytest
from faults import raise_loss, spike_and_kill
from support import tiny, train_in_process

from configs import ConfigError, load
from trainer.checkpoint import manifest
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics
from trainer.run.durable_state import RUN, DurableState, change_durable_state, read_durable_state
from trainer.run.folder import attempts, prepare_run

STEPS, SPIKE, KILLED = 14, 12, 13
"""A checkpoint at step 10, a spike at step 12, from which the run goes back to step 10 with another cursor."""


def make(root, data, name="run", **sections):
    train = {"steps": STEPS, "spike": {"window": 8, "action": "rollback"}, "micro_batch": 2}
    settings = {"run": {"name": name, "root": str(root)}, "data": {"path": str(data)}, "model": {"dropout": 0.1}}
    return prepare_run(tiny(**settings, checkpoint={"every": 5}, train=train | sections))


def weights(run_dir):
    reader = Reader(manifest.folder(run_dir, STEPS))
    return {(k, n): reader.read(k, n).numpy().tobytes() for k in reader.states for n in reader.manifest.shapes[k]}


def losses(run_dir):
    return {record["step"]: (record["loss"], record["grad_norm"], record["sequences"]) for record in
            read_metrics(run_dir) if "loss" in record}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_data):
    run_dir = make(tmp_path_factory.mktemp("uninterrupted"), tiny_data)
    assert train_in_process(run_dir, raise_loss, SPIKE) == 0
    return run_dir


@pytest.mark.few(1)
@pytest.mark.parametrize("lost", ["nothing", "the tail of the logs", "run.json"])
def test_killed_between_a_rollback_and_the_next_checkpoint(tmp_path, tiny_data, uninterrupted, lost):
    """ "nothing": the logs are whole; "run.json": a run of a version that had none."""
    run_dir = make(tmp_path, tiny_data)
    assert train_in_process(run_dir, spike_and_kill, SPIKE, KILLED) == -signal.SIGKILL
    assert manifest.committed(run_dir) == [5, 10]
    if lost == "the tail of the logs":
        lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
        [back] = [number for number, line in enumerate(lines) if json.loads(line)["event"] == "rollback"]
        (run_dir / "events.jsonl").write_text("".join(lines[:back]))
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < SPIKE))
    if lost == "run.json":
        (run_dir / RUN).unlink()
    assert train_in_process(run_dir) == 0
    resumed = next(event for event in read_events(run_dir) if event["event"] == "resumed")
    assert (resumed["step"], resumed["cursor"]) == (10, 48)
    assert losses(run_dir) == losses(uninterrupted)
    assert weights(run_dir) == weights(uninterrupted)
    state = read_durable_state(run_dir)
    assert (state.attempt, [each.cursor for each in state.rollbacks]) == (2, [48])
    assert [event["attempt"] for event in read_events(run_dir) if event["event"] == "attempt_started"] == [1, 2]


def test_a_fork_whose_log_is_lost_begins_where_it_was_forked(tmp_path, tiny_data, uninterrupted):
    config = load(uninterrupted / "config.yaml", [f"train.steps={STEPS + 1}"])
    forked = prepare_run(config, fork="forked")
    (forked / "events.jsonl").unlink()
    assert train_in_process(forked) == 0
    assert list(losses(forked)) == [STEPS + 1]


def test_attempts_are_counted_where_the_log_is_lost(tmp_path, tiny_data):
    run_dir = make(tmp_path, tiny_data, steps=1)
    assert train_in_process(run_dir) == 0
    (run_dir / "events.jsonl").write_text("")
    assert attempts(run_dir) == 1
    make(tmp_path, tiny_data, steps=2)
    assert train_in_process(run_dir) == 0
    assert [event["attempt"] for event in read_events(run_dir) if event["event"] == "attempt_started"] == [2]


def test_other_data_are_refused_where_the_log_is_lost(tmp_path, tiny_data):
    run_dir = make(tmp_path, tiny_data, steps=1)
    assert train_in_process(run_dir) == 0
    (run_dir / "events.jsonl").write_text("")
    change_durable_state(run_dir, inputs=["0" * 64, "1" * 64])
    with pytest.raises(ConfigError, match=r"data\.path was .*sha256 000000000000"):
        make(tmp_path, tiny_data, steps=2)


def test_which_rollback_applies():
    backs = [{"to_step": 10, "cursor": 48, "rollbacks": 1}, {"to_step": 20, "cursor": 90, "rollbacks": 2},
             {"to_step": 10, "cursor": 99, "rollbacks": 3}]  # fmt: skip
    state = DurableState.model_validate({"rollbacks": backs})
    assert state.rollback_from(10, 0).cursor == 99
    assert state.rollback_from(20, 1).cursor == 90
    assert state.rollback_from(20, 2) is None, "the checkpoint was written after it"
    assert state.rollback_from(15, 0) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"attempt": -1}', '{"attempt": "1"}', '{"rollbacks": [{}]}', '{"x": 1}']
)
def test_a_damaged_file_is_refused_in_one_message(tmp_path, content):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json is damaged \(.+\): restore it"):
        read_durable_state(tmp_path)


def test_a_failed_change_leaves_the_old_file(tmp_path):
    change_durable_state(tmp_path, attempt=3)
    with pytest.raises(ValueError, match="attempt"):
        change_durable_state(tmp_path, attempt=-1)
    assert read_durable_state(tmp_path) == DurableState(attempt=3)
    assert [path.name for path in tmp_path.iterdir()] == [RUN]
