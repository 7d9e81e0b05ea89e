"""Sends one run to a tracker: its final metrics, notable events and files; and keeps account of what was sent.

Each step is sent once. A tracker cannot delete a point, so:
- what the tracker holds is read back on every connection, and steps up to there are not sent again: after a restart
  the first recording of a step stays. Resume is exact, so the second has the same values.
- if a step's values can still change, that is under `train.spike.action: rollback`, steps are held back until a
  checkpoint at or past them is committed: a rollback never goes behind it. FINISHED and a manual sync release them.
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from configs import Config, counted, flatten, mask
from trainer.files.own_files import open_file, read_lines
from trainer.record.lines import EVENTS, METRICS, MetricsIndex, read_events, status_of, summary
from trainer.run.notes import read_notes

from .artifacts import FINAL, LIVE, Artifacts
from .description import PICTURE, description
from .flat import notable_tags, scalars, tags
from .start import read_state, write_state
from .tracker import Input, Point, RunInfo, Tracker

MLFLOW_NOTE = "mlflow.note.content"
GONE = "the training process died without a message (killed, or out of memory)"


def open_tracker(run_dir: Path, config: Config, uri: str) -> Tracker:
    """The tracker of a run. In a database, a new experiment keeps its files where the default database would be."""
    from .mlflow import MlflowTracker  # 2 s of imports, which a mistaken call need not wait for

    beside = Path(config.tracking.parent or run_dir).resolve().parent
    return MlflowTracker(uri, config.tracking.experiment, beside / "mlartifacts" if uri.startswith("sqlite") else None)


def key_of(run_dir: Path) -> str | None:
    """What identifies a run or sweep for ever, a hash of its name and its record's first line; None: no record yet."""
    try:
        with open_file(run_dir / EVENTS) as file:
            return hashlib.sha256(run_dir.resolve().name.encode() + next(read_lines(file), b"")).hexdigest()[:32]
    except FileNotFoundError:
        return None


