"""Which runs there are in some roots, and the row of each: found, read and kept up to date by one thread.

A look at ten thousand runs costs a core a fifth of a second, and hardly any has changed. So runs that are being trained
or were lately are looked at each time, the others in turn, and a root's own list when its time of change says so.
"""

import contextlib
import gc
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from trainer.record.lines import status_of
from trainer.record.terminal import visible
from trainer.tracking.sweep import TRIALS

from ..responses import RunRow
from . import colours, kept_rows
from .config_values import Config, Configs, Section
from .rows import CONFIG, LIVE, Run, is_folder, is_gone, refresh, signature

PLAN = "plan.json"
"""Of a sweep's folder."""
LATELY = 3600.0
"""Seconds since a run's last sign of life in which it is looked at each time."""
TURNS = 15
"""Looks in which every other run is looked at once."""
AGAIN = 30.0
"""Seconds after which a root is listed again, whatever its time of change says."""
PATIENCE = 0.5
"""Seconds of a look that go to runs which were not read before; the next one goes on."""
KEEP_EVERY = 60.0
COLOURED = 500
"""Folders that get the colour of their run in one look."""
MOST_RUNS = 100_000
MOST_VERSIONS = 200
"""Versions of which is known what has changed since."""
MOST_OTHERS = 1000
"""Folders of no run that are looked at each time."""


class Entry(NamedTuple):
    """A run as a view has it: nothing of it changes any more."""

    row: RunRow
    config: Config
    metrics: Section
    run: Run


@dataclass(frozen=True)
class View:
    """All runs at some time, in the order in which they began."""

    version: str = ""
    entries: Sequence[Entry] = ()
    left: int = 0
    place: dict[str, int] = field(default_factory=dict)
    """Of each id in `entries`."""
    history: Sequence[tuple[str, frozenset[str]]] = ()
    """Versions up to this one, and what changed, came or went with each."""

    def since(self, version: str) -> set[str] | None:
        """The ids of runs that have changed, come or gone since a version; None: it is not known any more."""
        found: set[str] = set()
        for known, changed in reversed(self.history):
            if known == version:
                return found
            found |= changed
        return None


@dataclass
class _Root:
    path: Path
    prefix: str
    listed: float = 0.0
    changed: dict[str, int] = field(default_factory=dict)
    """Time of change of each folder that holds runs: the root itself, and the trials of its sweeps."""
    kept: dict[str, Run] = field(default_factory=dict)
    stale: bool = False
    """Its file of rows is not what is known now."""


