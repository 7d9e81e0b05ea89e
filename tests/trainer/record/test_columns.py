"""metrics.parquet: with or without it, old, damaged or of another record, the columns are those of metrics.jsonl."""

import contextlib
import fcntl
import json
import random
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from trainer.record.columns import levels, parse, parts, read_columns, update_columns
from trainer.record.columns.live import LiveColumns
from trainer.record.columns.parts import COLUMNS, DamagedCopy
from trainer.record.lines import Record, read_metrics

NAMES = ("loss", "lr", "eval_loss", "grad_norm", "skipped", "absent")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A copy of some kilobytes, in many blocks and row groups, by way of C."""
    for name, size in {"TAIL": 2000, "FULL": 400, "ROW_GROUP": 16}.items():
        monkeypatch.setattr(parts, name, size)
    for name, size in {"BLOCK": 3000, "SMALL": 300, "MOST_VALUES": 800}.items():
        monkeypatch.setattr(parse, name, size)
    monkeypatch.setattr(levels, "BUCKET", 4)


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


def parts_of(run_dir):
    folder = run_dir / COLUMNS
    return sorted(path for path in folder.iterdir() if path.name[0].isdigit()) if folder.exists() else []


@pytest.mark.parametrize("seed", range(4))
def test_the_columns_are_those_of_the_documented_reader(tmp_path, seed):
    copied = 0
    for _ in live(tmp_path, seed):
        update_columns(tmp_path)
        there = parts_of(tmp_path)
        assert found(tmp_path) == expected(tmp_path)
        assert parts_of(tmp_path) == there  # none was taken for a damaged one
        copied = max(copied, len(there))
    assert copied > 3
    half = expected(tmp_path)["step"][-1] // 2
    assert found(tmp_path, ["loss"], half) == expected(tmp_path, ["loss"], half)
    assert found(tmp_path, ["eval_loss"]) == expected(tmp_path, ["eval_loss"])
    assert len(expected(tmp_path, ["loss"])["step"]) == len(set(expected(tmp_path, ["loss"])["step"]))


def curve(columns, name):
    """A metric as `LiveColumns` has it: step, value and time of its training lines, then of its evaluations."""
    rows = []
    for lines in (columns.train, columns.evaluations):
        values = columns.values([name], lines.row)[name]
        rows += [
            each
            for each in zip(lines.step.tolist(), values.tolist(), lines.time.tolist(), strict=True)
            if each[1] == each[1]
        ]
    return rows


def known_curve(run_dir, name):
    records = [record for record in read_metrics(run_dir) if record.get(name) is not None]
    records.sort(key=lambda record: ("eval_loss" in record, record["step"]))
    return [(record["step"], float(record[name]), record["time"]) for record in records]


@pytest.mark.parametrize("seed", range(4))
def test_a_page_that_stays_open_sees_what_a_new_one_does(tmp_path, seed):
    """Through restarts and rollbacks; parts that are written and replaced, and one that is damaged, in between."""
    draw = random.Random(seed)
    columns = LiveColumns(tmp_path)
    for turn, _ in enumerate(live(tmp_path, seed)):
        if turn == 5:
            draw.choice(parts_of(tmp_path)).write_bytes(b"PAR1")
        for _ in range(3):
            columns.refresh()
            with contextlib.suppress(DamagedCopy):
                for name in ("loss", "eval_loss", "grad_norm", "skipped", "absent"):
                    assert curve(columns, name) == known_curve(tmp_path, name)
                break
        else:
            raise AssertionError("it stays damaged")
        assert set(columns.names()) >= {"loss", "lr", "tokens"}
    assert len(columns._held) > 3
    assert sum(len(piece["step"]) for piece in columns._tail) < 100


@pytest.mark.parametrize("seed", range(4))
def test_levels_have_the_extremes_and_the_last_value_of_every_line_that_counts(tmp_path, seed):
    for _ in live(tmp_path, seed):
        pass
    columns, draw = LiveColumns(tmp_path), random.Random(seed)
    columns.refresh()
    lines = len(columns.train.row)
    values = columns.values(["loss", "grad_norm"], columns.train.row)
    for begin, end in [(0, lines), (0, 0), *(sorted(draw.sample(range(lines), 2)) for _ in range(20))]:
        found = columns.levels(["loss", "grad_norm"], begin, end)
        for name, got in found.items():
            assert got["first"].tolist() == sorted(set(got["first"].tolist()))
            bounds = [*got["first"].tolist(), end]
            assert bounds[0] == begin
            for level, first, after in zip(got, bounds[:-1], bounds[1:], strict=True):
                own = values[name][first:after]
                assert 0 < after - first <= 4
                assert level["count"] == np.count_nonzero(~np.isnan(own))
                if level["count"]:
                    assert (level["low"], level["high"]) == (np.nanmin(own), np.nanmax(own))
                    assert level["last"] == own[~np.isnan(own)][-1]
                    for each in ("low", "high", "last"):
                        assert values[name][level[f"{each}_at"]] == level[each]
    assert len(columns.levels(["loss"])["loss"]) < lines / 2


def test_infinite_values_are_told(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 400):
            value = {100: "1e999", 200: "-Infinity", 300: "NaN"}.get(step, "1.5")
            file.write(f'{{"step": {step}, "attempt": 1, "time": {step}.5, "norm": {value}}}\n')
    for _ in range(2):  # from the lines, and from their copy
        columns = LiveColumns(tmp_path)
        columns.refresh()
        found = columns.levels(["norm"])["norm"]
        told = {
            int(columns.train.step[each["infinite_at"]]): int(each["infinite"]) for each in found if each["infinite"]
        }
        assert told == {100: 1, 200: -1}
        assert found["high"].max() == found["low"].min() == 1.5


def test_a_metric_that_begins_later_is_in_later_parts_and_none_is_lost(tmp_path):
    """However many there are: a part has the columns that its lines have."""
    record = Record(tmp_path, 1)
    for step in range(1, 61):
        record.metrics({"step": step, "loss": 1.0} | {f"metric_{number}": step + number for number in range(10 * step)})
    record.close()
    columns = LiveColumns(tmp_path)
    columns.refresh()
    names = ["loss", *(f"metric_{number}" for number in range(600))]
    assert sorted(columns.names()) == sorted(names)
    widths = [pq.ParquetFile(part).metadata.num_columns for part in parts_of(tmp_path)]
    assert len(widths) > 10
    assert widths[0] < 100 < 500 < widths[-1]
    assert found(tmp_path, names[1::50]) == expected(tmp_path, names[1::50])
    assert curve(columns, "metric_599") == [(60, 659.0, columns.train.time[-1])]


def test_lines_of_ever_new_metrics_take_bounded_memory(tmp_path, monkeypatch):
    """Each has one that no other has: lines times metrics would be without bounds."""
    monkeypatch.setattr(parse, "MOST_NAMES", 50)
    monkeypatch.setattr(parts, "MOST_NAMES", 50)
    made = []

    def stored(columns, group):
        made.append(sum(values.nbytes for values in columns.values()))
        return levels.stored_levels(columns, group)

    monkeypatch.setattr(parts, "stored_levels", stored)
    record = Record(tmp_path, 1)
    for step in range(1, 301):
        record.metrics({"step": step, f"metric_{step}": float(step)})
    record.metrics({"step": 301} | {f"other_{number}": 1.0 for number in range(80)})
    record.close()
    columns = LiveColumns(tmp_path)
    columns.refresh()
    assert max(made) < 50 * 60 * 8
    assert {f"metric_{step}" for step in range(1, 301)} < set(columns.names())
    assert curve(columns, "metric_77") == known_curve(tmp_path, "metric_77")
    assert (columns.left_out, len(columns.names())) == (30, 350)


@pytest.fixture
def written(tmp_path):
    for _ in live(tmp_path):
        pass
    assert update_columns(tmp_path) > 0
    assert len(parts_of(tmp_path)) > 3
    return tmp_path


def test_it_can_always_be_made_again(written):
    shutil.rmtree(written / COLUMNS)
    assert found(written) == expected(written)
    assert parts_of(written)


def test_what_was_written_stays_and_little_is_written_again(written):
    before = {part.name: part.stat().st_ino for part in parts_of(written)}
    record = Record(written, 9)
    for step in range(1000, 1400):
        record.metrics({"step": step, "loss": 1.0})
        if not step % 20:
            update_columns(written)
    after = {part.name: part.stat().st_ino for part in parts_of(written)}
    assert list(after)[: len(before) - 1] == list(before)[:-1]
    assert all(after[name] == before[name] for name in list(before)[:-1])
    assert len(after) > len(before) + 2
    sizes = [pq.ParquetFile(part).metadata for part in parts_of(written)[:-1]]
    assert all(each.num_rows * each.num_columns >= parts.FULL for each in sizes)
    assert len(list((written / COLUMNS).iterdir())) == 2 * len(after) + 1  # their levels, and the lock
    record.close()


def test_the_copy_of_an_older_version_is_replaced(written):
    shutil.rmtree(written / COLUMNS)
    (written / COLUMNS).write_bytes(b"PAR1")
    assert found(written) == expected(written)
    assert parts_of(written)


def test_other_programs_read_the_folder(written):
    table = pq.read_table(written / COLUMNS, schema=pq.read_schema(parts_of(written)[0]))
    lines = (written / "metrics.jsonl").read_bytes()[: update_columns(written)].splitlines()
    assert table.num_rows == sum(parse.HEAD.match(line) is not None and line.endswith(b"}") for line in lines)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_copy_is_made_again(written, seed):
    """A part or its levels cut short, or a bit flipped in a page or in the footer."""
    draw = random.Random(seed)
    path = draw.choice(sorted(path for path in (written / COLUMNS).iterdir() if path.suffix == ".parquet"))
    data = bytearray(path.read_bytes())
    if seed % 2:
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    columns = LiveColumns(written)
    for _ in range(3):
        columns.refresh()
        with contextlib.suppress(DamagedCopy):
            levels_found = columns.levels(["loss", "lr"])
            assert curve(columns, "loss") == known_curve(written, "loss")
            break
    values = columns.values(["loss"], columns.train.row)["loss"]
    assert np.nanmin(levels_found["loss"]["low"]) == np.nanmin(values)
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
    for part in parts_of(written):
        part.unlink()
    (written / COLUMNS / ".new").write_bytes(b"PAR1 half")
    with (written / COLUMNS / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert found(written) == expected(written)
        assert not parts_of(written)
    assert found(written) == expected(written)
    assert parts_of(written)
    assert not (written / COLUMNS / ".new").exists()


@pytest.mark.parametrize("what", ["folder", "part", "levels", "new", "lock"])
def test_no_link_is_followed(written, tmp_path, what):
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    part = parts_of(written)[1]
    path = {"folder": written / COLUMNS, "part": part, "levels": part.with_name(f"_{part.name}"),
            "new": written / COLUMNS / ".new", "lock": written / COLUMNS / ".lock"}[what]  # fmt: skip
    if what in ("new", "lock"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        parts_of(written)[-1].unlink()
    else:
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir()) if what == "folder" else []
    assert found(written) == expected(written)
    assert not target.exists()
    assert before == (sorted(elsewhere.iterdir()) if what == "folder" else [])
    columns = LiveColumns(written)
    with contextlib.suppress(DamagedCopy):
        columns.refresh()
        columns.levels(["loss"])
    columns.refresh()
    assert curve(columns, "loss") == known_curve(written, "loss")


def test_a_folder_that_cannot_be_written_is_read(written, monkeypatch):
    shutil.rmtree(written / COLUMNS)
    monkeypatch.setattr(parts.os, "replace", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")))
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
