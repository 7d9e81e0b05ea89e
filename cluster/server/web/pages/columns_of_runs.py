"""The table of all runs by column: their rows, and any config key or metric beside them."""

import gzip
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.files.plain_json import dump
from trainer.record.columns.live import LiveColumns

from ..index.config_values import value_of
from ..index.runs_index import Entry, View
from ..responses import ROW
from .series import Columns

METRIC = "metric:"
LAST, BEST, MAX = "last", "best", "max"
MEAN = re.compile(r"mean([1-9]\d{0,3})")
"""With the number of records at the end that it is of."""
PATIENCE = 2.0
"""Seconds of one request that go into reading records; what is left is null, and known the next time."""
MOST_KNOWN = 200_000


class ColumnsOfRuns:
    """Builds the table once for each view."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._lock = threading.Lock()
        self._table: tuple[str, bytes, bytes] = ("", b"", b"")
        self._keys: tuple[str, dict[str, Any]] = ("", {})
        self._known: dict[tuple[str, str, str], tuple[tuple[int, ...], float | None]] = {}

    def table(self, view: View) -> tuple[bytes, bytes]:
        """As `responses.Runs` in JSON, and the same compressed."""
        with self._lock:
            if self._table[0] != view.version:
                plain = dump(_told(view, view.entries)).encode()
                self._table = view.version, plain, gzip.compress(plain, 1)
            return self._table[1:]

    def changes(self, view: View, since: str) -> dict[str, Any] | None:
        """As `responses.Runs`, of the rows that are others than in a version; None: the whole table is as well."""
        changed = view.since(since)
        if changed is None or 2 * len(changed) > len(view.entries):
            return None
        places = sorted(view.place[id] for id in changed if id in view.place)
        gone = sorted(changed - view.place.keys())
        return _told(view, [view.entries[place] for place in places]) | {"places": places, "gone": gone}

    def keys(self, view: View) -> dict[str, Any]:
        """As `responses.Keys`."""
        with self._lock:
            if self._keys[0] != view.version:
                shapes = {id(part.keys): part.keys for entry in view.entries for part in entry.config}
                metrics = {id(entry.metrics.keys): entry.metrics.keys for entry in view.entries}
                told = {
                    "keys": list(dict.fromkeys(key for keys in shapes.values() for key in keys)),
                    "metrics": list(dict.fromkeys(key for keys in metrics.values() for key in keys)),
                }
                self._keys = view.version, told
            return self._keys[1]

    def columns(self, view: View, keys: Sequence[str], since: str = "", run: str = "") -> dict[str, Any]:
        """As `responses.RunColumns`: a value for each run, for those that are others than in a version, or for one."""
        changed = {run} if run else view.since(since) if since else None
        entries: Sequence[Entry] = view.entries
        told: dict[str, Any] = {"version": view.version, "ids": None, "gone": []}
        if changed is not None:
            entries = [view.entries[place] for place in sorted(view.place[id] for id in changed if id in view.place)]
            told |= {"ids": [entry.row.id for entry in entries], "gone": sorted(changed - view.place.keys())}
        late: set[str] = set()
        until = time.monotonic() + PATIENCE
        told["columns"] = {key: self._column(entries, key, until, late) for key in keys}
        return told | {"late": len(late)}

    def _column(self, entries: Sequence[Entry], key: str, until: float, late: set[str]) -> list[Any]:
        if not key.startswith(METRIC):
            return [value_of(entry.config, key) for entry in entries]
        name, _, how = key.removeprefix(METRIC).partition(":")
        if how in ("", LAST):
            return [value_of((entry.metrics,), name) for entry in entries]
        if how not in (BEST, MAX) and not MEAN.fullmatch(how):
            return [None] * len(entries)
        return [self._of_record(entry, name, how, until, late) for entry in entries]

    def _of_record(self, entry: Entry, name: str, how: str, until: float, late: set[str]) -> float | None:
        """The least or the greatest value of a metric, or the mean of its last ones.

        Args:
            until: when records are read no longer.
            late: gets the ids of the runs whose values are not of now because of that.
        """
        place, now = (entry.run.folder, name, how), entry.run.signature[:4]
        known = self._known.get(place)
        if known is None or known[0] != now:
            if name not in entry.metrics.keys:
                return known[1] if known else None
            if time.monotonic() > until:
                late.add(entry.row.id)
                return known[1] if known else None
            try:
                value = self._columns.read(entry.run.folder, lambda kept: _value(kept.columns, name, how))
            except OSError:
                value = None
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            known = self._known[place] = now, value
        return known[1]


def _told(view: View, entries: Sequence[Entry]) -> dict[str, Any]:
    columns = {name: [getattr(entry.row, name) for entry in entries] for name in ROW}
    return {"count": len(view.entries), "left": view.left, "version": view.version, "columns": columns}


def _value(columns: LiveColumns, name: str, how: str) -> float | None:
    trained, evaluated = columns.counts([name])[name]
    lines = columns.train if trained >= max(evaluated, 1) else columns.evaluations
    if mean := MEAN.fullmatch(how):
        wanted, found = int(mean[1]), np.zeros(0)
        for begin in (max(0, len(lines.row) - 4 * wanted), 0):  # of a rare metric all lines
            if len(found) < wanted:
                found = columns.values([name], lines.row[begin:])[name]
                found = found[np.isfinite(found)]
        found = found[-wanted:]
        return float(found.mean()) if len(found) else None
    if lines is columns.train:
        found = columns.levels([name])[name]["low" if how == BEST else "high"]
    else:
        found = columns.values([name], lines.row)[name]
    found = found[np.isfinite(found)]
    return float(found.min() if how == BEST else found.max()) if len(found) else None
