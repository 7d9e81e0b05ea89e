"""A run's metrics over steps, tokens, FLOPs or time, reduced to what a chart can show."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.record.columns import COLUMNS, counting, read_rows
from trainer.record.lines import EVENTS, METRICS, read_events

from ..index.sampling import sample_records

AXES = ("step", "examples", "tokens", "time", "flops")
EXAMPLES = ("examples", "sequences")
"""What the examples that a run has seen are called in its record."""
MOST_POINTS = 5000
MOST_METRICS = 200
"""Of one request."""
MOST_KEPT = 64 << 20
"""Bytes of columns that are kept for the next request."""
SAMPLED = 400
"""Records that are read for metrics which are lists."""
OF_LISTS: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "max": np.max, "min": np.min}
"""What a list of numbers becomes, as `router_entropy.mean`."""


class NoAxis(ValueError):
    """The run's record does not say what the axis needs."""


class _Base(NamedTuple):
    """The lines that count, in the order of steps, an evaluation after its step; each [lines]."""

    order: np.ndarray
    """Their numbers in the file."""
    step: np.ndarray
    time: np.ndarray
    evaluation: np.ndarray


class _Kept:
    """Columns of one run's record, as it was when they were read."""

    def __init__(self, signature: tuple[int, ...]) -> None:
        self.signature = signature
        self.base: _Base | None = None
        self.columns: dict[str, np.ndarray] = {}

    def size(self) -> int:
        arrays = [*(self.base or ()), *self.columns.values()]
        return sum(array.nbytes for array in arrays)


class Columns:
    """Reads columns of runs' records and keeps those that were asked for last."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}

    def read(self, folder: str, names: Sequence[str]) -> Iterator[tuple[_Base, dict[str, np.ndarray]]]:
        """The columns of these names, some at a time as memory allows, each [lines] as the base's.

        Raises:
            OSError: the record cannot be read.
        """
        with self._lock:
            reading = self._reading.setdefault(folder, threading.Lock())
            if len(self._reading) > 1000:
                self._reading = {folder: reading}
        wanted = list(names)
        while True:
            with reading:  # one request reads, the others find it read
                kept = self._of(folder)
                rows = len(kept.base.order) if kept.base else 0
                some = max(1, min(len(wanted), (self._most // 2) // (8 * max(rows, 1)))) if kept.base else 1
                now, wanted = wanted[:some], wanted[some:]
                missing = [name for name in now if name not in kept.columns]
                if missing or kept.base is None:
                    self._fill(kept, folder, missing)
                assert kept.base is not None
                found = {name: kept.columns[name] for name in now}
                base = kept.base
            self._forget(folder)
            yield base, found
            if not wanted:
                return

    def _of(self, folder: str) -> _Kept:
        now = _signature(folder)
        with self._lock:
            kept = self._kept.get(folder)
            if kept is None or kept.signature != now:
                kept = self._kept[folder] = _Kept(now)
            self._kept.move_to_end(folder)
            return kept

    def _fill(self, kept: _Kept, folder: str, names: Sequence[str]) -> None:
        rows = read_rows(folder, names)
        counts = np.flatnonzero(counting(rows, read_events(folder)))
        order = counts[np.lexsort((rows.evaluation[counts], rows.step[counts]))]
        if kept.base is not None and not np.array_equal(kept.base.order, order):
            kept.columns.clear()  # it has grown since
        kept.base = _Base(order.astype(np.int32), rows.step[order], rows.time[order], rows.evaluation[order])
        for name in names:
            kept.columns[name] = rows.values[name][order]

    def _forget(self, folder: str) -> None:
        with self._lock:
            total = sum(kept.size() for kept in self._kept.values())
            for other in list(self._kept):
                if total <= self._most:
                    break
                gone = self._kept[other]
                if other == folder:
                    total -= sum(array.nbytes for array in gone.columns.values())
                    gone.columns = {}
                else:
                    total -= gone.size()
                    del self._kept[other]


def _signature(folder: str) -> tuple[int, ...]:
    found = []
    for name in (METRICS, EVENTS, COLUMNS):
        try:
            status = os.lstat(f"{folder}/{name}")
            found += [status.st_mtime_ns, status.st_size, status.st_ino]
        except (OSError, ValueError):
            found += [0, -1, 0]
    return tuple(found[:6])  # the copy is another form of the same


class Line(NamedTuple):
    """A curve: [points], NaN where there is a gap."""

    x: np.ndarray
    y: np.ndarray
    last: tuple[float, float] | None
    rows: int

    def plain(self) -> dict[str, Any]:
        return {
            "x": self.x.tolist(),
            "y": _nulls(self.y),
            "last": None if self.last is None else [float(self.last[0]), float(self.last[1])],
            "n": self.rows,
        }


def _nulls(values: np.ndarray) -> list[float | None]:
    return [value if value == value and abs(value) != np.inf else None for value in values.tolist()]


def lines(
    columns: Columns,
    folder: str,
    names: Sequence[str],
    *,
    points: int = 800,
    start: float | None = None,
    end: float | None = None,
    axis: str = "step",
    unit: str = "tokens",
    flops_per_token: float | None = None,
    log: bool = False,
) -> dict[str, Line]:
    """The metrics of these names over an axis.

    Args:
        points: about how many each has at most; a bucket's least, greatest and last value are kept.
        start, end: of the axis; None: all there is.
        unit: what the run counts, which is meant by `tokens`.
        log: the axis is logarithmic, and so are the buckets.

    Raises:
        NoAxis: the record does not say how many examples, tokens or FLOPs a step takes.
        OSError: the record cannot be read.
    """
    if axis == "flops" and not flops_per_token:
        raise NoAxis("the run's record does not say how many FLOPs a token takes")
    needs = EXAMPLES if axis == "examples" else (unit,) if axis in ("tokens", "flops") else ()
    found: dict[str, Line] = {}
    listed = [name for name in names if name.rpartition(".")[2] in OF_LISTS and name.rpartition(".")[0]]
    plain = [name for name in names if name not in listed]
    tokens = None
    for _, values in columns.read(folder, needs) if needs else ():
        for name, column in values.items():
            if tokens is None or np.isfinite(column).any():
                tokens, unit = column, name
    first: float | None = None
    for base, values in columns.read(folder, plain) if plain else ():
        x = _axis(axis, base, tokens, flops_per_token)
        first = float(base.time[0]) if len(base.time) else None
        for name, y in values.items():
            found[name] = _line(x, y, base.evaluation, points, start, end, log)
    if listed:
        found |= _of_lists(folder, listed, axis, unit, flops_per_token, first, points, start, end)
    return {name: found[name] for name in names if name in found}


def _axis(axis: str, base: _Base, tokens: np.ndarray | None, flops_per_token: float | None) -> np.ndarray:
    if axis == "step":
        return base.step.astype(float)
    if axis == "time":
        return base.time - (base.time[0] if len(base.time) else 0.0)
    assert tokens is not None
    if len(tokens) != len(base.step):  # it has grown between two readings
        tokens = np.resize(tokens, len(base.step)) if len(tokens) else np.full(len(base.step), np.nan)
    known = np.where(np.isnan(tokens), -np.inf, tokens)
    filled = np.maximum.accumulate(known) if len(known) else known  # an evaluation has those of its step
    if len(filled) and not np.isfinite(filled).any():
        raise NoAxis(
            f"the run's record does not say how many {'examples' if axis == 'examples' else 'tokens'} it has seen"
        )
    return np.where(np.isfinite(filled), filled, 0.0) * (flops_per_token if axis == "flops" and flops_per_token else 1)


def _line(
    x: np.ndarray,
    y: np.ndarray,
    evaluation: np.ndarray,
    points: int,
    start: float | None,
    end: float | None,
    log: bool = False,
) -> Line:
    there = ~np.isnan(y)
    own = evaluation if (there & evaluation).sum() > (there & ~evaluation).sum() else ~evaluation
    dense = 2 * (there & own).sum() > own.sum()  # a step without a value is a gap; of a rare metric it is none
    chosen = own if dense else there & own
    if start is not None:
        chosen = chosen & (x >= start)
    if end is not None:
        chosen = chosen & (x <= end)
    x, y = x[chosen], y[chosen]
    values = np.flatnonzero(np.isfinite(y))
    last = (float(x[values[-1]]), float(y[values[-1]])) if len(values) else None
    return Line(*reduced(x, y, points, log), last, len(x))


def reduced(x: np.ndarray, y: np.ndarray, points: int, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Of each bucket of x the least, the greatest and the last value, in their places; NaN where it has none.

    Args:
        x: [rows], ascending or nearly so.
        points: about how many to return; with fewer rows than that, all.
        log: the buckets are equally wide in log x.
    """
    if len(x) <= points:
        return x, y
    kept = _kept_rows(np.log(np.maximum(x, x[x > 0].min())) if log and (x > 0).any() else x, y, points)
    return x[kept], y[kept]


