"""Sends a run's record to its tracker: follows it as it grows, and retries until everything is sent."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from configs import Config, ConfigError, counted, load, mask
from trainer.files.lock_file import lock_file
from trainer.files.own_files import require_own
from trainer.record.lines import MetricsIndex, Record

from .sender import Sender, open_tracker, words
from .start import GRACE, later, tracking_uri
from .system import SystemMetrics
from .tracker import Tracker

FIRST_BACKOFF, MAX_BACKOFF = 1.0, 30.0
LAST_WORD = 3.0
"""Seconds in which whatever killed a training process may record that it was on purpose."""
PATIENCE = 5.0
"""Seconds that a manual sync waits for another shipper of the run to end."""


class Shipped(NamedTuple):
    """What one shipper did."""

    records: int
    """Lines of metrics.jsonl that were sent."""
    files: int
    missing: str | None
    """One line that says what the tracker lacks; None: it has everything."""


def ship(
    run_dir: str | Path,
    *,
    attempt: int | None = None,
    parent: int | None = None,
    once: bool = True,
    grace: float = GRACE,
) -> Shipped:
    """Send a run's record to the tracker that its config names.

    Args:
        run_dir: the run's folder.
        attempt: return when a later attempt than this one starts, whose own shipper takes over.
        parent: process id of the training process, the parent of this one.
        once: send what is there and return; otherwise follow the record to the end of the attempt.
        grace: seconds without success, once nothing more is recorded, after which to give up.

    Raises:
        ConfigError: not a run, or MLflow does not accept `tracking.uri`; or as `require_own`.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is not a run's folder: it has no config.yaml")
    require_own(run_dir)
    config = load(run_dir / "config.yaml")
    uri = tracking_uri(run_dir, config)
    with only_one(run_dir, PATIENCE if once else None) as free:
        if not free:
            return Shipped(0, 0, f"another process is sending {run_dir.name} to {mask(uri)}")
        shipper = Shipper(run_dir, config, uri, open_tracker(run_dir, config, uri), attempt, parent, once, grace)
        missing = shipper.run()
        return Shipped(shipper.records, shipper.files, missing)


class Shipper(Sender):
    """One shipper: its state, and its main loop `run`."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        uri: str,
        tracker: Tracker,
        attempt: int | None = None,
        parent: int | None = None,
        once: bool = True,
        grace: float = GRACE,
    ) -> None:
        super().__init__(run_dir, config, uri, tracker, once)
        self.attempt, self.parent, self.grace = attempt, parent, grace
        self._told: set[str] = set()
        self._system: SystemMetrics | None = None
        self._gone_at: float | None = None
        self._copied = 0
        """Bytes of metrics.jsonl that metrics.parquet holds."""

    def run(self) -> str | None:
        """Send until the attempt has ended and everything is sent, or nothing could be sent for `grace` seconds.

        Returns:
            One line that says what the tracker lacks; None: it has everything.
        """
        finishing, backoff, failing = False, FIRST_BACKOFF, False
        while True:
            ended = self._ended()
            if self._superseded() or (self.once and not self.events):
                return None
            if ended and not finishing:
                finishing, backoff = True, FIRST_BACKOFF
                if self.parent is not None:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self.plot()
                self.progress = time.monotonic()
            begin = time.monotonic()
            self._copy_columns()
            try:
                self.send_all(ended)
                if failing:
                    print(f"sending to {self.uri} again", file=sys.stderr, flush=True)
                    self._tell("tracker_recovered", f"sending to {self.uri} again, including what was missed")
                if ended or self.once:
                    return self.held()
                failing = False
            except Exception as problem:  # a tracker's client may raise anything; the record is safe, so try again
                if not failing:
                    self.note_error(told := f"cannot send to {self.uri}: {words(problem)}", unreachable=True)
                    print(told, file=sys.stderr, flush=True)
                    self._tell("tracker_failed", f"{told}. Training goes on; {later(self.run_dir)} later")
                backoff = min(2 * backoff, MAX_BACKOFF) if failing and self.progress < begin else FIRST_BACKOFF
                failing, self.index = True, None
                if (ended or self.once) and time.monotonic() - self.progress > self.grace:
                    return self._give_up(problem)
            self._wait(backoff if failing else self.config.tracking.interval, wake=not ended)

    def _copy_columns(self) -> None:
        """Done even while the tracker does not answer; after a full disk, as soon as there is room again."""
        from trainer.record.columns import update_columns  # numpy, which most commands need not wait for

        with contextlib.suppress(OSError):
            self._copied = update_columns(self.run_dir, self._copied)

    def _tell(self, event: str, reason: str) -> None:
        """Record an event once, for those who watch the run, while the attempt lasts."""
        if self.once or self._ended() or event in self._told:
            return
        self._told.add(event)
        record = Record(self.run_dir, self.attempt or 1)
        record.event(event, reason=reason)
        record.close()

    def send_all(self, ended: dict[str, Any] | None) -> None:
        if not self.once:
            if self._system is None:
                self._system = SystemMetrics(self.events[0]["time"])
            self._system.sample(time.time(), last=ended is not None)  # also while the tracker does not answer
            self._connect()
            self._system.send(self.tracker.log)
        super().send_all(ended)

    def _ended(self) -> dict[str, Any] | None:
        gone = self.parent is not None and os.getppid() != self.parent  # before the last events are read
        if gone and self._gone_at is None:
            self._gone_at = time.monotonic()
        # Whatever stopped it records that a moment after it is gone.
        return self.ended(self.attempt, gone and time.monotonic() - (self._gone_at or 0.0) > LAST_WORD)

    def _superseded(self) -> bool:
        own = self.attempt
        return own is not None and any(e["event"] == "attempt_started" and e["attempt"] > own for e in self.events)

    def _wait(self, seconds: float, wake: bool) -> None:
        """Sleep; with `wake`, at most until the attempt ends."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (wake and self._ended()):
            time.sleep(min(left, 0.2))

    def _give_up(self, problem: Exception) -> str:
        left = MetricsIndex(self.run_dir, self.note_error(words(problem)).get("offset", 0))
        left.update()
        count = len(left.lines)
        end = " and the end of the run are" if self._ended() else " is" if count == 1 else " are"
        message = f"{counted(count, 'record')}{end} not sent to {self.uri}: {words(problem)}"
        self.note_error(message, missing=len(left.lines))
        return message


@contextmanager
def only_one(run_dir: Path, patience: float | None) -> Iterator[bool]:
    """Hold the run's tracking lock, waiting for at most `patience` seconds (None: for ever)."""
    try:
        held = lock_file(run_dir / "tracking.lock", patience, poll=0.2).acquire()
    except Timeout:
        yield False
        return
    with held:
        yield True
