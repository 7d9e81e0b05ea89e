"""The columns of one run for a page that stays open: only what has been appended is read."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..lines import EVENTS, METRICS, read_events
from . import parts
from .levels import LEVEL, PartLevels, levels_of
from .parse import KEYS, parsed_lines
from .parts import Copy, DamagedCopy, Part, joined, update_columns
from .rows import Rows, counting, rows_of

TRIES = 5
"""Times that a copy may turn out to be damaged, or be replaced, while it is read."""


class Lines(NamedTuple):
    """Lines that are not superseded, in the order of steps; [lines] each."""

    row: np.ndarray
    """Their numbers in the file, int32; of training lines ascending."""
    step: np.ndarray
    time: np.ndarray

    def size(self) -> int:
        return sum(array.nbytes for array in self)


NONE = Lines(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0))


class _Held(NamedTuple):
    """A part."""

    part: Part
    bounds: np.ndarray
    """Number of the first line of each of its row groups in the file, and of the line after the last."""

    @property
    def first(self) -> int:
        return int(self.bounds[0])

    @property
    def end(self) -> int:
        return int(self.bounds[-1])


class LiveColumns:
    """One run. `refresh` and everything else is called by one thread at a time."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.recounted = 0
        """Grows whenever `train` and `evaluations` have become others, and not only longer."""
        self._clear()

    def _clear(self) -> None:
        self.train = self.evaluations = NONE
        self.recounted += 1
        self.left_out = 0
        """Metrics of one line above as many as are read."""
        self._file: list[int] = []
        self._end = 0
        self._held: list[_Held] = []
        self._tail: list[dict[str, np.ndarray]] = []
        self._rollbacks: list[dict[str, Any]] = []
        self._events: tuple[int, ...] = ()
        self._levels: dict[str, dict[Part, np.ndarray]] = {}
        self._evaluated: dict[str, dict[Part, int]] = {}
        self._names: dict[Part, tuple[str, ...]] = {}

    def size(self) -> int:
        """Bytes that are kept."""
        tail = sum(array.nbytes for piece in self._tail for array in piece.values())
        levels = sum(array.nbytes for of_parts in self._levels.values() for array in of_parts.values())
        names = sum(100 * len(names) for names in self._names.values())
        return self.train.size() + self.evaluations.size() + tail + levels + names

    @property
    def _covered(self) -> int:
        """Lines in parts."""
        return self._held[-1].end if self._held else 0

    def refresh(self) -> None:
        """Read what has been appended.

        Raises:
            OSError: the record cannot be read.
        """
        for _ in range(TRIES):
            with contextlib.suppress(DamagedCopy):
                return self._refresh()
            self._clear()
        raise OSError(f"{self.run_dir}: its columns cannot be read")

    def _refresh(self) -> None:
        *file, size = _identity(self.run_dir)
        if file != self._file or size < self._end:
            self._clear()
            self._file = file
        with contextlib.suppress(OSError):  # a folder that cannot be written: it takes longer
            update_columns(self.run_dir, self._held[-1].part.end if self._held else None)
        with Copy(self.run_dir) as copy:
            same = [held.part for held in self._held if held.part in copy.parts]
            shrunk = len(same) < len(self._held) - 1 or copy.end < (self._held[-1].part.end if self._held else 0)
            if shrunk or copy.end > self._end + 2 * parts.TAIL:  # the copy was damaged, or not looked at for long
                self._clear()
                self._file = file
            new = []
            if not self._end:
                self._hold(copy)
                new = [copy.read(held.part, KEYS) for held in self._held]
                self._end = copy.end
            for parsed in parsed_lines(self.run_dir, self._end):
                self._tail.append(dict(parsed.columns))
                new.append({key: parsed.columns[key] for key in KEYS})
                self._end, self.left_out = parsed.end, max(self.left_out, parsed.left_out)
            self._count(copy, new)
            self._hold(copy)
        if len(self._tail) > 8:
            names = dict.fromkeys(name for piece in self._tail for name in piece)
            self._tail = [joined(self._tail, list(names))]

    def _hold(self, copy: Copy) -> None:
        """Let go of lines of the tail that are in parts now."""
        before = self._covered
        kept = [held for held in self._held if held.part in copy.parts]
        for part in copy.parts[len(kept) :]:
            groups, left_out = copy.told(part)
            self.left_out = max(self.left_out, left_out)
            kept.append(_Held(part, np.cumsum([kept[-1].end if kept else 0, *groups])))
        self._held = kept
        gone = self._covered - before
        while self._tail and gone > 0:
            piece = self._tail[0]
            rows = len(piece["step"])
            if rows > gone:
                self._tail[0] = {name: values[gone:].copy() for name, values in piece.items()}
            else:
                del self._tail[0]
            gone -= rows
        there = {held.part for held in kept}
        known: tuple[dict[Part, Any], ...] = (*self._levels.values(), *self._evaluated.values(), self._names)
        for each in known:
            for part in each.keys() - there:
                del each[part]

    def _count(self, copy: Copy, new: list[dict[str, np.ndarray]]) -> None:
        """Take in new lines, or see anew which count."""
        rollbacks = self._rollbacks
        if (changed := _changed(self.run_dir / EVENTS)) != self._events:
            rollbacks = [event for event in read_events(self.run_dir) if event["event"] == "rollback"]
        same = rollbacks == self._rollbacks
        self._rollbacks, self._events = rollbacks, changed
        rows = rows_of(new)
        before = self._lines - len(rows.step)
        counts = counting(rows, rollbacks)
        if not (before and same and counts.all() and self._follow(rows)):
            if before:
                pieces = [copy.read(held.part, KEYS) for held in self._held]
                rows = rows_of(pieces + [{key: piece[key] for key in KEYS} for piece in self._tail])
                counts = counting(rows, rollbacks)
                before = 0
            self.train = self.evaluations = NONE
            self.recounted += 1
            self._levels.clear()
        evaluated = np.flatnonzero(counts & rows.evaluation)
        evaluated = evaluated[np.argsort(rows.step[evaluated], kind="stable")]
        self.train = _appended(self.train, rows, np.flatnonzero(counts & ~rows.evaluation), before)
        self.evaluations = _appended(self.evaluations, rows, evaluated, before)

    @property
    def _lines(self) -> int:
        return self._covered + sum(len(piece["step"]) for piece in self._tail)

    def _follow(self, rows: Rows) -> bool:
        """Whether new lines, all of which count, come after those that are known."""
        both = (self.train, rows.step[~rows.evaluation]), (self.evaluations, rows.step[rows.evaluation])
        return all((np.diff(np.concatenate([lines.step[-1:], steps])) > 0).all() for lines, steps in both)

    def names(self) -> list[str]:
        """All metrics of the run that are numbers, in the order in which they began.

        Raises:
            DamagedCopy: refresh, and try again.
        """
        found: dict[str, None] = {}
        with Copy(self.run_dir) as copy:
            for held in self._held:
                if held.part not in self._names:
                    self._names[held.part] = tuple(copy.levels(held.part).names)
                found |= dict.fromkeys(self._names[held.part])
        for piece in self._tail:
            found |= dict.fromkeys(name for name in piece if name not in KEYS)
        return list(found)

    def values(self, names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """The values of some lines, [rows] each; NaN where a line has no such number.

        Args:
            rows: numbers of the lines in the file.

        Raises:
            DamagedCopy: refresh, and try again.
        """
        found = {name: np.full(len(rows), np.nan) for name in names}
        if not len(rows):
            return found
        order = None
        if (np.diff(rows) < 0).any():
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
        with Copy(self.run_dir) as copy:
            for held in self._held:
                begin, end = np.searchsorted(rows, [held.first, held.end])
                if begin == end:
                    continue
                own = rows[begin:end]
                groups, which = np.unique(np.searchsorted(held.bounds, own, "right") - 1, return_inverse=True)
                read = copy.read(held.part, names, groups.tolist())
                sizes = np.diff(held.bounds)[groups]
                place = own - held.bounds[groups][which] + (np.cumsum(sizes) - sizes)[which]
                for name, values in read.items():
                    found[name][begin:end] = values[place]
        first = self._covered
        for piece in self._tail:
            count = len(piece["step"])
            begin, end = np.searchsorted(rows, [first, first + count])
            for name in names if begin < end else ():
                if name in piece:
                    found[name][begin:end] = piece[name][rows[begin:end] - first]
            first += count
        if order is not None:
            found = {name: _put(values, order) for name, values in found.items()}
        return found

    def levels(self, names: Sequence[str], begin: int = 0, end: int | None = None) -> dict[str, np.ndarray]:
        """The levels of the training lines [begin, end): [levels] of `levels.LEVEL`, whose numbers are of `train`.

        Raises:
            DamagedCopy: refresh, and try again.
        """
        self._read_levels(names)
        end = len(self.train.row) if end is None else end
        covered = int(np.searchsorted(self.train.row, self._covered))
        whole = {
            name: np.concatenate([np.zeros(0, LEVEL), *(self._levels[name][held.part] for held in self._held)])
            for name in names
        }
        firsts = next(iter(whole.values()))["first"] if whole else np.zeros(0, np.int32)  # the same for all
        ends = np.append(firsts[1:], covered)[: len(firsts)]
        low, high = int(np.searchsorted(firsts, begin)), int(np.searchsorted(ends, min(end, covered), "right"))
        left, right = (int(firsts[low]), int(ends[high - 1])) if low < high else (end, end)
        first = self.values(names, self.train.row[begin:left])
        last = self.values(names, self.train.row[right:end])
        return {
            name: np.concatenate([levels_of(first[name], begin), levels[low:high], levels_of(last[name], right)])
            for name, levels in whole.items()
        }

    def counts(self, names: Sequence[str]) -> dict[str, tuple[int, int]]:
        """How many training lines that count have a metric, and how many evaluations (superseded ones too).

        Raises:
            DamagedCopy: refresh, and try again.
        """
        self._read_levels(names)
        covered = int(np.searchsorted(self.train.row, self._covered))
        tail = self.values(names, self.train.row[covered:])
        found = {}
        for name in names:
            trained = sum(int(levels["count"].sum()) for levels in self._levels[name].values())
            evaluated = [piece[name][piece["evaluation"]] for piece in self._tail if name in piece]
            found[name] = (
                trained + int(np.count_nonzero(~np.isnan(tail[name]))),
                sum(self._evaluated[name].values()) + sum(int((~np.isnan(each)).sum()) for each in evaluated),
            )
        return found

    def _read_levels(self, names: Sequence[str]) -> None:
        known = [(self._levels.setdefault(name, {}), self._evaluated.setdefault(name, {})) for name in names]
        with Copy(self.run_dir) as copy:
            for held in self._held:
                missing = [name for name, (levels, _) in zip(names, known, strict=True) if held.part not in levels]
                if missing:
                    stored = copy.levels(held.part)
                    for name, levels in self._of_part(copy, held, stored, missing).items():
                        self._levels[name][held.part] = levels
                        self._evaluated[name][held.part] = stored.evaluated(name)

    def _of_part(self, copy: Copy, held: _Held, stored: PartLevels, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The levels of a part's training lines that count; where all of a row group do, they are stored."""
        train = np.searchsorted(self.train.row, held.bounds)
        evaluated = np.searchsorted(np.sort(self.evaluations.row), held.bounds)
        counts = np.diff(train)
        whole = counts + np.diff(evaluated) == np.diff(held.bounds)
        others = [np.arange(*train[group : group + 2]) for group in np.flatnonzero(~whole)]
        values = self.values(names, self.train.row[np.concatenate(others)]) if others else {}
        ends = np.cumsum([len(lines) for lines in others])
        found = {}
        for name in names:
            try:
                levels = [stored.of(name, np.where(whole, train[:-1], -1), counts)]
            except Exception as error:  # what is stored is not of this part
                copy.discard(held.part)
                raise DamagedCopy(held.part.name) from error
            for lines, last in zip(others, ends, strict=True):
                levels.append(levels_of(values[name][last - len(lines) : last], int(lines[0]) if len(lines) else 0))
            found[name] = np.concatenate(levels)
            found[name].sort(order="first")
        return found


def _appended(lines: Lines, rows: Rows, which: np.ndarray, first: int) -> Lines:
    """Lines and some of the rows behind them.

    Args:
        first: number of the first of the rows in the file.
    """
    new = Lines((first + which).astype(np.int32), rows.step[which], rows.time[which])
    return Lines(*(np.concatenate(pair) if len(pair[0]) else pair[1] for pair in zip(lines, new, strict=True)))


def _put(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    found = np.empty_like(values)
    found[order] = values
    return found


def _changed(path: Path) -> tuple[int, ...]:
    try:
        status = path.lstat()
    except OSError:
        return (0, -1)
    return (status.st_mtime_ns, status.st_size)


def _identity(run_dir: Path) -> tuple[int, int, int]:
    """Which file metrics.jsonl is, and its bytes."""
    try:
        status = (run_dir / METRICS).lstat()
    except OSError:
        return (0, 0, 0)
    return (status.st_dev, status.st_ino, status.st_size)
