"""What a run reads beside its checkpoints when it goes on: of other types than ours, it is left out or refused."""

import contextlib
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import pytest
from support import tiny, train_in_process

from cluster.sweep.results.score import PREDICTIONS, score_runs
from cluster.sweep.train.progress import PLAN, read_plan
from configs import ConfigError
from trainer.checkpoint.cadence import Cadence
from trainer.checkpoint.manifest import CheckpointError, folder
from trainer.checkpoint.store import Snapshot, commit, write_shard
from trainer.record.events import EVENTS, FIELDS
from trainer.record.goodput import goodput, read_steps
from trainer.record.lines import MetricsIndex, Record, read_events, read_metrics, summary
from trainer.record.notable import notable
from trainer.run.folder import attempts, is_finished, prepare_run
from trainer.state import TrainState
from trainer.tracking import read_state

HEAD = {"time": 5.0, "attempt": 1}
WRONG = [None, True, -1, 1.5, 2**63, 1e300, "x", [], [1], {}, {"a": 1}, [[]], "9" * 5000]
VALUES = {"time": 6.0, "reason": "r", "status": "FINISHED", "action": "stop", "checkpoint": "c", "trial": "t",
          "host": "h", "experts": {"0": [1]}, "broken": [], "slow": [], "cost_s": 1.0, "write_s": 1.0, "step_s": 1.0,
          "times_median": 2.0}  # fmt: skip
"""Right ones, where 1 is not."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_data):
    """A run of two steps, each with a checkpoint."""
    settings = {"run": {"name": "run", "root": str(tmp_path_factory.mktemp("finished"))}}
    train = {"steps": 2, "eval_every": 1, "micro_batch": 4}
    config = tiny(**settings, data={"path": str(tiny_data)}, train=train, checkpoint={"every": 1})
    run_dir = prepare_run(config)
    assert train_in_process(run_dir) == 0
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def use(run_dir: Path) -> None:
    """All that reads a run's record."""
    events = read_events(run_dir)
    summary(run_dir)
    goodput(run_dir)
    notable(events)
    attempts(run_dir)
    is_finished(run_dir)
    read_metrics(run_dir)
    record = Record(run_dir, 2)
    Cadence(events, 1, record)
    record.close()


def append(path: Path, *lines: str | dict) -> None:
    with path.open("a") as file:
        file.writelines(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)


NEEDED = {name: each.needed for name, each in EVENTS.items() if each.needed}


@pytest.mark.parametrize("name", NEEDED)
def test_an_event_of_other_types_is_left_out_with_a_word(run_dir, capsys, name):
    before = read_events(run_dir)
    right = HEAD | {"event": name} | {key: VALUES.get(key, 1) for key in NEEDED[name]}
    append(run_dir / "events.jsonl", right)
    assert read_events(run_dir) == [*before, right]
    wrong = [{k: v for k, v in right.items() if k != key} for key in (*HEAD, *NEEDED[name])]
    wrong += [right | {key: value} for key in (*HEAD, *NEEDED[name]) for value in WRONG if not FIELDS[key](value)]
    append(run_dir / "events.jsonl", *wrong)
    assert read_events(run_dir) == [*before, right]
    assert "events.jsonl: line" in capsys.readouterr().err
    use(run_dir)


@pytest.mark.parametrize("field", FIELDS)
def test_no_event_is_read_with_a_field_of_another_type(run_dir, field):
    before = len(read_events(run_dir))
    wrong = [value for value in WRONG if not FIELDS[field](value)]
    assert wrong
    lines = [HEAD | {"event": name, field: value} for name in ("attempt_started", "evaluation") for value in wrong]
    append(run_dir / "events.jsonl", *lines, "[" * 100_000, "\x00", '{"event": NaN}', "null", "[]", '"attempt_started"')
    assert len(read_events(run_dir)) == before
    use(run_dir)


def test_what_may_be_missing_is(run_dir):
    """Fields that readers do without, each left out of each event that a run writes."""
    for event in read_events(run_dir):
        for key in event.keys() - {"time", "attempt", "event", *NEEDED.get(event["event"], ())}:
            append(run_dir / "events.jsonl", {k: v for k, v in event.items() if k != key})
    use(run_dir)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 9999999999999999999999, "attempt": 1, "time": 1.0, "loss": 1.0}',
        '{"step": 3, "attempt": 1, "time": 1.2.3, "loss": 1.0}',
        '{"step": 3, "attempt": 1, "time": e+e, "loss": 1.0}',
        '{"step": 3, "attempt": 1, "time": 1.0, "step": "x"}',
        '{"step": 3, "attempt": 1, "time": 1.0, "loss": "x", "tokens": []}',
        '{"step": "3", "attempt": 1, "time": 1.0, "loss": 1.0}',
        '{"step": 3, "attempt": 1, "time": 1.0, "data_wait": 1e+e, "step_time": 5..5}',
        '{"step": 3, "attempt": 1, "time": 1.0, "eval_loss": {}}',
        '{"step": ' + "3" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_a_line_of_metrics_of_other_types_is_left_out(run_dir, line):
    before, last = read_metrics(run_dir), summary(run_dir)
    append(run_dir / "metrics.jsonl", line)
    assert read_metrics(run_dir) == before
    assert summary(run_dir)["loss"] == last["loss"]
    use(run_dir)


