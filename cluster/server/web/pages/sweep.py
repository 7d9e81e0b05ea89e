"""Sweeps below the roots: which there are, how their trials stand, and what their law rests on."""

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cluster.sweep.results.score import PREDICTIONS
from cluster.sweep.train.progress import PLAN, Books, Progress, progress, read_mapping, to_json
from cluster.sweep.train.trial_state import Ledger
from configs import ConfigError
from configs.reading.parse import shortened
from configs.sweep.definition import SweepConfig, sweep_from_dict
from trainer.record.lines import EVENTS
from trainer.record.terminal import visible
from trainer.tracking.sweep import SWEEP, TRIALS

from ..index.config_values import value_of
from ..index.rows import is_folder
from ..index.runs_index import Entry, View

MOST_KEPT = 8
"""Sweeps of whose trials the last reading is kept."""
LISTED = 500
TIMES = ("device", "device_seconds", "in_steps", "seconds")
NOT_BOOKED = Books("", 0.0, {"step": 0.0})
"""Where the devices' time went is worked out with the law: it takes every line of the records."""
LIVE = ("running", "waiting", "stopped")


class Swept(NamedTuple):
    """A sweep's folder, and the trials of it that the index knows."""

    id: str
    folder: Path
    root: Path
    entries: dict[str, Entry]
    """By the names of their folders."""


