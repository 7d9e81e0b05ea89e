"""Curves reduced to what a chart shows: no spike is lost, no gap is bridged, and what does not count is left out."""

import random

import numpy as np
import pytest
from dashboards import write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.server.web.pages import series
from cluster.server.web.pages.series import Columns, lines, reduced
from trainer.record.columns import parts
from trainer.record.lines import Record, read_metrics


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6)), min_size=1, max_size=400),
    st.integers(2, 200),
    st.integers(1, 5),
)
def test_the_extremes_and_the_last_of_every_bucket_are_kept(values, points, spread):
    y = np.array(values)
    x = np.cumsum(np.arange(len(y)) % spread + 1).astype(float)
    found_x, found_y = reduced(x, y, points)
    assert len(found_x) == len(found_y) <= max(points, 3)
    known = {(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True) if b == b}
    found = {(a, b) for a, b in zip(found_x.tolist(), found_y.tolist(), strict=True) if b == b}
    assert found <= known
    assert (np.diff(found_x) > 0).all()
    if np.isfinite(y).any():
        assert np.nanmin(found_y) == np.nanmin(y)
        assert np.nanmax(found_y) == np.nanmax(y)
        assert max(found) == max(known)
    if len(y) <= points:
        assert np.array_equal(found_y, y, equal_nan=True)
    edges = np.linspace(x[0], x[-1], max(points // 3, 1) + 1)[:-1]
    bucket = np.maximum(np.searchsorted(edges, x, side="right") - 1, 0)
    for number in np.unique(bucket):
        inside = y[bucket == number]
        if len(y) > points and not np.isfinite(inside).any():  # a gap as wide as a bucket is seen
            assert np.isnan(found_y[np.isin(found_x, x[bucket == number])]).any()


def test_a_step_without_a_finite_loss_is_a_gap_and_a_rare_metric_has_none(tmp_path):
    run = write_run(
        tmp_path / "run", 9, loss=lambda step: float("inf") if step == 4 else 1.0 * step,
        rare=lambda step: 5.0 if step % 4 == 0 else None,
    )  # fmt: skip
    found = lines(Columns(), str(run), ["loss", "rare"])
    assert found["loss"].plain()["y"] == [1.0, 2.0, 3.0, None, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert found["rare"].plain()["x"] == [4.0, 8.0]


def test_what_was_done_again_counts_once_and_what_grows_is_seen(tmp_path):
    run, columns = write_run(tmp_path / "run", 9, status=None, of=20), Columns()
    lines(columns, str(run), ["loss"])
    record = Record(run, 2)
    for step in range(6, 15):
        record.metrics({"step": step, "loss": 100.0 + step})
        found = lines(columns, str(run), ["loss", "eval_loss", "tokens"])
        known = [(r["step"], r["loss"]) for r in read_metrics(run) if "loss" in r]
        assert list(zip(found["loss"].x, found["loss"].y, strict=True)) == known
    record.close()


def test_little_memory_for_columns_changes_nothing(tmp_path):
    run = write_run(tmp_path / "run", 120, **{f"m{i}": lambda step, i=i: float(step * i) for i in range(9)})
    names = [f"m{i}" for i in range(9)] + ["loss"]
    plenty, little = Columns(), Columns(most=1)
    for _ in range(2):
        for name, line in lines(plenty, str(run), names, points=40).items():
            other = lines(little, str(run), names, points=40)[name]
            assert (other.x.tolist(), other.y.tolist()) == (line.x.tolist(), line.y.tolist())
    assert little._kept == {}
    assert len(plenty._kept) == 1


@pytest.mark.parametrize("points", [50, 800])
def test_zooming_shows_more(tmp_path, points):
    run = write_run(tmp_path / "run", 2000, loss=lambda step: float(step % 10))
    whole = lines(Columns(), str(run), ["loss"], points=points)["loss"]
    part = lines(Columns(), str(run), ["loss"], points=points, start=1000, end=1040)["loss"]
    assert (whole.rows, part.rows) == (2000, 41)
    assert len(part.x) == 41
    assert part.last == (1040.0, 0.0)


def test_of_a_long_run_levels_are_shown_and_its_copy_is_read_where_it_is_asked_for(tmp_path, monkeypatch):
    """What is shown are records, the extremes and the end of the range among them; near by, every one is."""
    for name, size in {"TAIL": 4000, "FULL": 4000, "ROW_GROUP": 512}.items():
        monkeypatch.setattr(parts, name, size)
    monkeypatch.setattr(series, "WHOLE", 300)
    draw = random.Random(1)
    run = write_run(
        tmp_path / "run",
        6000,
        loss=lambda step: draw.random(),
        rare=lambda step: 1.0 * step if step % 97 == 0 else None,
    )
    known = {record["step"]: record for record in read_metrics(run) if "loss" in record}
    columns = Columns()
    read = []
    monkeypatch.setattr(parts.Copy, "read", lambda self, part, names, groups=None, own=parts.Copy.read: (
        read.append((names, groups)), own(self, part, names, groups))[1])  # fmt: skip
    for start, end in [(None, None), (1000, 3500), (1234, 4321), (2000, 2100)]:
        for axis, factor in (("step", 1.0), ("tokens", 8.0)):
            del read[:]
            low, high = (None if each is None else each * factor for each in (start, end))
            found = lines(columns, str(run), ["loss", "rare"], points=60, start=low, end=high, axis=axis)
            own = {step: record for step, record in known.items() if (start or 0) <= step <= (end or 6000)}
            losses = [record["loss"] for record in own.values()]
            x, y = found["loss"].x, found["loss"].y
            assert len(x) <= 101
            assert (np.diff(x) > 0).all()
            assert [known[step / factor]["loss"] for step in x.tolist()] == y.tolist()
            assert (y.min(), y.max()) == (min(losses), max(losses))
            assert found["loss"].last == (max(own) * factor, losses[-1])
            assert found["loss"].rows == len(own)
            rare = [step for step in own if step % 97 == 0]
            assert [step * factor for step in rare][-1] == found["rare"].x[-1]
            assert set(found["rare"].x / factor) <= set(rare)
            if axis == "step":  # parts of the copy, and of those some groups of lines
                assert sum(len(groups) for names, groups in read if "loss" in names) <= 3


def test_a_metric_of_evaluations_and_gaps_of_a_long_run(tmp_path, monkeypatch):
    for name, size in {"TAIL": 4000, "FULL": 4000, "ROW_GROUP": 512}.items():
        monkeypatch.setattr(parts, name, size)
    monkeypatch.setattr(series, "WHOLE", 300)
    run = write_run(tmp_path / "run", 3000, loss=lambda step: None if 1000 < step <= 1800 else 1.0 * step, status=None)
    record = Record(run, 1)
    for step in range(3001, 6001):
        record.metrics({"step": step, "loss": 1.0 * step})
        if step % 100 == 0:
            record.metrics({"step": step, "eval_loss": -1.0 * step, "loss": 0.0})
    record.close()
    found = lines(Columns(), str(run), ["loss", "eval_loss"], points=100)
    assert found["eval_loss"].x.tolist() == [float(step) for step in range(3000, 6001, 100)]
    gap = found["loss"].x[np.isnan(found["loss"].y)]
    assert 1000 < gap.min() < gap.max() <= 1800
    assert not ((found["loss"].x > 1256) & (found["loss"].x < 1544) & ~np.isnan(found["loss"].y)).any()


@pytest.mark.parametrize("long", [False, True])
def test_a_logarithmic_axis_shows_how_a_run_began(tmp_path, monkeypatch, long):
    if long:
        monkeypatch.setattr(series, "WHOLE", 500)
        monkeypatch.setattr(series, "FIRST", 200)
    run = write_run(tmp_path / "run", 2000, loss=lambda step: float(step % 10))
    linear, log = (lines(Columns(), str(run), ["loss"], points=200, log=log)["loss"] for log in (False, True))
    assert set(range(1, 9)) <= set(log.x.tolist())
    assert not set(range(1, 9)) <= set(linear.x.tolist())
    assert len(log.x) <= 200
    assert (log.y.min(), log.y.max(), log.last) == (0.0, 9.0, (2000.0, 0.0))
