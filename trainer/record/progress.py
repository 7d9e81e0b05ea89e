"""Shows the progress of a run while it trains: one live line on a terminal, a line now and then elsewhere."""

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

from rich.cells import cell_len
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from configs import counted
from configs.units import byte_size, duration
from trainer.files.own_files import open_file

from .events import RATE, unit_of, wrong_event, wrong_metrics
from .lines import EVENTS, METRICS
from .terminal import Console

SMOOTHING = 0.1
"""Weight of the newest step in the shown rates."""
SPINNER = "|/-\\"
"""Drawn one after the other until the first step."""
BAR = 20
"""Columns of the bar."""
BAR_FROM = 110
"""Width of a terminal, in columns, from which the bar is shown: the usual line still fits beside it."""
LEAST_NEEDED = ("memory", "gradient norm", "FLOPs", "rate", "skipped", "loss")
"""What a narrow terminal leaves out, in this order; step and remaining time are always shown."""
MEASURED = (("peak memory", "peak_memory", byte_size), ("step time", "step_time", duration))
"""What is shown of the event `measured` beside the prediction: label, key, formatter."""


class ProgressView:
    """Turns the record of a run into lines.

    Args:
        total_steps: `train.steps`.
        tty: keep one live line; None: if the console is a terminal.
        quiet_for: without a terminal, seconds between two progress lines (by the record's own times).
    """

    def __init__(
        self, total_steps: int, tty: bool | None = None, console: Console | None = None, quiet_for: float = 10.0
    ) -> None:
        self.total_steps, self.quiet_for = total_steps, quiet_for
        self.console = console or Console()
        self._last_line = float("-inf")
        self._seconds: float | None = None
        self._rate: float | None = None
        self._unit = "tokens"
        self._step = 0
        self._parts = {"state": "starting"}
        self._live: Live | None = None
        self._processes = 1
        self._began = time.monotonic()
        if self.console.is_terminal if tty is None else tty:
            self._live = Live(get_renderable=self._drawn, console=self.console, auto_refresh=False)

    def start(self) -> None:
        self._began = time.monotonic()
        if self._live:
            self._live.start(refresh=True)

    def stop(self) -> None:
        if self._live:
            self._live.stop()

    def refresh(self) -> None:
        """Redraw the live line; the records of many steps may arrive in between."""
        if self._live:
            self._live.refresh()

    def waiting(self) -> None:
        """Before the first step, show the elapsed time on a terminal."""
        if self._live and self._seconds is None:
            seconds = time.monotonic() - self._began
            self._parts = {"state": f"{SPINNER[int(2 * seconds) % 4]} starting, {seconds:.0f} s"}
            self._live.refresh()

    def metrics(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        step = record["step"]
        if "eval_loss" in record:
            ema = f", {_number(record['eval_loss_ema'], '.4f')} with EMA weights" if "eval_loss_ema" in record else ""
            # The task's own metrics; an integer is the number of examples.
            more = "".join(
                f", {name.removeprefix('eval_').replace('_', ' ')} {_number(value, '.4f')}"
                for name, value in record.items()
                if name.startswith("eval_") and name[-4:] not in ("loss", "_ema") and isinstance(value, float)
            )
            self._print(f"step {step}  held-out loss {_number(record['eval_loss'], '.4f')}{ema}{more}")
            return
        self._unit = unit_of(record)
        self._seconds = _smooth(self._seconds, record.get("step_time"))
        self._rate = _smooth(self._rate, record.get(self._unit + RATE))
        self._step, self._parts = step, self._told(record)
        quiet = record["time"] - self._last_line < self.quiet_for and step != self.total_steps
        if not self._live and not quiet:
            self._last_line = record["time"]
            self._print(f"step {step}/{self.total_steps}  {_joined(self._parts)}")

    def event(self, record: dict[str, Any]) -> None:
        """Show one line of events.jsonl, unless the metrics show it already."""
        name = record["event"]
        if name == "attempt_started":
            self._processes = record.get("world_size", 1)
            plural = "" if self._processes == 1 else "es"
            self._print(
                f"attempt {record['attempt']}  {self._processes} process{plural} on {record.get('device', '?')}"
            )
        elif name == "attempt_ended":
            if record["status"] == "FAILED":
                self._print(f"attempt {record['attempt']}  failed: {record.get('reason')}")
        elif name == "checkpoint":
            self._print(f"step {record['step']}  checkpoint, {byte_size(record.get('bytes', 0))}")
        elif name == "cadence":
            self._print(
                f"a checkpoint every {counted(record['every'], 'step')} ({duration(record['interval_s'])}): one costs "
                f"{duration(record['cost_s'])}, and a failure is expected in {duration(record['mtbf_s'])}"
            )
        elif name == "measured":
            told = [
                f"{label} {said(record[key])} (planned {said(record[f'predicted_{key}'])})"
                for label, key, said in MEASURED
                if record.get(key) and record.get(f"predicted_{key}")
            ]
            if told:
                self._print(", ".join(told))
        elif name in ("experts_collapsed", "experts_recovered"):
            which = [f"{layer}/{expert}" for layer, experts in record["experts"].items() for expert in experts]
            more = f" and {len(which) - 8} more" if len(which) > 8 else ""
            self._print(f"step {record['step']}  {name.replace('_', ' ')} (layer/expert): {', '.join(which[:8])}{more}")
        elif name == "hang":
            self._print(
                f"hang  {record['reason']}; stacks of {counted(len(record['stacks']), 'rank')} in the run's folder"
            )
        elif name in ("tracker_failed", "tracker_recovered"):
            self._print(f"tracking  {record.get('reason')}")
        elif name == "preflight":
            for line in record["slow"]:
                self._print(f"preflight  {line}")
        elif name == "plan":
            if planned := self._planned(record):
                self._print(f"planned: {planned}")
        elif name not in ("evaluation", "resolved", "failure"):
            self._print(f"{name.replace('_', ' ')}  {_details(record)}")

    def _planned(self, record: dict[str, Any]) -> str:
        memory, seconds = record.get("memory"), record.get("step_time")
        peak = memory.get("peak") if isinstance(memory, dict) else None
        parts = [f"{byte_size(peak)} per process"] if isinstance(peak, int | float) else []
        if isinstance(seconds, int | float):
            parts.append(
                f"{duration(seconds)} per step, {duration(seconds * self.total_steps)} for all {self.total_steps:,}"
            )
        return ", ".join(parts)

    def _told(self, record: dict[str, Any]) -> dict[str, str]:
        """The parts of a step's line, by name."""
        parts = {"loss": f"loss {_number(record['loss'], '.4f')}"}
        if self._rate:
            parts["rate"] = f"{self._rate:,.0f} {'tok' if self._unit == 'tokens' else self._unit}/s"
        if record.get("mfu") is not None:
            parts["FLOPs"] = f"MFU {record['mfu']:.1%}"
        elif record.get("tflops") is not None:
            parts["FLOPs"] = f"{record['tflops'] * self._processes:.3g} TFLOP/s"
        if record.get("grad_norm") is not None:
            parts["gradient norm"] = f"grad {record['grad_norm']:.3g}"
        if record.get("memory_gb"):
            parts["memory"] = byte_size(record["memory_gb"] * 1e9)
        if self._seconds:
            parts["eta"] = f"eta {duration(self._seconds * (self.total_steps - record['step']))}"
        if record.get("skipped"):
            parts["skipped"] = "skipped"
        return parts

    def _drawn(self) -> RenderableType:
        """The live line, as much of it as fits the terminal."""
        steps, parts = f"{self._step:{len(str(self.total_steps))}}/{self.total_steps}", dict(self._parts)
        room, has_bar = self.console.width - len(steps) - 2, self.console.width >= BAR_FROM
        if has_bar:
            room -= BAR + 2
        for name in LEAST_NEEDED:
            if cell_len(_joined(parts)) <= room:
                break
            parts.pop(name, None)
        line = Text(_joined(parts), no_wrap=True, overflow="ellipsis")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=len(steps))
        cells: list[RenderableType] = [Text(steps, "progress.download")]
        if has_bar:
            cells.append(ProgressBar(self.total_steps, self._step, width=BAR))
        table.add_row(*cells, line)
        return table

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)  # a pipe is not 80 columns wide