def _kept_rows(x: np.ndarray, y: np.ndarray, points: int) -> np.ndarray:
    span = float(x[-1] - x[0])
    buckets = max(points // 3, 1)
    if span <= 0:
        which = np.arange(len(x)) * buckets // len(x)
    else:
        which = np.minimum((np.maximum(x - x[0], 0.0) / span * buckets).astype(np.int64), buckets - 1)
        which = np.maximum.accumulate(which)
    starts = np.flatnonzero(np.concatenate([[True], which[1:] != which[:-1]]))
    group = np.cumsum(np.concatenate([[0], (which[1:] != which[:-1]).astype(np.int64)]))
    finite = np.isfinite(y)
    rows = np.arange(len(x))
    low, high = np.where(finite, y, np.inf), np.where(finite, y, -np.inf)
    least, greatest = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    big = len(x)
    at_least = np.minimum.reduceat(np.where(finite & (low == least[group]), rows, big), starts)
    at_greatest = np.minimum.reduceat(np.where(finite & (high == greatest[group]), rows, big), starts)
    at_last = np.maximum.reduceat(np.where(finite, rows, -1), starts)
    empty = starts[at_last < 0]
    kept = np.concatenate([at_least[at_least < big], at_greatest[at_greatest < big], at_last[at_last >= 0], empty])
    return np.unique(kept)


def _of_lists(
    folder: str,
    names: Sequence[str],
    axis: str,
    unit: str,
    flops_per_token: float | None,
    first: float | None,
    points: int,
    start: float | None,
    end: float | None,
) -> dict[str, Line]:
    records = sample_records(Path(folder) / METRICS, min(SAMPLED, max(points, 2)))
    if axis == "time":
        first = first if first is not None or not records else records[0]["time"]
        x = np.array([record["time"] - (first or 0.0) for record in records], float)
    elif axis == "step":
        x = np.array([record["step"] for record in records], float)
    else:
        factor = flops_per_token if axis == "flops" and flops_per_token else 1.0
        x = np.array([factor * (record.get(unit) or 0.0) for record in records], float)
    found = {}
    for name in names:
        key, _, how = name.rpartition(".")
        y = np.array([_over(record.get(key), how) for record in records], float)
        found[name] = _line(x, y, np.zeros(len(x), bool), points, start, end)
    return found


def _over(values: Any, how: str) -> float:
    numbers = [each for each in values if type(each) in (int, float)] if isinstance(values, list) else []
    return float(OF_LISTS[how](np.array(numbers, float))) if numbers else float("nan")
