"""Find runs and list them: `muster runs`, `muster sync`, and what RUN means for the other commands."""

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from configs import ConfigError, ExitCode, counted
from configs.reading.parse import clip, is_file, shortened
from configs.units import ago, duration
from trainer.record.terminal import Console

from .listing import show


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Names of runs, for shell completion."""
    found = run_folders(Path(context.params.get("root") or RUNS))
    return [folder.name for folder in found if folder.name.startswith(incomplete)]


Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Name of a run under --root, or the path of its folder.", autocompletion=complete_run
    ),
]
Root = Annotated[Path, typer.Option(help="Folder of all runs (run.root).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RUNS = Path("runs")
SHOWN = 240
"""Characters of a reason that `muster status` shows; events.jsonl has all of it."""


def find_run(run: str, root: Path) -> Path | None:
    """The folder of a run given by name, path or MLflow id (8 digits suffice); None: no run, or several by that id."""
    for folder in (root / run, Path(run)):
        if is_file(folder / "config.yaml"):
            return folder.resolve()
    if re.fullmatch("[0-9a-f]{8,32}", run):
        from trainer.tracking import read_state

        own = [folder for folder in run_folders(root) if str(read_state(folder).get("run_id", "")).startswith(run)]
        return own[0].resolve() if len(own) == 1 else None
    return None


def run_folder(run: str, root: Path) -> Path:
    """As `find_run`. Raises ConfigError that lists the runs there are."""
    if folder := find_run(run, root):
        return folder
    raise ConfigError(no_run(run, root))


def no_run(run: str, root: Path) -> str:
    """The message for a run that cannot be found."""
    for folder in (root / run, Path(run)):
        if is_file(folder / "events.jsonl") or is_file(folder / "metrics.jsonl"):
            return f"{shortened(folder, 200)} is not a complete run: its config.yaml is missing, or is not a file"
    names = [folder.name for folder in run_folders(root)]
    near = difflib.get_close_matches(run, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:8])}" if names else "it has none"
    return f"no run {shortened(repr(run), 100)} in {root}: {hint}; --root names another folder"


def run_folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/config.yaml"))


def runs(context: typer.Context, root: Root = RUNS, as_json: Json = False) -> None:
    """List runs, or delete, annotate or tag them. Example: muster runs --root runs"""
    if context.invoked_subcommand:
        context.default_map = {context.invoked_subcommand: {"root": str(root)}}
        return
    from trainer.record.summaries import summaries
    from trainer.run.notes import read_notes

    found = []
    for run in summaries(root, run_folders(root)):
        notes = read_notes(root / run["name"])
        found.append(run | {"note": notes.note, "tags": dict(notes.tags)})
    found.sort(key=lambda run: run["updated"] or 0)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if not found:
        print(f"no runs in {root}")
        return
    columns = ("name", "status", "step", "loss", "eval loss", "tokens", "trained on", "attempts", "updated", "note")
    rows = [
        [
            run["name"], run["status"], f"{run['step']:,}", _number(run["loss"]), _number(run["eval_loss"]),
            *_trained_on(run), str(run["attempts"]), ago(run["updated"]), _noted(run),
        ]
        for run in found
    ]  # fmt: skip
    show(Console(), columns, rows)


def _trained_on(run: dict[str, Any]) -> tuple[str, str]:
    """The columns "tokens" (language models) and "trained on" (count and unit, of all others)."""
    return (f"{run['weight']:,}", "") if run["unit"] == "tokens" else ("", f"{run['weight']:,} {run['unit']}")


def _noted(run: dict[str, Any]) -> str:
    return clip(" ".join([*(f"{key}={value}" for key, value in run["tags"].items()), run["note"]]), SHOWN)


def status(run: Run, root: Root = RUNS, as_json: Json = False) -> None:
    """Show a run's status, and where its time went in each attempt. Example: muster status quickstart"""
    from trainer.record.goodput import BOOKS, goodput, productive, total, unpaused
    from trainer.record.lines import read_events, summary
    from trainer.record.notable import notable
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
        print(f"{kind.replace('_', ' ')}: {clip(each.text, SHOWN)} ({when})")
    if behind:
        later = "will be retried" if found["status"] == "RUNNING" else f"`muster sync {run}` sends what is missing"
        print(f"tracking: {clip(behind, SHOWN)}; {later}")
    if not attempts:
        return
    meant, spent = max(unpaused(whole), 1e-9), [name for name in BOOKS if whole[name]]
    table = Table("attempt", box=None, pad_edge=False)
    for name in spent:
        table.add_column(name.replace("_", " "), justify="right")
    for attempt in attempts:
        table.add_row(
            str(attempt.number), *(duration(attempt.seconds[name]) if attempt.seconds[name] else "-" for name in spent)
        )
    table.add_row("share", *("" if name == "paused" else f"{whole[name] / meant:.1%}" for name in spent))
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
    print(f"goodput {productive(whole):.1%}: {duration(whole['step'])} of {duration(meant)}")


def sync(
    run: Run,
    root: Root = RUNS,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to retry if the tracker does not answer.")
    ] = 60.0,
) -> None:
    """Send the tracker what it is missing of a run or sweep. Example: muster sync quickstart"""
    from trainer.tracking.shipper import ship  # MLflow takes seconds to import
    from trainer.tracking.sweep import SWEEP, ship_sweep

    sweeps = [folder for folder in (root / run, Path(run)) if is_file(folder / SWEEP)]
    run_dir = sweeps[0].resolve() if sweeps else run_folder(run, root)
    done = ship_sweep(run_dir, grace=wait) if sweeps else ship(run_dir, grace=wait)
    if done.records or done.files:
        print(f"{run_dir.name}: sent {counted(done.records, 'record')} and {counted(done.files, 'file')}")
    if done.missing:
        print(f"muster: {done.missing}\nRun `muster sync {run}` again to send the rest", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED)
    if not (done.records or done.files):
        print(f"{run_dir.name}: no record or file was missing; its note, tags and description are up to date")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"
