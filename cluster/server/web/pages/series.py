"""A run's metrics over steps, tokens, FLOPs or time, reduced to what a chart can show."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.record.columns.live import Lines, LiveColumns
from trainer.record.columns.parts import DamagedCopy
from trainer.record.lines import METRICS

from ..index.sampling import sample_records

AXES = ("step", "examples", "tokens", "time", "flops")
EXAMPLES = ("examples", "sequences", "pairs")
"""What the examples that a run has seen are called in its record."""
MOST_POINTS = 5000
MOST_METRICS = 200
"""Of one request."""
MOST_KEPT = 64 << 20
"""Bytes of columns that are kept for the next request."""
WHOLE = 1 << 16
"""Lines up to which each is looked at; of more, their levels."""
FIRST = 1 << 14
"""Lines that are looked at of more than these where the axis is logarithmic."""
AT_ONCE = 1 << 21
"""Values that are read at once."""
SAMPLED = 400
"""Records that are read for metrics which are lists."""
OF_LISTS: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "max": np.max, "min": np.min}
"""What a list of numbers becomes, as `router_entropy.mean`."""
MOST_INFINITE = 100
TRIES = 5
"""Times that a run's copy of its numbers may change or turn out to be damaged while it is read."""


class Flops(NamedTuple):
    """FLOPs of training per token or per example."""

    units: tuple[str, ...]
    """What counts those in a record: the first of these that it has."""
    each: float


class NoAxis(ValueError):
    """The run's record does not say what the axis needs."""


class Kept:
    """What is kept of a run."""

    def __init__(self, folder: str) -> None:
        self.columns = LiveColumns(folder)
        self.lock = threading.Lock()
        self._weights: dict[str, np.ndarray] = {}
        self._recounted = 0

    def size(self) -> int:
        return self.columns.size() + sum(values.nbytes for values in self._weights.values())

    def weights(self, units: Sequence[str], axis: str) -> np.ndarray:
        """What was trained on up to each training line, in the first of these units that the record has.

        Raises:
            NoAxis: it has none.
            DamagedCopy: refresh the columns, and try again.
        """
        if self._recounted != self.columns.recounted:
            self._weights.clear()
            self._recounted = self.columns.recounted
        rows = self.columns.train.row
        for unit in units:
            known = self._weights.get(unit, np.zeros(0))
            if len(known) < len(rows):
                new = np.nan_to_num(self.columns.values([unit], rows[len(known) :])[unit], posinf=0.0)
                known = self._weights[unit] = np.maximum.accumulate(np.concatenate([known, new]))
            if not len(known) or known[-1] > 0.0:
                return known
            del self._weights[unit]
        raise NoAxis(
            f"the run's record does not say how many {'examples' if axis == 'examples' else 'tokens'} it has seen"
        )


