"""A sweep's progress on screen: a live table on a terminal, lines elsewhere."""

import time
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from configs import counted
from configs.units import ago, duration, scientific
from trainer.record.lines import read_events
from trainer.record.terminal import Console

from .progress import Books, Item, Progress, progress
from .trial_state import OVER, Ledger, Standing

QUIET_FOR = 30.0
"""Seconds between lines without a terminal while no trial ends."""


def show(sweep_dir: Path) -> None:
    """Print a sweep's progress. Raises ConfigError if it never ran."""
    Console(soft_wrap=True).print(render(progress(sweep_dir)))


def render(found: Progress) -> RenderableType:
    """The table of budgets and variants, the running trials, failures, and the summary."""
    return Group(groups(found), *running(found), *(Text(line) for line in failures(found)), Text(whole(found)))


def groups(found: Progress) -> Table:
    """A row for each budget and variant."""
    table = Table("budget", "variant", box=None, pad_edge=False)
    for column in ("done", "running", "waiting", "failed", "best held-out loss"):
        table.add_column(column, justify="right")
    rows: dict[tuple[float, str], list[Standing]] = {}
    for item in found.items:
        rows.setdefault((item.budget or 0.0, item.variant), []).append(found.standings[item.name])
    for (budget, variant), own in sorted(rows.items()):
        states = [each.state for each in own]
        losses = [each.eval_loss for each in own if each.state == "finished" and each.eval_loss is not None]
        table.add_row(
            scientific(budget) if budget else "", variant, f"{states.count('finished')}/{len(own)}",
            _some(states.count("running")), _some(states.count("waiting") + states.count("stopped")),
            _some(states.count("failed") + states.count("diverged")), f"{min(losses):.4f}" if losses else "",
        )  # fmt: skip
    return table


def running(found: Progress) -> list[RenderableType]:
    """A table of the trials that are training."""
    own = [(item, found.standings[item.name]) for item in found.items]
    own = [(item, each) for item, each in own if each.state == "running"]
    if not own:
        return []
    table = Table("running", box=None, pad_edge=False)
    for column in ("step", "loss", "last step"):
        table.add_column(column, justify="right")
    for item, each in own:
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        table.add_row(item.name, f"{each.step:,}/{item.steps:,}", loss, ago(each.updated) if each.updated else "")
    return [Text(""), table]


def failures(found: Progress) -> list[str]:
    """A line for each trial that failed for good."""
    bad = [each for each in found.standings.values() if each.state in ("failed", "diverged")]
    return [f"{each.name} {each.state}: {' '.join(each.reason.split())[:200]}" for each in bad]


def whole(found: Progress) -> str:
    """One line: how many are done, the time left, and where the devices' time went."""
    done, count = found.count("finished"), len(found.items)
    parts = [f"{found.name}: {found.status}, {done}/{counted(count, 'trial')} finished"]
    if failed := found.count("failed", "diverged"):
        parts.append(f"{failed} failed")
    if found.open:
        parts.append(f"{found.open} more to be chosen")
    if found.eta is not None and found.status == "RUNNING":
        parts.append(f"eta {duration(found.eta)}")
    return "\n" + ", ".join(parts) + f"; {booked(found.books)}"


def booked(books: Books) -> str:
    """Where the time went: the largest shares."""
    if not books.total:
        return "no device time yet"
    parts = sorted(((seconds, name) for name, seconds in books.seconds.items() if name != "step"), reverse=True)
    rest = ", ".join(f"{name.replace('_', ' ')} {seconds / books.total:.0%}" for seconds, name in parts[:4] if seconds)
    return f"{books.in_steps:.0%} of {books.total:,.0f} {books.device}-seconds in steps ({rest})"


def _some(count: int) -> str:
    return str(count) if count else ""


class View:
    """Shows the progress of a sweep that this process runs."""

    def __init__(self, sweep_dir: Path, console: Console) -> None:
        self._ledger, self._console = Ledger(sweep_dir), console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._told = {name for name, each in self._read().standings.items() if each.state in OVER}
        self._last, self._began, self._tracker = time.monotonic(), time.time(), ""

    def __enter__(self) -> "View":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, last: bool = False) -> None:
        """Read the records and print what is new."""
        found = self._read()
        told = [e["reason"] for e in read_events(self._ledger.sweep_dir) if e["event"] == "tracker_failed"
                and e["time"] > self._began and "reason" in e]  # fmt: skip
        if told and told[-1] != self._tracker:
            self._tracker = told[-1]
            self._say(f"tracking  {told[-1]}")
        if self._live:
            self._live.update(render(found), refresh=True)
            return
        items = {item.name: item for item in found.items}
        for name, each in found.standings.items():
            if each.state in OVER and name not in self._told:
                self._told.add(name)
                self._say(f"{len(self._told)}/{len(items)} {line(items[name], each)}")
        if not last and time.monotonic() - self._last > QUIET_FOR and found.count("running"):
            going = [
                f"{n} {each.step}/{items[n].steps}" for n, each in found.standings.items() if each.state == "running"
            ]
            self._say(f"running: {', '.join(going[:6])}{whole(found).partition(',')[2]}")

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(Text(text), soft_wrap=True)

    def _read(self) -> Progress:
        return progress(self._ledger.sweep_dir, self._ledger)


def line(item: Item, each: Standing) -> str:
    """The line for a trial that has ended."""
    if each.state != "finished":
        return f"{each.name} {each.state}: {' '.join(each.reason.split())[:300]}"
    loss = "" if each.eval_loss is None else f"held-out loss {each.eval_loss:.4f}, "
    return f"{each.name}: {loss}{counted(item.steps - item.from_step, 'step')}"
