"""A run's colour: chosen when the run is first seen, kept in its folder, and from then on the same for ever."""

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import replace

from .rows import Run

COLOUR = ".colour"
"""File of a run's folder with the number of its colour."""
HUES = 6
NEAR = 2
"""Runs before and after, in the order in which they began, whose colours a run does not get."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def give(runs: Sequence[Run]) -> list[Run]:
    """Give those a colour that have none: the one of their folder, or else one that their neighbours have not.

    Args:
        runs: with rows, in the order in which they began.

    Returns:
        Those whose colour is in no folder yet.
    """
    without = [place for place, run in enumerate(runs) if not run.colour]
    chosen = []
    for place in without:
        run = runs[place]
        run.colour = (run.row.colour if run.row else 0) or kept(run.folder)
    for place in without:
        run = runs[place]
        if not run.colour:
            run.colour = _free(runs, place)
            chosen.append(run)
        _show(run)
    return chosen


def _show(run: Run) -> None:
    if run.row and run.row.colour != run.colour:
        run.row = replace(run.row, colour=run.colour)


def _free(runs: Sequence[Run], place: int) -> int:
    """The colour after the last run's, or the next one that no neighbour has."""
    near = [run.colour for run in runs[max(place - NEAR, 0) : place + NEAR + 1]]
    first = runs[place - 1].colour if place else 0
    return next(hue for add in range(HUES) if (hue := (first + add) % HUES + 1) not in near)


def kept(folder: str) -> int:
    """What a run's folder says; 0: nothing that is a colour."""
    with contextlib.suppress(OSError, ValueError):
        file = os.open(f"{folder}/{COLOUR}", os.O_RDONLY | _FILE)
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                found = int(os.read(file, 8))
                return found if 1 <= found <= HUES else 0
        finally:
            os.close(file)
    return 0


def keep(run: Run) -> None:
    """Write it into the run's folder; where another server has been quicker, that one's counts.

    A folder of another user is left alone: a file that is not its owner's would keep the run from going on.
    """
    with contextlib.suppress(OSError):
        folder = os.open(run.folder, _FOLDER)
        try:
            if os.fstat(folder).st_uid != os.geteuid():
                return
            if other := kept(run.folder):
                run.colour = other
                _show(run)
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(COLOUR, dir_fd=folder)  # nothing that is a colour
            _write(folder, run.colour)
        finally:
            os.close(folder)


def _write(folder: int, colour: int) -> None:
    """A new file, and never into one that is there: it may lead elsewhere."""
    file = os.open(COLOUR, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=folder)
    try:
        os.write(file, b"%d\n" % colour)
    finally:
        os.close(file)