class Follower:
    """Feeds a view from the end of a run's record as it grows, on a thread of its own: `with Follower(...):`."""

    def __init__(self, run_dir: str | Path, view: ProgressView, interval: float = 0.5) -> None:
        self.view, self.interval = view, interval
        self._tails = [
            (_Tail(Path(run_dir) / EVENTS, wrong_event), view.event),
            (_Tail(Path(run_dir) / METRICS, wrong_metrics), view.metrics),
        ]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> "Follower":
        self.view.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._read()
        self.view.stop()

    def _follow(self) -> None:
        while not self._done.wait(self.interval):
            self._read()
            self.view.waiting()

    def _read(self) -> None:
        found = [(record, show) for tail, show in self._tails for record in tail.read()]
        for record, show in sorted(found, key=lambda item: item[0].get("time", 0.0)):
            show(record)
        if found:
            self.view.refresh()


class _Tail:
    """The records appended to a file since this was created, without those that are `wrong`."""

    def __init__(self, path: Path, wrong: Callable[[dict[str, Any]], str]) -> None:
        self.path, self.wrong = path, wrong
        self.offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        try:
            if self.path.stat().st_size == self.offset:
                return []
            with open_file(self.path) as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        records = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue  # torn by a kill
            if isinstance(record, dict) and not self.wrong(record):
                records.append(record)
        return records


def _smooth(before: float | None, now: float | None) -> float | None:
    if before is None or now is None:
        return now if before is None else before
    return before + SMOOTHING * (now - before)


def _joined(parts: dict[str, str]) -> str:
    return "  ".join(parts.values())


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _details(record: dict[str, Any]) -> str:
    hidden = ("time", "attempt", "event", "traceback")
    shown = {key: value for key, value in record.items() if key not in hidden}
    return "  ".join(f"{key} {format(v, '.4g') if isinstance(v, float) else v}" for key, v in shown.items())
