"""The files of a run that are sent to its tracker: each once, and again when it has changed."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.record.lines import EVENTS, METRICS

from .tracker import Tracker

LIVE = ("config.yaml", EVENTS, "samples")
FINAL = (*LIVE, "plots", "profiles", "stacks", "model", METRICS)


class Artifacts:
    """Sends files, and keeps account of those that the tracker holds.

    Args:
        without: names at the top of the run's folder that are not sent.
        sent: called after each file that was sent.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, without: tuple[str, ...], sent: Callable[[], None]) -> None:
        self.run_dir, self.tracker = run_dir, tracker
        self._without, self._sent = without, sent
        self.held: dict[str, list[int]] = {}
        """Modification time (ns) and size (bytes) of each file that the tracker holds."""

    def send(self, names: tuple[str, ...]) -> None:
        """Send the new and changed files among these files and folders; empty files are skipped."""
        for path in self._files(names):
            name, folder = (p.relative_to(self.run_dir).as_posix() for p in (path, path.parent))
            try:
                status = path.stat()
                signature = [status.st_mtime_ns, status.st_size]
                if self.held.get(name) == signature or not status.st_size:
                    continue
                self.tracker.artifact(path, "" if folder == "." else folder)
            except Exception:
                if path.exists():
                    raise
                continue  # training has just removed it: an old table, or the stacks of a rank that ended
            self.held[name] = signature
            self._sent()

    def _files(self, names: tuple[str, ...]) -> Iterator[Path]:
        return (path for path in self._below(names) if not path.is_symlink())

    def _below(self, names: tuple[str, ...]) -> Iterator[Path]:
        for name in names:
            top = self.run_dir / name
            if name not in self._without and not top.is_symlink():
                # No link is followed: its target is not part of the run.
                below = (Path(folder) / each for folder, _, files in os.walk(top) for each in files)
                yield from [top] if top.is_file() else sorted(path for path in below if _is_regular(path))


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # just removed
        return False
