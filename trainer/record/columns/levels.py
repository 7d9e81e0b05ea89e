"""What a chart of many steps shows: of every so many training lines the least, the greatest and the last value."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .parse import KEYS, as_numpy

BUCKET = 256
"""Lines of a level."""
LEVEL = np.dtype([
    ("first", np.int32), ("count", np.int32), ("low", float), ("high", float), ("last", float), ("low_at", np.int32),
    ("high_at", np.int32), ("last_at", np.int32), ("infinite", np.int8), ("infinite_at", np.int32),
])  # fmt: skip
"""Of `BUCKET` lines or fewer: the number of the first; how many have a value that is not NaN; the least, greatest and
last finite value (NaN where there is none) and the numbers of their lines; 1 or -1, the sign of the last infinite one
(0 where there is none), and the number of its line."""
_STORED = LEVEL.names or ()
_PLACES = ("first", "low_at", "high_at", "last_at", "infinite_at")


def levels_of(values: np.ndarray, first: int = 0) -> np.ndarray:
    """The levels of some lines.

    Args:
        values: [..., lines]
        first: the number of the first line.

    Returns:
        [..., lines / BUCKET, rounded up] of `LEVEL`.
    """
    *others, lines = values.shape
    buckets = -(-lines // BUCKET)
    padded = np.full((*others, buckets * BUCKET), np.nan)
    padded[..., :lines] = values
    padded = padded.reshape(*others, buckets, BUCKET)
    finite = np.isfinite(padded)
    some = finite.any(-1)
    found = np.zeros((*others, buckets), LEVEL)
    found["first"] = first + BUCKET * np.arange(buckets)
    found["count"] = BUCKET - np.isnan(padded).sum(-1)
    low_at = np.where(finite, padded, np.inf).argmin(-1)
    high_at = np.where(finite, padded, -np.inf).argmax(-1)
    last_at = BUCKET - 1 - finite[..., ::-1].argmax(-1)
    for name, at in (("low", low_at), ("high", high_at), ("last", last_at)):
        found[name] = np.where(some, np.take_along_axis(padded, at[..., None], -1)[..., 0], np.nan)
        found[f"{name}_at"] = found["first"] + at
    if (found["count"] > finite.sum(-1)).any():
        infinite = np.isinf(padded)
        at = BUCKET - 1 - infinite[..., ::-1].argmax(-1)
        value = np.take_along_axis(padded, at[..., None], -1)[..., 0]
        found["infinite"] = np.where(infinite.any(-1), np.sign(value), 0)
        found["infinite_at"] = found["first"] + at
    return found


def stored_levels(columns: Mapping[str, np.ndarray], group: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The levels of a part as a table and what is told of it.

    Args:
        columns: of its lines.
        group: lines of a row group; levels of one do not reach into the next.

    Returns:
        The fields of `LEVEL` and the number of the metric, by which they are sorted; [levels] each. `first` and the
        others that end in `_at` count the training lines of the row group `group`. Levels without a value are left out.
    """
    names = [name for name in columns if name not in KEYS]
    evaluation = columns["evaluation"]
    parts = []
    for number, start in enumerate(range(0, len(evaluation), group)):
        rows = start + np.flatnonzero(~evaluation[start : start + group])
        some = max(1, (1 << 20) // max(len(rows), 1))  # as many metrics at a time
        for begin in range(0, len(names), some):
            values = np.stack([columns[name][rows] for name in names[begin : begin + some]])
            levels = levels_of(values)
            metric, bucket = np.nonzero(levels["count"])
            parts.append((begin + metric, np.full(len(metric), number), levels[metric, bucket]))
    metric, groups, levels = (
        [np.concatenate(each) for each in zip(*parts, strict=True)]
        if parts
        else [np.zeros(0, int), np.zeros(0, int), np.zeros(0, LEVEL)]
    )
    order = np.lexsort((levels["first"], groups, metric))
    table = {"metric": metric[order].astype(np.int32), "group": groups[order].astype(np.int32)}
    table |= {field: levels[field][order] for field in _STORED}
    evaluated = {
        str(number): count
        for number, name in enumerate(names)
        if (count := int((evaluation & ~np.isnan(columns[name])).sum()))
    }
    return table, {"muster.names": json.dumps(names), "muster.evaluated": json.dumps(evaluated)}


class PartLevels:
    """The levels of a part as they are stored."""

    def __init__(self, file: Any) -> None:
        """Raises any kind of exception for a file that cannot be used."""
        told = file.metadata.metadata
        names = json.loads(told[b"muster.names"])
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names of metrics are texts")
        self.names: dict[str, int] = {name: number for number, name in enumerate(names)}
        self._evaluated = {int(number): int(count) for number, count in json.loads(told[b"muster.evaluated"]).items()}
        table = file.read(use_threads=False)
        self._metric, self._group = (as_numpy(table.column(name), int) for name in ("metric", "group"))
        self._levels = np.zeros(table.num_rows, LEVEL)
        for field in _STORED:
            self._levels[field] = as_numpy(table.column(field), LEVEL[field].type)
        if len(self._metric) and not ((np.diff(self._metric) >= 0).all() and self._metric[0] >= 0):
            raise ValueError("levels are sorted by metric")
        if any((self._levels[field] < 0).any() for field in _PLACES):
            raise ValueError("a level is of lines of its row group")

    def evaluated(self, name: str) -> int:
        """Lines of evaluations that have this metric, superseded ones too."""
        return self._evaluated.get(self.names.get(name, -1), 0)

    def of(self, name: str, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The levels of a metric in some row groups, those without a value too.

        Args:
            firsts: number of each group's first training line; -1 of a group that is not asked for.
            counts: training lines of each group.
        """
        number = self.names.get(name, -1)
        begin, end = np.searchsorted(self._metric, [number, number + 1]) if number >= 0 else (0, 0)
        group, stored = self._group[begin:end], self._levels[begin:end]
        asked = firsts >= 0
        buckets = np.where(asked, -(-counts // BUCKET), 0)
        before = np.concatenate([[0], np.cumsum(buckets)])
        found = np.zeros(before[-1], LEVEL)
        for each in ("low", "high", "last"):
            found[each] = np.nan
        own = np.repeat(np.arange(len(firsts)), buckets)
        found["first"] = firsts[own] + BUCKET * (np.arange(before[-1]) - before[own])
        if (group >= len(firsts)).any() or (group < 0).any():
            raise ValueError("a level is of a row group of its part")
        kept = asked[group]
        group, stored = group[kept], stored[kept].copy()
        bucket, lines = stored["first"] // BUCKET, counts[group]
        for field in _PLACES:
            if (stored[field] >= lines).any():
                raise ValueError("a level is of lines of its row group")
            stored[field] += firsts[group].astype(np.int32)
        found[before[group] + bucket] = stored
        return found
