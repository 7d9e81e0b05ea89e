"""Many runs on one cluster, each on a gang that is still warm from the one before."""

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.run import is_finished, request_stop

from .failures import Final
from .gang import Gang
from .share import Share
from .supervise import Supervisor


class Ended(NamedTuple):
    """How a run ended: FINISHED, KILLED (it can go on), or FAILED and why."""

    run_dir: Path
    status: str
    reason: str = ""


class Trials:
    """Trains runs as they get room, a few at a time, each to its end.

    Args:
        run_dirs: made by `trainer.run.prepare_run`; those that are finished are left alone.
        at_once: gangs that are kept.
        each: what every process reserves.
        folder: the user's working directory.
    """

    def __init__(
        self,
        run_dirs: Sequence[Path],
        at_once: int,
        each: Share,
        environment: dict[str, str],
        joined: bool,
        folder: str,
    ) -> None:
        self._waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for run_dir in run_dirs:
            self._waiting.put(run_dir)
        self._count, self._at_once = len(run_dirs), min(at_once, len(run_dirs))
        self._each, self._environment, self._joined, self._folder = each, environment, joined, folder
        self._ended: queue.SimpleQueue[Ended | BaseException] = queue.SimpleQueue()
        self._active: set[Path] = set()
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[Ended]:
        """Train them all; yields each run as it ends."""
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._at_once)]
        for thread in threads:
            thread.start()
        for _ in range(self._count):
            ended = self._ended.get()
            if isinstance(ended, BaseException):
                raise ended
            yield ended
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """Let every run write a checkpoint and end; those that wait are given back as KILLED."""
        self._stopped.set()
        for run_dir in list(self._active):
            request_stop(run_dir)

    def _serve(self) -> None:
        try:
            with Gang(self._each, 1, self._environment) as gang:
                while True:
                    self._ended.put(self._train(gang, self._waiting.get_nowait()))
        except queue.Empty:
            pass
        except BaseException as error:
            self._ended.put(error)

    def _train(self, gang: Gang, run_dir: Path) -> Ended:
        if is_finished(run_dir):
            return Ended(run_dir, "FINISHED")
        self._active.add(run_dir)
        try:
            if self._stopped.is_set():
                return Ended(run_dir, "KILLED")
            return Ended(run_dir, Supervisor(run_dir, gang, self._joined, self._folder).run())
        except Final as error:
            return Ended(run_dir, "FAILED", error.reason)
        finally:
            self._active.discard(run_dir)
