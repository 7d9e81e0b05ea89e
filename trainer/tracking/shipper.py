"""Sends a run's record to its tracker: reads metrics.jsonl and events.jsonl as they grow, repeats until it is through.

Each step is shown once. A tracker cannot take a point back, so:
- what the tracker holds is read back whenever a connection is made, and steps up to there are not sent again: after a
  restart the first recording of a step stays. Resume is exact, so the second has the same values.
- where a step's values can change, that is under `train.spike.action: rollback`, steps are held back until a
  checkpoint at or past them is committed: a rollback never goes behind it. FINISHED and a sync by hand release them.
"""

import fcntl
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from configs import Config, ConfigError, flatten, load

from ..goodput import goodput, productive, total
from ..record import EVENTS, METRICS, MetricsIndex, read_events, status_of
from .artifacts import FINAL, LIVE, Artifacts
from .flat import notable_tags, scalars, tags
from .start import GRACE, read_state, tracking_uri, write_state
from .tracker import Input, Point, RunInfo, Tracker

FIRST_BACKOFF, MAX_BACKOFF = 1.0, 30.0
PATIENCE = 5.0
"""Seconds a sync by hand waits for another shipper of the run to end."""
GONE = "the training process ended without a word (killed, or out of memory)"


class Shipped(NamedTuple):
    """What one shipper did."""

    records: int
    """Lines of metrics.jsonl that were sent."""
    files: int
    missing: str | None
    """One line that says what the tracker has not; None: it has everything."""


