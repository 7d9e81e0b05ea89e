"""metrics.parquet: with or without it, old, damaged or of another record, the columns are those of metrics.jsonl."""

import json
import random

import numpy as np
import pytest

from trainer.record import columns
from trainer.record.columns import COLUMNS, read_columns, update_columns
from trainer.record.lines import Record, read_metrics

NAMES = ("loss", "lr", "eval_loss", "grad_norm", "skipped", "absent")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A copy of some kilobytes, in many blocks and row groups, by way of C."""
    for name, size in {"TAIL": 2000, "BLOCK": 3000, "SMALL": 300, "ROW_GROUP": 16}.items():
        monkeypatch.setattr(columns, name, size)


def expected(run_dir, names=NAMES, from_step=0):
    """As the documented reader of the metrics has it."""
    found = [record for record in read_metrics(run_dir) if record["step"] >= from_step]
    found = [record for record in found if any(record.get(name) is not None for name in names)]
    return {name: [None if record.get(name) is None else float(record[name]) for record in found] for name in
            ("step", "time", *names)}  # fmt: skip


def found(run_dir, names=NAMES, from_step=0):
    read = read_columns(run_dir, names, from_step)
    return {name: [None if np.isnan(value) else float(value) for value in column] for name, column in read.items()}


def live(run_dir, seed=0):
    """Grow a record through restarts, rollbacks, evaluations, torn and foreign lines; yields now and then."""
    draw = random.Random(seed)
    step, now = 0, 1000.0
    for attempt in range(1, 9):
        record = Record(run_dir, attempt)
        step = max(0, step - draw.randrange(6))
        for _ in range(draw.randrange(5, 60)):
            step, now = step + 1, now + 0.25
            values = {"loss": draw.random(), "lr": 1e-3, "tokens": step * 100, "expert_load": [[0.5, 0.5]], "text": "x"}
            if draw.random() < 0.1:
                values |= {"loss": float("nan"), "skipped": True}
            if attempt > 4:
                values["grad_norm"] = draw.randrange(3)
            record.metrics({"step": step} | values, at=now)
            if draw.random() < 0.15:
                record.metrics({"step": step, "eval_loss": draw.random()}, at=now)
            if draw.random() < 0.04:
                record.event("rollback", from_step=step, to_step=(step := max(0, step - draw.randrange(8))))
                with (run_dir / "events.jsonl").open() as file:
                    lines = [json.loads(line) for line in file]
                lines[-1]["time"] = now
                (run_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        record.close()
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(draw.choice(['{"step": 3, "attempt": 1, "ti', "[1]\n", "no JSON\n", ""]))
            file.write(draw.choice([f'\n{{"step": {step}, "attempt": {attempt}, "time": 1.0, "loss": "low"}}\n', ""]))
        yield


@pytest.mark.parametrize("seed", range(4))
def test_the_columns_are_those_of_the_documented_reader(tmp_path, seed):
    copied = 0
    for _ in live(tmp_path, seed):
        assert found(tmp_path) == expected(tmp_path)
        size = (tmp_path / COLUMNS).stat().st_size if (tmp_path / COLUMNS).exists() else 0
        copied = max(copied, size)
    assert copied > 0
    half = expected(tmp_path)["step"][-1] // 2
    assert found(tmp_path, ["loss"], half) == expected(tmp_path, ["loss"], half)
    assert found(tmp_path, ["eval_loss"]) == expected(tmp_path, ["eval_loss"])
    assert len(expected(tmp_path, ["loss"])["step"]) == len(set(expected(tmp_path, ["loss"])["step"]))


@pytest.fixture
def written(tmp_path):
    for _ in live(tmp_path):
        pass
    assert update_columns(tmp_path) > 0
    return tmp_path


def test_it_can_always_be_made_again(written):
    (written / COLUMNS).unlink()
    assert found(written) == expected(written)
    assert (written / COLUMNS).exists()


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_copy_is_made_again(written, seed):
    """Cut short, or a bit flipped in a page or in the footer."""
    draw = random.Random(seed)
    data = bytearray((written / COLUMNS).read_bytes())
    if seed % 2:
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (written / COLUMNS).write_bytes(data)
    assert found(written) == expected(written)
    record = Record(written, 9)
    for step in range(1000, 1100):
        record.metrics({"step": step, "loss": 1.0})
    record.close()
    assert found(written) == expected(written)


def test_a_copy_of_another_record_is_none(written):
    lines = (written / "metrics.jsonl").read_text().replace('"lr": 0.001', '"lr": 0.002')
    (written / "metrics.jsonl").write_text(lines)
    assert found(written) == expected(written)
    (written / "metrics.jsonl").write_text(lines[: lines.index("\n") + 1])
    assert found(written) == expected(written)
    (written / "metrics.jsonl").unlink()
    assert found(written)["step"] == []


def test_a_writer_that_was_killed_and_one_that_is_at_work(written):
    (written / COLUMNS).unlink()
    temporary = written / f".{COLUMNS}.new"
    temporary.write_bytes(b"PAR1 half")
    with temporary.open() as held:
        columns.fcntl.flock(held, columns.fcntl.LOCK_EX)
        assert found(written) == expected(written)
        assert not (written / COLUMNS).exists()
    assert found(written) == expected(written)
    assert (written / COLUMNS).exists()
    assert not temporary.exists()


def test_no_link_is_followed(written, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (written / COLUMNS).rename(elsewhere)
    (written / COLUMNS).symlink_to(elsewhere)
    (written / f".{COLUMNS}.new").symlink_to(tmp_path / "target")
    assert found(written) == expected(written)
    assert not (tmp_path / "target").exists()


def test_a_folder_that_cannot_be_written_is_read(written, monkeypatch):
    (written / COLUMNS).unlink()
    monkeypatch.setattr(columns.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert found(written) == expected(written)


def test_a_record_that_was_edited_where_lines_end_otherwise(tmp_path):
    record = Record(tmp_path, 1)
    for step in range(1, 41):
        record.metrics({"step": step, "loss": 1.0 / step})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(expected(tmp_path, ["loss"])["step"]) == 40
    assert found(tmp_path, ["loss"]) == expected(tmp_path, ["loss"])


def test_numbers_come_back_exactly(tmp_path):
    draw = random.Random(1)
    values = [draw.random() * 10 ** draw.randrange(-300, 17) for _ in range(200)] + [2**53, 5e-324, 0.1 + 0.2, -0.0]
    record = Record(tmp_path, 1)
    for step, value in enumerate(values, 1):
        record.metrics({"step": step, "loss": value})
    update_columns(tmp_path)
    assert read_columns(tmp_path, ["loss"])["loss"].tolist() == [float(value) for value in values]
