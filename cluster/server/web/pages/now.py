"""What needs a person now, what runs, and what ended lately."""

import os
import time
from collections.abc import Iterator
from typing import Any

from trainer.record.lines import read_events
from trainer.record.notable import notable
from trainer.record.terminal import visible
from trainer.tracking import read_state

from ..index.runs_index import Entry, View
from .details import Books, meant, parts

DAY = 86400.0
MOST_ENDED = 12
MOST_PROBLEMS = 50
MOST_RUNNING = 200
OLD = 30.0
"""Seconds for which the goodput of a run that is being trained is not worked out again."""
STALLED = 60.0
"""Seconds without a step, and 10 times the time of one, after which a run is said to stand."""
FULL = 0.05
"""Share of a disk that is free when it is said to fill."""
LASTING = {"straggler": "straggler_recovered", "experts_collapsed": "experts_recovered"}
THEN = {
    "straggler": "the run continues; check that machine, or let the run leave it out",
    "experts_collapsed": "check the expert load; a higher aux_loss_weight or router_bias_rate spreads tokens",
    "checkpoint_failed": "the last good checkpoint is kept; free some disk space",
    "spike": "check the loss; with train.spike.action=rollback the run would roll back by itself",
}


class Glance:
    """Builds the page; what costs something is kept for a while."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._whole: dict[str, tuple[float, dict[str, float]]] = {}
        self._warned: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]] = {}

    def now(self, view: View, roots: list[Any]) -> dict[str, Any]:
        """As `responses.Now`."""
        at = time.time()
        running = [entry for entry in view.entries if entry.row.status == "RUNNING"]
        ended = [
            entry
            for entry in view.entries
            if entry.row.status in ("FINISHED", "STOPPED", "FAILED") and at - (entry.row.updated or 0.0) < DAY
        ]
        ended.sort(key=lambda entry: -(entry.row.updated or 0.0))
        running.sort(key=lambda entry: -(entry.row.started or 0.0))
        disks = [disk for disk in map(_disk, roots) if disk]
        problems = [*self._failed(ended, view), *self._warnings(running, at), *_filling(disks)]
        wholes = [self._seconds(entry, at) for entry in (*running[:MOST_RUNNING], *ended[:MOST_ENDED])]
        whole = {name: sum(each[name] for each in wholes) for name in wholes[0]} if wholes else {}
        self._forget(view)
        return {
            "problems": problems[:MOST_PROBLEMS],
            "running": [self._running(entry, at) for entry in running[:MOST_RUNNING]],
            "waiting": [],
            "jobs": [],
            "cluster": None,
            "machines": [],
            "ended": [entry.row.plain() for entry in ended[:MOST_ENDED]],
            "goodput": {"seconds": meant(whole) if whole else 0.0, "parts": parts(whole) if whole else []},
            "disks": disks,
            "left": view.left,
            "time": at,
        }

    def goodput(self, entry: Entry) -> float | None:
        """Share of the time that went into steps that count."""
        seconds = self._seconds(entry, time.time())
        spent = meant(seconds)
        return seconds["step"] / spent if spent > 0 else None

    def _seconds(self, entry: Entry, at: float) -> dict[str, float]:
        from trainer.record.goodput import BOOKS, total

        folder = entry.run.folder
        then, known = self._whole.get(folder, (0.0, {}))
        if at - then > OLD or not known:
            try:
                known = total(self._books.of(folder))
            except (OSError, ValueError):
                known = dict.fromkeys(BOOKS, 0.0)
            self._whole[folder] = at, known
        return known

    def _forget(self, view: View) -> None:
        if len(self._whole) > 1000 + len(view.entries) // 10:
            self._whole.clear()
            self._warned.clear()

    def _running(self, entry: Entry, at: float) -> dict[str, Any]:
        row, live = entry.row, entry.run.live
        pace = entry.run.pace()
        spark = live.spark if live else []
        every = max(1, -(-len(spark) // 60))
        left = None
        if pace is not None and row.steps is not None:
            left = max(row.steps - row.step, 0) * pace
        return row.plain() | {
            "spark": [loss for _, loss in spark[::-every][::-1]],
            "goodput": self.goodput(entry),
            "checkpoint": None
            if not live or live.checkpoint is None
            else {"step": live.checkpoint[0], "time": live.checkpoint[1]},
            "left": left,
        }

    def _failed(self, ended: list[Entry], view: View) -> Iterator[dict[str, Any]]:
        for entry in ended:
            if entry.row.status == "FAILED":
                row = entry.row
                when = f"failed at step {row.step:,}" if row.step else "failed before step 1"
                name = visible(os.path.basename(entry.run.folder))
                yield _problem("failed", row.id, when, row.reason or "no reason is recorded",
                               f"`muster train` or `muster retry` of {name} continues from its last checkpoint",
                               row.updated)  # fmt: skip
        for entry in view.entries:
            if entry.row.status == "UNREADABLE":
                yield _problem("warning", entry.row.id, "cannot be read", entry.row.reason or "",
                               "look at its folder", entry.row.updated)  # fmt: skip

    def _warnings(self, running: list[Entry], at: float) -> Iterator[dict[str, Any]]:
        for entry in running:
            row, pace = entry.row, entry.run.pace()
            quiet = at - (row.updated or at)
            if row.step and pace is not None and quiet > max(STALLED, 10 * pace):
                yield _problem(
                    "warning", row.id, f"no step for {quiet:,.0f} s",
                    f"a step took {pace:.3g} s of late; the last was {row.step:,}",
                    "the watchdog restarts an attempt that hangs", row.updated,
                )  # fmt: skip
            yield from self._told(entry)

    def _told(self, entry: Entry) -> list[dict[str, Any]]:
        """Warnings that its events and its tracker give."""
        folder, events_at = entry.run.folder, entry.run.signature[:2]
        known = self._warned.get(folder)
        if known is None or known[0] != events_at:
            known = events_at, self._of_events(entry)
            self._warned[folder] = known
        error = read_state(folder).get("error")
        if not error:
            return known[1]
        behind = _problem("warning", entry.row.id, "the tracker is behind", visible(str(error)[:500]),
                          "muster keeps trying; the record itself is complete", None)  # fmt: skip
        return [*known[1], behind]

    def _of_events(self, entry: Entry) -> list[dict[str, Any]]:
        try:
            events = read_events(entry.run.folder)
        except OSError:
            return []
        found = []
        last = {event["event"]: event for event in events if event["attempt"] == entry.row.attempts}
        for kind, told in notable(events).items():
            if kind not in THEN or kind not in last:
                continue
            recovered = last.get(LASTING.get(kind, ""))
            over = recovered is not None and recovered["time"] >= last[kind]["time"]
            over = over or (kind == "checkpoint_failed" and "checkpoint" in last
                            and last["checkpoint"]["time"] > told.time)  # fmt: skip
            over = over or (kind == "spike" and time.time() - told.time > 3600)
            if not over:
                what = kind.replace("_", " ")
                found.append(_problem("warning", entry.row.id, what, visible(told.text), THEN[kind], told.time))
        return found


def _problem(level: str, run: str | None, what: str, why: str, then: str, since: float | None) -> dict[str, Any]:
    return {"level": level, "run": run, "what": what, "why": why[:2000], "then": then, "since": since}


def _disk(root: Any) -> dict[str, Any] | None:
    try:
        found = os.statvfs(root)
    except OSError:
        return None
    unit = found.f_frsize
    return {"path": visible(str(root)), "free": found.f_bavail * unit, "total": found.f_blocks * unit}


def _filling(disks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for disk in disks:
        if disk["total"] and disk["free"] < FULL * disk["total"]:
            share = disk["free"] / disk["total"]
            yield _problem("warning", None, f"the disk of {disk['path']} is nearly full", f"{share:.1%} of it is free",
                           "checkpoints fail when it is full: delete runs, or lower checkpoint.keep", None)  # fmt: skip