def ship(
    run_dir: str | Path,
    *,
    attempt: int | None = None,
    parent: int | None = None,
    once: bool = True,
    grace: float = GRACE,
) -> Shipped:
    """Send a run's record to the tracker its config names.

    Args:
        run_dir: the run's folder.
        attempt: leave when a later attempt than this one starts: its own shipper takes over.
        parent: process id of the training process, the parent of this one.
        once: send what is there and leave; otherwise follow the record to the end of the attempt.
        grace: seconds without success, once nothing more is recorded, after which to give up.

    Raises:
        ConfigError: not a run, or `tracking.uri` is nothing that MLflow takes.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is not a run's folder: it has no config.yaml")
    config = load(run_dir / "config.yaml")
    uri = tracking_uri(run_dir, config)
    with _only_one(run_dir, PATIENCE if once else None) as free:
        if not free:
            return Shipped(0, 0, f"another process is sending {run_dir.name} to {uri}")
        from .mlflow import MlflowTracker  # 2 s of imports, which a wrong call need not wait for

        root = run_dir.resolve().parent / "mlartifacts" if uri.startswith("sqlite:") else None
        tracker = MlflowTracker(uri, config.tracking.experiment, root)
        shipper = Shipper(run_dir, config, uri, tracker, attempt, parent, once, grace)
        missing = shipper.run()
        return Shipped(shipper.records, shipper.files, missing)


class Shipper:
    """The state of one shipper; `run` is its life."""

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
        self.run_dir, self.config, self.uri, self.tracker = run_dir, config, uri, tracker
        self.attempt, self.parent, self.once, self.grace = attempt, parent, once, grace
        self.hold = config.train.spike.action == "rollback" and not once
        self.events: list[dict[str, Any]] = []
        self._events_size = -1
        self.index: MetricsIndex | None = None
        """None: not connected."""
        self._sent = {False: -1, True: -1}
        """Last training step and last evaluation that the tracker holds."""
        self.records = self.files = 0
        """Sent so far."""
        without = () if config.tracking.export_model else ("model",)
        self._artifacts = Artifacts(run_dir, tracker, without, self._file_sent)
        self._noted: dict[str, str] = {}
        self._state: dict[str, Any] = {}
        self._progress = time.monotonic()
        """When something last got through."""

    def run(self) -> str | None:
        """Send until the attempt has ended and everything is sent, or nothing got through for `grace` seconds."""
        finishing, backoff, failing = False, FIRST_BACKOFF, False
        while True:
            ended = self._ended()
            if self._superseded() or (self.once and not self.events):
                return None
            if ended and not finishing:
                finishing, backoff = True, FIRST_BACKOFF
                if self.parent is not None:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._plot()
                self._progress = time.monotonic()
            begin = time.monotonic()
            try:
                self._send_all(ended)
                if failing:
                    print(f"sending to {self.uri} again", file=sys.stderr, flush=True)
                if ended or self.once:
                    return self._held()
                failing = False
            except Exception as problem:  # whatever a tracker's client raises: the record is safe, try again
                if not failing:
                    self._note_error(told := f"cannot send to {self.uri}: {_line(problem)}")
                    print(told, file=sys.stderr, flush=True)
                backoff = min(2 * backoff, MAX_BACKOFF) if failing and self._progress < begin else FIRST_BACKOFF
                failing, self.index = True, None
                if (ended or self.once) and time.monotonic() - self._progress > self.grace:
                    return self._give_up(problem)
            self._wait(backoff if failing else self.config.tracking.interval, wake=not ended)

    def _send_all(self, ended: dict[str, Any] | None) -> None:
        self._connect()
        if (noted := notable_tags(self.events)) != self._noted:
            self.tracker.describe({}, noted, [])
            self._noted = noted
        self._send(everything=self.once or (ended is not None and ended["status"] == "FINISHED"))
        self._artifacts.send(FINAL if ended else LIVE)
        if ended:
            seconds = total(goodput(self.run_dir))
            books = {f"seconds.{name}": f"{value:.1f}" for name, value in seconds.items()}
            self.tracker.describe({}, {"goodput": f"{productive(seconds):.4f}", **books}, [])
            self.tracker.finish(ended["status"], ended["time"], ended.get("reason"))
        self._save()

    def _connect(self) -> None:
        if self.index is not None:
            return
        state = read_state(self.run_dir)
        known = state if state.get("uri") == self.uri else {}
        with (self.run_dir / EVENTS).open("rb") as file:
            key = hashlib.sha256(self.run_dir.resolve().name.encode() + file.readline()).hexdigest()[:32]
        started = [event for event in self.events if event["event"] == "attempt_started"]
        begin = (started or self.events)[0]["time"]
        sent = self.tracker.open(RunInfo(self.run_dir.resolve().name, key, known.get("run_id"), begin))
        details = started[-1] if started else {}
        inputs = [Input(**item) for item in details.get("inputs", ())]
        self.tracker.describe(flatten(self.config), tags(details), inputs)
        self._sent, self._noted = {False: sent.step, True: sent.evaluation}, {}
        self._state = {"uri": self.uri, "run_id": sent.run_id, "experiment": self.config.tracking.experiment}
        same = known.get("run_id") == sent.run_id
        self._artifacts.held = known.get("files", {}) if same else {}
        self.index = MetricsIndex(self.run_dir, known.get("offset", 0) if same else 0)
        self._save()

    def _send(self, everything: bool) -> None:
        """Send the lines that count and that no rollback can change any more."""
        index = self.index
        assert index is not None
        index.update()
        index.forget_rolled_back(self.events)
        index.lines = [line for line in index.lines if line.step > self._sent[line.evaluation]]
        final = max((event["step"] for event in self.events if event["event"] == "checkpoint"), default=0)
        ready = [line for line in index.lines if everything or not self.hold or line.step <= final]
        for begin in range(0, len(ready), 200):
            lines = ready[begin : begin + 200]
            records = list(index.read(lines))
            points = [Point(record["step"], record["time"], scalars(record)) for record in records]
            if points:
                self.tracker.log(points)
                self.records += len(points)
                self._progress = time.monotonic()
            for line in lines:
                self._sent[line.evaluation] = max(self._sent[line.evaluation], line.step)
            done = set(lines)
            index.lines = [line for line in index.lines if line not in done]
            self._save()

    def _file_sent(self) -> None:
        self.files += 1
        self._progress = time.monotonic()
        self._save()

    def _ended(self) -> dict[str, Any] | None:
        """`attempt_ended` of the attempt, or what stands for it when its process is gone."""
        gone = self.parent is not None and os.getppid() != self.parent  # before the last events are read
        self._read_events()
        if not self.events:
            return None
        status, reason = status_of(self.events)
        gone = status == "FAILED" if self.once else gone
        attempt = self.attempt or max(event["attempt"] for event in self.events)
        for event in reversed(self.events):
            if event["event"] == "attempt_ended" and event["attempt"] == attempt:
                return event
        return {"status": "FAILED", "time": time.time(), "reason": reason or GONE} if gone else None

    def _superseded(self) -> bool:
        own = self.attempt
        return own is not None and any(e["event"] == "attempt_started" and e["attempt"] > own for e in self.events)

    def _read_events(self) -> None:
        try:
            size = (self.run_dir / EVENTS).stat().st_size
        except FileNotFoundError:
            return
        if size != self._events_size:
            self.events, self._events_size = read_events(self.run_dir), size

    def _wait(self, seconds: float, wake: bool) -> None:
        """Sleep, but no longer than until the attempt ends."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (wake and self._ended()):
            time.sleep(min(left, 0.2))

    def _plot(self) -> None:
        try:
            made, lines = self.run_dir / "plots" / "loss.png", self.run_dir / METRICS
            if made.exists() and made.stat().st_mtime_ns > lines.stat().st_mtime_ns:
                return  # a sync by hand of what was sent
            from ..plots import plot_run  # matplotlib is needed at the end only

            plot_run(self.run_dir)
        except Exception as problem:  # plots are no reason to lose the rest
            print(f"no plots: {_line(problem)}", file=sys.stderr, flush=True)

    def _held(self) -> str | None:
        lines = self.index.lines if self.index else []
        if not lines:
            return None
        return f"{len(lines)} records after the last checkpoint are held back, as the run may go on from there"

    def _note_error(self, error: str, **more: Any) -> dict[str, Any]:
        """Write it beside what is known of the tracker. Returns all of it."""
        known = read_state(self.run_dir)
        state = (known if known.get("uri") == self.uri else {"uri": self.uri}) | {"error": error, **more}
        write_state(self.run_dir, state)
        return state

    def _give_up(self, problem: Exception) -> str:
        left = MetricsIndex(self.run_dir, self._note_error(_line(problem)).get("offset", 0))
        left.update()
        end = " and the end of the run" if self._ended() else ""
        message = f"{len(left.lines)} records{end} are not sent to {self.uri}: {_line(problem)}"
        self._note_error(message, missing=len(left.lines))
        return message

    def _save(self) -> None:
        index = self.index
        assert index is not None
        offset = min((line.start for line in index.lines), default=index.offset)
        state = self._state | {"offset": offset, "missing": len(index.lines), "files": self._artifacts.held}
        state["error"] = self._held()
        if state != read_state(self.run_dir):
            write_state(self.run_dir, state)


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


@contextmanager
def _only_one(run_dir: Path, patience: float | None) -> Iterator[bool]:
    """Hold the run's tracking lock, waiting for at most `patience` seconds (None: for ever)."""
    begin = time.monotonic()
    with (run_dir / "tracking.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is not None and time.monotonic() - begin > patience:
                    yield False
                    return
                time.sleep(0.2)
        yield True
