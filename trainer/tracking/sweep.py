"""Sends a sweep's record as one run of the tracker, with its runs nested below it, from a single process."""

import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import Config, ConfigError, flatten, load, mask
from configs.sections.tracking import TrackingConfig
from configs.sweep.definition import load_sweep
from trainer.files.own_files import require_own
from trainer.record.lines import EVENTS, METRICS, last_attempt, read_events, status_of

from .sender import Sender, open_tracker, words
from .shipper import PATIENCE, Shipped, Shipper, only_one
from .start import GRACE, read_state, tracking_uri

SWEEP, TRIALS = "sweep.yaml", "trials"
UNSENT = (TRIALS, "lock", "tracking.json", "tracking.log", "tracking.lock")
"""Files and folders of a sweep's folder that are not sent; its runs are sent as runs."""


def sweep_config(sweep_dir: Path) -> Config:
    """A config with the `tracking` section of a sweep's runs, from its record.

    Raises:
        ConfigError: not a sweep, or it never ran.
    """
    started = [event for event in read_events(sweep_dir) if event["event"] == "attempt_started"]
    if not (sweep_dir / SWEEP).is_file() or not started:
        raise ConfigError(f"{sweep_dir} is not the folder of a sweep that has run: `muster sweep run` creates it")
    return Config(tracking=TrackingConfig(**started[-1]["tracking"]))


def trial_folders(sweep_dir: Path) -> list[Path]:
    return sorted(path.parent for path in (sweep_dir / TRIALS).glob("*/config.yaml"))


def ship_sweep(
    sweep_dir: Path, *, attempt: int | None = None, parent: int | None = None, once: bool = True, grace: float = GRACE
) -> Shipped:
    """Send what the tracker lacks of a sweep and its runs; arguments as of `trainer.tracking.shipper.ship`."""
    require_own(sweep_dir)
    config = sweep_config(sweep_dir)
    uri = tracking_uri(sweep_dir, config)
    with only_one(sweep_dir, PATIENCE if once else None) as free:
        if not free:
            return Shipped(0, 0, f"another process is sending {sweep_dir.name} to {mask(uri)}")
        shipper = SweepShipper(
            sweep_dir, config, uri, open_tracker(sweep_dir, config, uri), attempt, parent, once, grace
        )
        missing = shipper.run()
        senders = [shipper, *shipper.senders.values()]
        return Shipped(sum(each.records for each in senders), sum(each.files for each in senders), missing)


def log_to_parent(sweep_dir: Path, files: Sequence[Path] = (), wait: float = 30.0) -> str | None:
    """Send new files in a sweep's folder, such as a fit and its plots, to the sweep's run in the tracker.

    Args:
        files: those that the caller has just written there.
        wait: seconds; a tracker that is down gets them later, by `muster sync`.

    Returns:
        One line that says what is missing; None if nothing is, the sweep never ran, or it is not tracked.
    """
    assert all(path.resolve().is_relative_to(sweep_dir.resolve()) for path in files)
    try:
        if not sweep_config(sweep_dir).tracking.enabled:
            return None
    except ConfigError:
        return None
    command = [sys.executable, "-P", "-m", "trainer.tracking", str(sweep_dir), "--sweep", "--once", "--grace", "2"]
    later = f"`muster sync {sweep_dir}` sends the rest"
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=wait)
    except subprocess.TimeoutExpired:
        return f"tracking: not sent within {wait:.0f} s; {later}"
    return f"tracking: {done.stderr.strip().splitlines()[-1]}; {later}" if done.returncode else None


class SweepShipper(Shipper):
    """Sends the sweep first, as its runs refer to it, then each run whose record has grown."""

    def __init__(self, sweep_dir: Path, config: Config, uri: str, *arguments: Any) -> None:
        super().__init__(sweep_dir, config, uri, *arguments)
        self._whole_uri = uri
        self.senders: dict[Path, Sender] = {}

    def names(self, ended: bool) -> tuple[str, ...]:
        found = (path.name for path in self.run_dir.iterdir() if path.name not in UNSENT)
        return tuple(sorted(name for name in found if not name.startswith(".")))

    def params(self) -> dict[str, Any]:
        return flatten(load_sweep(self.run_dir / SWEEP))

    def totals(self) -> dict[str, float]:
        return {}

    def tags(self, note: str) -> dict[str, str]:
        ends = [event for event in self.events if event["event"] == "attempt_ended"]
        return {key: str(value) for key, value in ends[-1].get("totals", {}).items()} if ends else {}

    def plot(self) -> None:
        """Nothing: `muster sweep plot` draws a sweep's plots."""

    def send_all(self, ended: dict[str, Any] | None) -> None:
        super().send_all(ended)
        for run_dir in trial_folders(self.run_dir):
            # A `muster sync` of the run may be sending it; a run that is wholly sent costs no request.
            with only_one(run_dir, 0.0) as free:
                if free and not self._is_sent(run_dir):
                    self._send_run(run_dir, last=self.once or ended is not None)

    def _send_run(self, run_dir: Path, last: bool) -> None:
        if (sender := self.senders.get(run_dir)) is None:
            config = load(run_dir / "config.yaml")
            tracker = open_tracker(run_dir, config, self._whole_uri)
            sender = self.senders[run_dir] = Sender(run_dir, config, self._whole_uri, tracker, self.once)
        from trainer.record.columns import update_columns  # numpy, which most commands need not wait for

        with contextlib.suppress(OSError):
            update_columns(run_dir)
        sender.read_events()
        if not last_attempt(sender.events):
            return
        status, _ = status_of(sender.events)
        ended, before = sender.ended(gone=last and status == "FAILED"), sender.progress
        try:
            sender.send_all(ended)
        except Exception as problem:
            sender.index = None
            sender.note_error(words(problem))
            raise
        finally:
            if sender.progress > before:
                self.progress = max(self.progress, sender.progress)
        if ended:
            sender.index = None  # another attempt may resume the run

    def _is_sent(self, run_dir: Path) -> bool:
        state = read_state(run_dir)
        sent, there = state.get("files", {}), [run_dir / name for name in (EVENTS, METRICS)]
        sizes = [(sent.get(path.name, [0, 0])[1], path.stat().st_size) for path in there if path.exists()]
        return state.get("uri") == self.uri and not state.get("error") and all(was == now for was, now in sizes)