class Columns:
    """Reads columns of runs' records and keeps those that were asked for last."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, folder: str) -> Iterator[Kept]:
        """What is known of a run, for one thread at a time."""
        with self._lock:
            kept = self._kept.setdefault(folder, Kept(folder))
            self._kept.move_to_end(folder)
        with kept.lock:  # one request reads, the others find it read
            yield kept
        with self._lock:
            total = sum(each.size() for each in self._kept.values())
            while total > self._most and self._kept:
                total -= self._kept.popitem(last=False)[1].size()

    def read(self, folder: str, what: Callable[[Kept], Any]) -> Any:
        """Apply a function to the current columns of a run.

        Raises:
            OSError: the record cannot be read.
        """
        with self.of(folder) as kept:
            for _ in range(TRIES):
                kept.columns.refresh()
                with contextlib.suppress(DamagedCopy):
                    return what(kept)
        raise OSError(f"{folder}: its columns cannot be read")


class Line(NamedTuple):
    """A curve: [points], NaN where there is a gap."""

    x: np.ndarray
    y: np.ndarray
    last: tuple[float, float] | None
    rows: int
    infinite: list[tuple[float, int]]
    """Where a value is infinite, and its sign."""

    def plain(self) -> dict[str, Any]:
        return {
            "x": self.x.tolist(),
            "y": _nulls(self.y),
            "last": None if self.last is None else [float(self.last[0]), float(self.last[1])],
            "n": self.rows,
            "infinite": self.infinite,
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
    flops: Flops | None = None,
    log: bool = False,
) -> dict[str, Line]:
    """The metrics of these names over an axis.

    Args:
        points: approximate maximum of each curve; of a bucket the least, greatest and last value are kept.
        start, end: of the axis; None: all there is.
        unit: what the run counts, which is meant by `tokens`.
        log: the axis is logarithmic, and so are the buckets.

    Raises:
        NoAxis: the record does not say how many examples, tokens or FLOPs a step takes.
        OSError: the record cannot be read.
    """
    if axis == "flops" and not flops:
        raise NoAxis("the run's record does not say how many FLOPs its training takes")
    units = EXAMPLES if axis == "examples" else flops.units if axis == "flops" and flops else (unit,)
    factor = flops.each if axis == "flops" and flops else 1.0
    listed = [name for name in names if name.rpartition(".")[2] in OF_LISTS and name.rpartition(".")[0]]
    plain = [name for name in names if name not in listed]
    found: dict[str, Line] = {}
    first: float | None = None
    if plain:
        shown = Shown(axis, units, factor, start, end, points, log)
        found, first = columns.read(folder, lambda kept: (shown.lines(kept, plain), began(kept.columns)))
    if listed:
        found |= _of_lists(folder, listed, Shown(axis, units, factor, start, end, points, False), first)
    return {name: found[name] for name in names if name in found}


def began(columns: LiveColumns) -> float | None:
    """Time of the first line, in the order of steps."""
    firsts = [(each.step[0], each.time[0]) for each in (columns.train, columns.evaluations) if len(each.step)]
    return float(min(firsts, key=lambda first: first[0])[1]) if firsts else None


class Shown(NamedTuple):
    """What is asked of a run's curves, as the arguments of `lines`."""

    axis: str
    units: Sequence[str]
    """What is counted along the axis: the first of these that the record has."""
    factor: float
    start: float | None
    end: float | None
    points: int
    log: bool

    def lines(self, kept: Kept, names: Sequence[str]) -> dict[str, Line]:
        """Raises DamagedCopy: refresh the columns, and try again."""
        columns, found = kept.columns, {}
        counts = columns.counts(names)
        of_train = [name for name in names if counts[name][0] >= max(counts[name][1], 1)]
        of_evaluations = [name for name in names if name not in {*of_train}]
        for lines, own, column in ((columns.train, of_train, 0), (columns.evaluations, of_evaluations, 1)):
            x = self._x(kept, lines)
            begin, end = self._range(x)
            whole = lines is columns.evaluations or end - begin <= WHOLE
            some = max(1, AT_ONCE // max(end - begin, 1)) if whole else len(own)
            for first in range(0, len(own), max(some, 1)):
                chosen = own[first : first + some]
                near = end if whole else begin + FIRST if self.log else begin
                values = columns.values(chosen, lines.row[begin:near])
                levels = {} if whole else columns.levels(chosen, near, end)
                for name in chosen:
                    dense = 2 * counts[name][column] > len(lines.row)
                    at, y, rows = np.arange(begin, near), values[name], None
                    if not whole:
                        rows = int(np.count_nonzero(~np.isnan(y)) + levels[name]["count"].sum())
                        rows = end - begin if dense else rows
                        more_at, more_y = _flat(levels[name], dense)
                        at, y = np.concatenate([at, more_at]), np.concatenate([y, more_y])
                    found[name] = self._line(x[at], y, dense, rows)
        return found

    def _x(self, kept: Kept, lines: Lines) -> np.ndarray:
        columns = kept.columns
        if self.axis == "step":
            return lines.step
        if self.axis == "time":
            return lines.time - (began(columns) or 0.0)
        weights = kept.weights(self.units, self.axis)
        if lines is not columns.train:  # an evaluation has what its step has
            weights = np.concatenate([[0.0], weights])[np.searchsorted(columns.train.step, lines.step, "right")]
        return weights * self.factor

    def _range(self, x: np.ndarray) -> tuple[int, int]:
        """The first line of what is asked for, and the one after the last."""
        if self.start is None and self.end is None:
            return 0, len(x)
        inside = np.flatnonzero(self._inside(x))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)

    def _inside(self, x: np.ndarray) -> np.ndarray:
        inside = np.ones(len(x), bool)
        if self.start is not None:
            inside &= x >= self.start
        if self.end is not None:
            inside &= x <= self.end
        return inside

    def _line(self, x: np.ndarray, y: np.ndarray, dense: bool, rows: int | None = None) -> Line:
        """A curve of some values.

        Args:
            dense: a step without a value is a gap; of a rare metric it is none.
            rows: steps of which these are some; None: they are all.
        """
        chosen = self._inside(x)
        if not dense:
            chosen &= ~np.isnan(y)
        x, y = x[chosen].astype(float), y[chosen]
        infinite = np.flatnonzero(np.isinf(y))[:MOST_INFINITE]
        values = np.flatnonzero(np.isfinite(y))
        last = (float(x[values[-1]]), float(y[values[-1]])) if len(values) else None
        told = [(float(x[at]), int(np.sign(y[at]))) for at in infinite]
        return Line(*reduced(x, y, self.points, self.log), last, len(x) if rows is None else rows, told)


def _flat(levels: np.ndarray, dense: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of lines and their values: of each level the least, greatest, last and last infinite one."""
    finite = levels[~np.isnan(levels["last"])]
    infinite = levels[levels["infinite"] != 0]
    at = [finite["low_at"], finite["high_at"], finite["last_at"], infinite["infinite_at"]]
    y = [finite["low"], finite["high"], finite["last"], np.inf * infinite["infinite"]]
    if dense:
        gaps = levels[levels["count"] == 0]
        at, y = [*at, gaps["first"]], [*y, np.full(len(gaps), np.nan)]
    unique, which = np.unique(np.concatenate(at), return_index=True)
    return unique, np.concatenate(y)[which]


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
    shown: Shown,
    first: float | None,
) -> dict[str, Line]:
    records = sample_records(Path(folder) / METRICS, min(SAMPLED, max(shown.points, 2)))
    if shown.axis == "time":
        first = first if first is not None or not records else records[0]["time"]
        x = np.array([record["time"] - (first or 0.0) for record in records], float)
    elif shown.axis == "step":
        x = np.array([record["step"] for record in records], float)
    else:
        counts = [next((record[unit] for unit in shown.units if record.get(unit)), 0.0) for record in records]
        x = shown.factor * np.array(counts, float)
    found = {}
    for name in names:
        key, _, how = name.rpartition(".")
        y = np.array([_over(record.get(key), how) for record in records], float)
        found[name] = shown._line(x, y, dense=bool(2 * np.count_nonzero(~np.isnan(y)) > len(y)))
    return found


def _over(values: Any, how: str) -> float:
    numbers = [each for each in values if type(each) in (int, float)] if isinstance(values, list) else []
    return float(OF_LISTS[how](np.array(numbers, float))) if numbers else float("nan")