class Sender:
    """Sends the record of a run, whenever it is asked to.

    Args:
        once: also send steps that a rollback could still change.
    """

    def __init__(self, run_dir: Path, config: Config, uri: str, tracker: Tracker, once: bool) -> None:
        self.run_dir, self.config, self.tracker, self.once = run_dir, config, tracker, once
        self.uri = mask(uri)
        """Without its password, as it is written and shown."""
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
        self.progress = time.monotonic()
        """When something was last sent successfully (`time.monotonic`)."""

    def send_all(self, ended: dict[str, Any] | None) -> None:
        """Send what is recorded so far, and the end of the run once it has `ended`."""
        self._connect()
        self._send(everything=self.once or (ended is not None and ended["status"] == "FINISHED"))
        self._describe()
        self._artifacts.send(self.names(ended is not None))
        if ended:
            self._end(ended)
        self._save()

    def _describe(self) -> None:
        """Send notable events and the user's notes as tags, if they have changed."""
        notes = read_notes(self.run_dir)
        old = self._state.get("tags", [])
        tags = notable_tags(self.events) | dict.fromkeys(old, "") | dict(notes.tags) | self.tags(notes.note)
        if tags != self._noted:
            self.tracker.describe({}, tags, [])
            self._noted = tags
            self._state["tags"] = list(notes.tags)

    def tags(self, note: str) -> dict[str, str]:
        """The run's progress and its description."""
        drawn = (self.run_dir / PICTURE).exists()
        text = description(self.config, self.events, note, self._state["run_id"], drawn)
        return {"step": f"{max(self._sent[False], 0)}/{self.config.train.steps}", MLFLOW_NOTE: text}

    def _end(self, ended: dict[str, Any]) -> None:
        if numbers := self.totals():
            self.tracker.log([Point(max(self._sent[False], 0), ended["time"], numbers)])
        self.tracker.finish(ended["status"], ended["time"], ended.get("reason"))

    def names(self, ended: bool) -> tuple[str, ...]:
        """Files and folders to send."""
        return FINAL if ended else LIVE

    def params(self) -> dict[str, Any]:
        return flatten(self.config)

    def totals(self) -> dict[str, float]:
        """Metrics at the end of the run: its goodput, and the seconds spent in each category."""
        from trainer.record.goodput import goodput, productive, total  # numpy, which most commands need not wait for

        seconds = total(goodput(self.run_dir))
        books = {f"run_seconds_{name}": round(value, 3) for name, value in seconds.items()}
        return {"run_goodput": round(productive(seconds), 6), **books}

    def plot(self) -> None:
        """Draw the final plots."""
        try:
            made, lines = self.run_dir / "plots" / "loss.png", self.run_dir / METRICS
            if made.exists() and made.stat().st_mtime_ns > lines.stat().st_mtime_ns:
                return  # a manual sync: the plots are there
            from trainer.observe.plots import plot_run  # matplotlib is needed at the end only

            plot_run(self.run_dir)
        except Exception as problem:  # a failed plot must not keep the rest from being sent
            print(f"no plots: {words(problem)}", file=sys.stderr, flush=True)

    def _connect(self) -> None:
        if self.index is not None:
            return
        state = read_state(self.run_dir)
        known = state if state.get("uri") == self.uri else {}
        key, above = key_of(self.run_dir), self.config.tracking.parent
        assert key
        started = [event for event in self.events if event["event"] == "attempt_started"]
        first = self.events[0]
        begin = min(first.get("began", first["time"]), first["time"])  # the launch's time
        sent = self.tracker.open(
            RunInfo(
                self.run_dir.resolve().name, key, known.get("run_id"), begin, key_of(Path(above)) if above else None
            )
        )
        details = started[-1] if started else {}
        inputs = [Input(**item) for item in details.get("inputs", ())]
        self.tracker.describe(self.params(), tags(details), inputs)
        self._sent, self._noted = {False: sent.step, True: sent.evaluation}, {}
        self._state = {
            "uri": self.uri,
            "run_id": sent.run_id,
            "experiment": self.config.tracking.experiment,
            "experiment_id": sent.experiment_id,
        }
        same = known.get("run_id") == sent.run_id
        self._state["tags"] = known.get("tags", []) if same else []
        self._artifacts.held = known.get("files", {}) if same else {}
        self.index = MetricsIndex(self.run_dir, known.get("offset", 0) if same else 0)
        self._save()

    def _send(self, everything: bool) -> None:
        """Send the lines that no rollback has discarded or can still change."""
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
                self.progress = time.monotonic()
            for line in lines:
                self._sent[line.evaluation] = max(self._sent[line.evaluation], line.step)
            done = set(lines)
            index.lines = [line for line in index.lines if line not in done]
            self._save()

    def _file_sent(self) -> None:
        self.files += 1
        self.progress = time.monotonic()
        self._save()

    def ended(self, attempt: int | None = None, gone: bool = False) -> dict[str, Any] | None:
        """`attempt_ended` of an attempt (by default the last), or a substitute if it died without one; None: it runs.

        Args:
            gone: its process has ended.
        """
        self.read_events()
        if not self.events:
            return None
        status, reason = status_of(self.events)
        gone = gone or (self.once and status == "FAILED")
        attempt = attempt or max(event["attempt"] for event in self.events)
        for event in reversed(self.events):
            if event["event"] == "attempt_ended" and event["attempt"] == attempt:
                return event
        if not gone:
            return None
        seen = summary(self.run_dir)["updated"]  # the last sign of life, as this may be sent days later
        return {"status": "FAILED", "time": seen or time.time(), "reason": reason or GONE}

    def read_events(self) -> None:
        try:
            size = (self.run_dir / EVENTS).stat().st_size
        except FileNotFoundError:
            return
        if size != self._events_size:
            self.events, self._events_size = read_events(self.run_dir), size

    def held(self) -> str | None:
        lines = self.index.lines if self.index else []
        if not lines:
            return None
        held = counted(len(lines), "record", "is/are")
        return f"{held} after the last checkpoint held back, as the run may resume from there"

    def note_error(self, error: str, **more: Any) -> dict[str, Any]:
        """Add an error to the tracking state on disk. Returns that state."""
        known = read_state(self.run_dir)
        state = (known if known.get("uri") == self.uri else {"uri": self.uri}) | {"error": error, **more}
        write_state(self.run_dir, state)
        return state

    def _save(self) -> None:
        index = self.index
        assert index is not None
        offset = min((line.start for line in index.lines), default=index.offset)
        state = self._state | {"offset": offset, "missing": len(index.lines), "files": self._artifacts.held}
        state["error"] = self.held()
        if state != read_state(self.run_dir):
            write_state(self.run_dir, state)


def words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {mask(' '.join(str(problem).split()))[:300]}"