def test_a_run_goes_on_whatever_its_record_says(run_dir, tiny_data):
    """The whole way: prepared, resumed, trained and ended."""
    config = (run_dir / "config.yaml").read_text().replace(str(run_dir.parent), str(run_dir.parent))
    (run_dir / "config.yaml").write_text(config)
    lines = [HEAD | {"event": "rollback", "to_step": 2, "cursor": "x", "rollbacks": 1}]
    lines += [HEAD | {"event": "forked", "checkpoint": 5}, HEAD | {"event": "attempt_started", "inputs": "none"}]
    lines += [HEAD | {"event": "cadence", "every": "auto"}, HEAD | {"event": "attempt_ended", "status": 3}]
    append(run_dir / "events.jsonl", *lines)
    for path in (folder(run_dir, 2), folder(run_dir, 3)):
        path.mkdir(exist_ok=True)
        (path / "receipt-00000.json").write_text("[" * 100_000)
    (run_dir / "tracking.json").write_text("[]")
    settings = {"run": {"name": "run", "root": str(run_dir.parent)}, "data": {"path": str(tiny_data)}}
    train = {"steps": 3, "eval_every": 1, "micro_batch": 4}
    assert prepare_run(tiny(**settings, train=train, checkpoint={"every": "auto"})) == run_dir
    assert train_in_process(run_dir) == 0
    resumed = [event for event in read_events(run_dir) if event["event"] == "resumed"]
    assert [(event["step"], event["cursor"]) for event in resumed] == [(2, 8)]


def zeros(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(400 << 20)


KINDS = {
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "zeros without end": zeros,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "tracking.json"])
def test_what_is_no_record_is_neither_waited_for_nor_taken_into_memory(run_dir, muster, name, kind):
    (run_dir / name).unlink(missing_ok=True)
    KINDS[kind](run_dir / name)
    signal.alarm(60)  # a pipe that is opened ends it
    tracemalloc.start()
    try:
        assert read_state(run_dir) == {}
        with pytest.raises(OSError, match=name) if name == "events.jsonl" else contextlib.nullcontext():
            read_events(run_dir)
        unread = name == "metrics.jsonl" and kind != "zeros without end"
        with pytest.raises(OSError, match=name) if unread else contextlib.nullcontext():
            read_steps(run_dir)
            MetricsIndex(run_dir).update()
        code, _, err = muster("runs", "--root", str(run_dir.parent))  # the others are shown
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
        signal.alarm(0)
    assert code == 0
    assert (f"{run_dir / name}: " in err) == (unread or name == "events.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", '"t"', '{"token": "t"}', "[" * 100_000, '{"token": ["t"]}',
        '{"token": "t", "shapes": [], "scalars": {}, "fragments": {}, "file": {}}',
        '{"token": "t", "shapes": {}, "scalars": {}, "fragments": {}, "file": {"name": "../a", "bytes": 1}}',
    ],
)  # fmt: skip
def test_a_receipt_that_is_none_is_waited_for(tmp_path, text):
    path = folder(tmp_path, 1)
    path.mkdir(parents=True)
    (path / "receipt-00000.json").write_text(text)
    with pytest.raises(CheckpointError, match="rank 0 wrote no shard within 0 s"):
        commit(path, 1, "t", TrainState(step=1), {}, 0.1)


def test_receipts_that_do_not_agree_make_no_checkpoint(tmp_path):
    import torch

    path = folder(tmp_path, 1)
    shard = Snapshot({"weight/a@0": torch.ones(4)}, {"weight": {"a": [4]}}, {})
    write_shard(path, 0, "t", shard)
    receipt = json.loads((path / "receipt-00000.json").read_text())
    for change in (
        {"fragments": {"weight/a@0": 3}},
        {"fragments": {"weight/b@0": 4}},
        {"shapes": {"weight": {"a": [9]}}},
    ):
        (path / "receipt-00000.json").write_text(json.dumps(receipt | change))
        with pytest.raises(CheckpointError, match=r"elements|no tensor"):
            commit(path, 1, "t", TrainState(step=1), {}, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        "[" * 100_000,
        '{"offset": "x", "files": [], "uri": 3, "run_id": {}}',
        '{"files": {"a": 1}}',
    ],
)
def test_the_shippers_state_of_other_types_is_forgotten(tmp_path, text):
    (tmp_path / "tracking.json").write_text(text)
    assert read_state(tmp_path) == {}


def test_a_fork_of_a_damaged_checkpoint_is_refused_before_anything_starts(run_dir, tiny_data):
    (folder(run_dir, 2) / "manifest.json").write_text("{}")
    settings = {"run": {"name": "run", "root": str(run_dir.parent)}, "data": {"path": str(tiny_data)}}
    train = {"steps": 2, "eval_every": 1, "micro_batch": 4}
    with pytest.raises(ConfigError, match=r"--fork new: the last checkpoint of run\.name=run: .*format None"):
        prepare_run(tiny(**settings, train=train, checkpoint={"every": 1}), fork="new")
    assert not (run_dir.parent / "new").exists()


@pytest.mark.parametrize("text", ["", "null", "[]", '{"trials": [1]}', '{"trials": [{"name": "a"}]}', "[" * 100_000])
def test_a_plan_of_other_types_is_refused(tmp_path, text):
    (tmp_path / PLAN).write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json is not what `muster sweep run` writes"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    "text", ["null", "[]", "{}", '{"config": 3}', '{"config": "c", "run": "r", "budget": "x"}', "[" * 9999]
)
def test_a_prediction_of_other_types_is_refused(tmp_path, text):
    (tmp_path / PREDICTIONS).write_text(f"{text}\n")
    with pytest.raises(ConfigError, match="a line that is not a prediction"):
        score_runs(tmp_path)