class RunsIndex:
    """The runs of these roots. `look` is called again and again, by one thread; `view` is anyone's."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.configs = Configs()
        names = [root.name for root in roots]
        self._roots = [
            _Root(root, "" if number == 0 else f"{visible(root.name)}{number if names.count(root.name) > 1 else ''}:")
            for number, root in enumerate(roots)
        ]
        self._runs: dict[str, Run] = {}
        self._ids: set[str] = set()
        self._unread: list[Run] = []
        self._uncoloured: list[Run] = []
        self._turn = 0
        self._kept_at = time.monotonic()
        self._process, self._number = secrets.token_hex(4), 0
        self._lock = threading.Lock()
        self._loaded = False
        self.view = View(version=(none := f"{self._process}-0"), history=((none, frozenset()),))
        self.ready = threading.Event()
        """Set once there is a view."""

    def add(self, root: Path) -> None:
        """Show the runs of one more root as well, from the next look on."""
        with self._lock:
            known = self.roots
            if root not in known:
                name = f"{visible(root.name)}{len(known) if root.name in [each.name for each in known] else ''}:"
                self._roots.append(_Root(root, name if known else ""))

    @property
    def unread(self) -> int:
        """Runs that have not been read yet."""
        return len(self._unread)

    @property
    def roots(self) -> list[Path]:
        return [root.path for root in self._roots]

    def find(self, id: str) -> Entry | None:
        """The run of this id, as it stood at the last look."""
        view = self.view
        place = view.place.get(id)
        return None if place is None else view.entries[place]

    def read_next(self, id: str) -> bool:
        """Read the run of this id before all others that have not been read: somebody waits for it.

        Returns:
            Whether there is one that has not been read.
        """
        with self._lock:
            for place, run in enumerate(self._unread):
                if run.id == id:
                    self._unread.append(self._unread.pop(place))
                    return True
        return False

    def look(self, patience: float = PATIENCE) -> set[str]:
        """Look at what may have changed.

        Args:
            patience: seconds for runs that were not read before.

        Returns:
            The ids of runs that have changed, come or gone.
        """
        with self._lock, _no_garbage_collection() if not self.ready.is_set() else contextlib.nullcontext():
            changed = self._find()
            changed |= self._check()
            changed |= self._read(patience)
            if changed or self.view.left != len(self._unread):
                self._show()
            self.ready.set()
            self._keep_colours(COLOURED)
            if time.monotonic() - self._kept_at >= KEEP_EVERY or (not self._unread and not self._loaded):
                self._loaded = self._loaded or not self._unread
                self._keep()
            return changed

    def look_at(self, id: str) -> None:
        """Look at one run at once: something has just been done to it."""
        with self._lock:
            if (entry := self.find(id)) and entry.run.folder in self._runs:
                self._refresh(entry.run, signature(entry.run.folder))
                self._show()

    def keep(self) -> None:
        """Write down the rows of what has ended; as the server ends."""
        with self._lock:
            self._keep_colours(len(self._uncoloured))
            self._keep()

    def _keep_colours(self, most: int) -> None:
        now, self._uncoloured = self._uncoloured[:most], self._uncoloured[most:]
        for run in now:
            colours.keep(run)

    def _keep(self) -> None:
        self._kept_at = time.monotonic()
        for root in self._roots:
            if root.stale:
                root.stale = False
                above = f"{root.path}/"
                kept_rows.save(root.path, [run for run in self._runs.values() if run.folder.startswith(above)])

    def _find(self) -> set[str]:
        """Take in new folders."""
        changed, unread = set(), len(self._unread)
        for root in self._roots:
            if not root.listed:
                root.kept = kept_rows.load(root.path, self.configs)
            again = time.monotonic() - root.listed >= AGAIN or not root.listed
            again = again or any(_changed_at(path) != before for path, before in root.changed.items())
            if not again:
                continue
            root.listed = time.monotonic()
            root.changed = {str(root.path): _changed_at(str(root.path))}
            for folder, sweep in self._folders(root):
                if folder not in self._runs and len(self._runs) < MOST_RUNS:
                    run = self._new(root, folder, sweep)
                    if run.row is not None:
                        changed.add(run.id)
            root.kept = {}
        if len(self._unread) > unread:
            self._unread.sort(key=lambda run: _changed_at(f"{run.folder}/{CONFIG}"))  # the newest is read first
        return changed

    def _folders(self, root: _Root) -> Iterator[tuple[str, str | None]]:
        """Each folder of a run, and the sweep that it is a trial of."""
        for name in _names(str(root.path)):
            folder = f"{root.path}/{name}"
            if folder in self._runs or name in root.kept or _is_file(f"{folder}/{CONFIG}"):
                yield folder, None
            elif _is_file(f"{folder}/{PLAN}") and is_folder(trials := f"{folder}/{TRIALS}"):
                root.changed[trials] = _changed_at(trials)
                for trial in _names(trials):
                    if f"{trials}/{trial}" in self._runs or _is_file(f"{trials}/{trial}/{CONFIG}"):
                        yield f"{trials}/{trial}", name
            elif len(root.changed) < MOST_OTHERS:  # it may become one
                root.changed[folder] = _changed_at(folder)

    def _new(self, root: _Root, folder: str, sweep: str | None) -> Run:
        kept = root.kept.get(folder[len(str(root.path)) + 1 :])
        name = os.path.basename(folder)
        id = root.prefix + (f"{visible(sweep)}:" if sweep else "") + visible(name)
        while id in self._ids:
            id += "~"
        run = Run(id, folder, visible(sweep) if sweep else None)
        if kept is not None and kept.row is not None and kept.signature == signature(folder):
            if (kept.id, kept.sweep) != (id, run.sweep):
                kept.id, kept.sweep, kept.row = id, run.sweep, replace(kept.row, id=id, sweep=run.sweep)
            run = kept
        else:
            self._unread.append(run)
        self._ids.add(id)
        self._runs[folder] = run
        return run

    def _check(self) -> set[str]:
        """Look at the runs whose turn it is."""
        changed, now = set(), time.time()
        self._turn = (self._turn + 1) % TURNS
        for number, run in enumerate(list(self._runs.values())):
            row = run.row
            if row is None:
                continue
            lately = row.status in LIVE or now - (row.updated or 0.0) < LATELY
            if not lately and number % TURNS != self._turn:
                continue
            found = signature(run.folder)
            if is_gone(found):
                self._forget(run)
                changed.add(run.id)
            elif found == run.signature and not (run.live and status_of(run.live.events)[0] != row.status):
                continue
            elif self._refresh(run, found):
                changed.add(run.id)
        return changed

    def _read(self, patience: float) -> set[str]:
        changed, until = set(), time.monotonic() + patience
        while self._unread and time.monotonic() < until:
            run = self._unread.pop()
            found = signature(run.folder)
            if is_gone(found):
                self._forget(run)
            else:
                self._refresh(run, found)
            changed.add(run.id)
        return changed

    def _refresh(self, run: Run, now: tuple[int, ...]) -> bool:
        before = run.row
        refresh(run, now, self.configs)
        ended = run.row is not None and run.row.status not in LIVE
        for root in self._roots:
            root.stale = root.stale or (ended and run.folder.startswith(f"{root.path}/"))
        return before != run.row

    def _forget(self, run: Run) -> None:
        self._runs.pop(run.folder, None)
        self._ids.discard(run.id)

    def _show(self) -> None:
        self._number += 1
        runs = [(run.row.started or run.row.updated or 0.0, run.row.id, run) for run in self._runs.values() if run.row]
        runs.sort(key=lambda each: each[:2])
        self._uncoloured += colours.give([run for *_, run in runs])
        read = [Entry(run.row, run.config, run.metrics, run) for *_, run in runs if run.row]
        place = {entry.row.id: number for number, entry in enumerate(read)}
        version, before = f"{self._process}-{self._number}", self.view
        now = {entry.row.id: entry.row for entry in read}
        rows = {entry.row.id: entry.row for entry in before.entries}
        changed = {id for id, row in now.items() if rows.get(id) is not row} | (rows.keys() - now.keys())
        history = (*before.history[-MOST_VERSIONS:], (version, frozenset(changed)))
        self.view = View(version, read, len(self._unread), place, history)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Where millions of objects come to stay, looking through them again and again takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor are they looked through later
        gc.enable()


def _names(folder: str) -> list[str]:
    """Of the folders in a folder, without hidden ones and links."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _changed_at(path: str) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except (OSError, ValueError):
        return 0


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False
