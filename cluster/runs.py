"""Find runs and list them: `muster runs`, `muster sync`, and what RUN means for the other commands."""

import difflib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from configs import ConfigError
from configs.parse import is_file, shortened
from trainer.terminal import Console

Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run under --root, or the path of its folder.")]
Root = Annotated[Path, typer.Option(help="Folder of all runs (run.root).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RUNS = Path("runs")
SHOWN = 240
"""Characters of a reason that `muster status` shows; events.jsonl has the whole."""


def run_folder(run: str, root: Path) -> Path:
    """The folder of a run given by name or path. Raises ConfigError, with the names there are."""
    for folder in (root / run, Path(run)):
        if is_file(folder / "config.yaml"):
            return folder.resolve()
    names = [folder.name for folder in run_folders(root)]
    near = difflib.get_close_matches(run, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names[:8]) or 'none'}"
    raise ConfigError(f"no run {shortened(repr(run), 100)} in {root}: {hint}; --root names another folder of runs")


def run_folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/config.yaml"))


def runs(root: Root = RUNS, as_json: Json = False) -> None:
    """List the runs: status, step, losses, tokens. Example: muster runs --root runs"""
    from trainer.record import summary

    found = []
    for folder in run_folders(root):
        try:
            found.append(summary(folder))
        except OSError as error:
            print(f"muster: {error.filename or folder}: {error.strerror}", file=sys.stderr)
    found.sort(key=lambda run: run["updated"] or 0)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if not found:
        print(f"no runs in {root}")
        return
    table = Table("name", "status", box=None, pad_edge=False)
    for column in ("step", "loss", "eval loss", "tokens", "attempts", "updated"):
        table.add_column(column, justify="right")
    for run in found:
        table.add_row(
            run["name"],
            run["status"],
            f"{run['step']:,}",
            _number(run["loss"]),
            _number(run["eval_loss"]),
            f"{run['tokens']:,}",
            str(run["attempts"]),
            ago(run["updated"]),
        )
    console = Console()
    # A pipe has no width of its own; cut names would not be found by what reads it.
    console.print(table, soft_wrap=not console.is_terminal)


def status(run: Run, root: Root = RUNS, as_json: Json = False) -> None:
    """How a run stands and where its time went, attempt by attempt. Example: muster status quickstart"""
    from trainer.goodput import BOOKS, goodput, productive, total
    from trainer.notable import cut, notable
    from trainer.record import read_events, summary
    from trainer.tracking import read_state

    run_dir = run_folder(run, root)
    found, attempts = summary(run_dir), goodput(run_dir)
    told, behind = notable(read_events(run_dir)), read_state(run_dir).get("error")
    whole = total(attempts)
    if as_json:
        books = [{"attempt": a.number, "began": a.began, "ended": a.ended, "seconds": a.seconds} for a in attempts]
        found |= {"notable": {kind: each._asdict() for kind, each in told.items()}, "tracking": behind}
        print(json.dumps(found | {"goodput": productive(whole), "seconds": whole, "books": books}, indent=1))
        return
    reason = f" ({found['reason']})" if found["reason"] else ""
    losses = f"loss {_number(found['loss']) or '-'}, held-out loss {_number(found['eval_loss']) or '-'}"
    print(f"{found['name']}: {found['status']}{reason}, step {found['step']:,}, {losses}")
    for kind, each in told.items():
        when = f"attempt {each.attempt}, {ago(each.time)}" + (f", {each.times} in all" if each.times > 1 else "")
        print(f"{kind.replace('_', ' ')}: {cut(each.text, SHOWN)} ({when})")
    if behind:
        later = "it is tried again" if found["status"] == "RUNNING" else f"`muster sync {run}` sends what is missing"
        print(f"tracking: {cut(behind, SHOWN)}; {later}")
    if not attempts:
        return
    table = Table("attempt", box=None, pad_edge=False)
    for name in BOOKS:
        table.add_column(name.replace("_", " "), justify="right")
    for attempt in attempts:
        table.add_row(str(attempt.number), *(_seconds(attempt.seconds[name]) for name in BOOKS))
    table.add_row("share", *(f"{whole[name] / max(sum(whole.values()), 1e-9):.1%}" for name in BOOKS))
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
    print(f"goodput {productive(whole):.1%}: {_seconds(whole['step'])} of {_seconds(sum(whole.values()))}")


def sync(
    run: Run,
    root: Root = RUNS,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to try while it does not answer.")] = 60.0,
) -> None:
    """Send the tracker what it has missed of a run, or of a sweep and its runs. Example: muster sync quickstart"""
    from trainer.tracking.shipper import ship  # MLflow takes seconds to import
    from trainer.tracking.sweep import SWEEP, ship_sweep

    sweeps = [folder for folder in (root / run, Path(run)) if is_file(folder / SWEEP)]
    run_dir = sweeps[0].resolve() if sweeps else run_folder(run, root)
    done = ship_sweep(run_dir, grace=wait) if sweeps else ship(run_dir, grace=wait)
    if done.records or done.files:
        print(f"{run_dir.name}: sent {_count(done.records, 'record')} and {_count(done.files, 'file')}")
    if done.missing:
        print(f"muster: {done.missing}\n`muster sync {run}` again sends the rest", file=sys.stderr)
        raise typer.Exit(1)
    if not (done.records or done.files):
        print(f"{run_dir.name}: nothing is missing")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _seconds(value: float) -> str:
    if value == 0:
        return "-"
    return f"{value:.1f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"


def ago(then: float | None) -> str:
    if then is None:
        return ""
    seconds = max(0.0, time.time() - then)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