class Sweeps:
    """The sweeps of an index's views; what was read of a few is kept."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._of: tuple[str, dict[str, Swept]] = ("", {})
        self._ledgers: OrderedDict[Path, tuple[Ledger, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()

    def all(self, view: View) -> dict[str, Swept]:
        """By their ids, in the order in which they began: the name, after `ROOT:` in a root but the first."""
        version, found = self._of
        if version != view.version:
            found = self._found(view)
            self._of = view.version, found
        return found

    def _found(self, view: View) -> dict[str, Swept]:
        by_folder: dict[str, dict[str, Entry]] = {}
        for entry in view.entries:
            if entry.row.sweep is not None:
                folder = os.path.dirname(os.path.dirname(entry.run.folder))
                by_folder.setdefault(folder, {})[os.path.basename(entry.run.folder)] = entry
        found: dict[str, Swept] = {}
        for folder, entries in by_folder.items():
            id, path = _id_of(next(iter(entries.values()))), Path(folder)
            while id in found:
                id += "~"
            found[id] = Swept(id, path, path.parent, entries)
        return found

    def listed(self, view: View) -> list[dict[str, Any]]:
        """A line for each sweep, the newest first, by the rows of its trials alone."""
        told = []
        for sweep in list(self.all(view).values())[::-1][:LISTED]:
            rows = [entry.row for entry in sweep.entries.values()]
            losses = [row.eval_loss for row in rows if row.status == "FINISHED" and row.eval_loss is not None]
            counts = {state: sum(row.status == state for row in rows) for state in ("RUNNING", "FINISHED", "FAILED")}
            told.append({
                "id": sweep.id, "name": visible(sweep.folder.name), "begun": len(rows),
                "running": counts["RUNNING"], "finished": counts["FINISHED"], "failed": counts["FAILED"],
                "best": min(losses, default=None), "started": min((row.started or 0.0 for row in rows), default=0.0),
                "updated": max((row.updated or 0.0 for row in rows), default=0.0),
            })  # fmt: skip
        return told

    def shown(self, sweep: Swept) -> dict[str, Any]:
        """How its trials stand, as `muster sweep status`. Raises ConfigError if it cannot be read."""
        found = self.progress(sweep)
        design, problem = None, ""
        try:
            design = definition(sweep)
        except ConfigError as error:
            problem = visible(str(error))[:1000]
        axes = list(design.axes) if design else []
        status = {key: value for key, value in to_json(found).items() if key not in TIMES}
        trials = [_trial(row, sweep, axes) for row in status.pop("trials")]
        return status | {
            "id": sweep.id, "name": visible(sweep.folder.name), "folder": visible(str(sweep.folder)),
            "problem": problem,
            "design": design.design.__class__.__name__.removesuffix("Design").lower() if design else None,
            "count": design.count if design else "active", "axes": axes, "trials": trials,
            "seeds": len(design.seeds) if design else 1,
            "unit": next((entry.row.unit for entry in sweep.entries.values() if entry.row.step), "tokens"),
        }  # fmt: skip

    def progress(self, sweep: Swept) -> Progress:
        """Raises ConfigError if the records cannot be read."""
        for path in (sweep.folder, sweep.folder / TRIALS):
            if not is_folder(str(path)):
                raise ConfigError(f"{visible(sweep.folder.name)} is gone, or is a link")
        linked = [entry.name for entry in os.scandir(sweep.folder / TRIALS) if entry.is_symlink()]
        if linked:
            raise ConfigError(f"{TRIALS}/{visible(linked[0])} is a link, which is not followed: remove it")
        with self._lock:
            ledger, reading = self._ledgers.setdefault(sweep.folder, (Ledger(sweep.folder), threading.Lock()))
            self._ledgers.move_to_end(sweep.folder)
            while len(self._ledgers) > MOST_KEPT:
                self._ledgers.popitem(last=False)
        try:
            with reading:
                return progress(sweep.folder, ledger, NOT_BOOKED)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"its records cannot be read: {shortened(error, 300)}") from None

    def rests_on(self, sweep: Swept) -> tuple[Any, ...]:
        """What its law follows from: equal as long as the law is the same. Raises ConfigError as `progress`."""
        found = self.progress(sweep)
        over = tuple(
            (name, each.state, each.eval_loss) for name, each in found.standings.items() if each.state not in LIVE
        )
        scored = tuple(_changed(path) for path in self._scored(sweep))
        return (over, tuple(_changed(sweep.folder / name) for name in (SWEEP, PLAN, PREDICTIONS)), scored)

    def _scored(self, sweep: Swept) -> list[Path]:
        """Records of the runs beside the sweep that it may have predicted."""
        if not os.path.lexists(sweep.folder / PREDICTIONS):
            return []
        try:
            names = [
                entry.name for entry in os.scandir(sweep.root) if entry.name.startswith(f"{sweep.folder.name}-next-")
            ]
        except OSError:
            return []
        return [sweep.root / name / EVENTS for name in sorted(names)[:100]]

    def question(self, sweep: Swept, budget: float | None, max_budget: float | None) -> dict[str, Any]:
        """For `cluster.sweep.results.law_page`."""
        return {
            "folder": str(sweep.folder), "roots": [str(root) for root in self._roots], "budget": budget,
            "max_budget": max_budget,
        }  # fmt: skip


def definition(sweep: Swept) -> SweepConfig:
    """As it was run. Raises ConfigError."""
    return sweep_from_dict(read_mapping(sweep.folder / SWEEP), SWEEP)


def _id_of(entry: Entry) -> str:
    """`ROOT:SWEEP` of a trial's `ROOT:SWEEP:TRIAL`, which may end in `~`."""
    return entry.row.id[: entry.row.id.rindex(f":{entry.row.name}")]


def _trial(row: dict[str, Any], sweep: Swept, axes: Sequence[str]) -> dict[str, Any]:
    entry = sweep.entries.get(row["name"])
    values = {key: value_of(entry.config, key) for key in axes} if entry else {}
    return {
        "name": row["name"], "run": entry.row.id if entry else None, "variant": visible(row["variant"]),
        "budget": row["budget"], "flops": row["flops"], "tokens": row["tokens"], "parameters": row["parameters"],
        "step": row["step"], "steps": row["steps"], "from_step": row["from_step"], "state": row["state"],
        "loss": row["loss"], "eval_loss": row["eval_loss"], "reason": visible(row["reason"])[:1000],
        "updated": row["updated"] or None, "values": values,
    }  # fmt: skip


def _changed(path: Path) -> tuple[int, int]:
    try:
        found = os.lstat(path)
    except OSError:
        return 0, -1
    return (found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else (0, -1)
