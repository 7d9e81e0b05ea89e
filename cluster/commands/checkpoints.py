"""`muster checkpoint`: list a run's checkpoints, show what is in one, verify every byte."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from configs import ConfigError, ExitCode, counted

from .runs import RUNS, Json, Root, Run, run_folder

app = typer.Typer(help="List, inspect and verify a run's checkpoints.", no_args_is_help=True)
Step = Annotated[int | None, typer.Option(help="Verify only the checkpoint of this step.", min=0)]


@app.command("list")
def list_checkpoints(run: Run, root: Root = RUNS, as_json: Json = False) -> None:
    """List a run's checkpoints and check their file sizes. Example: muster checkpoint list quickstart"""
    run_dir = run_folder(run, root)
    from trainer.checkpoint.manifest import committed, folder

    rows = [_row(run_dir, step) for step in committed(run_dir)]
    usable = [row["step"] for row in rows if not row["problems"]]
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    kept = {folder(run_dir, row["step"]).name for row in rows}
    found: dict[str, Any] = {
        "run": run_dir.name,
        "newest_resumable": usable[-1] if usable else None,
        "checkpoints": rows,
        "set_aside": [name for name in names if name.endswith(".refused")],
        "unfinished": [name for name in names if name not in kept and not name.endswith(".refused")],
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if not rows:
        print(f"{run_dir.name} has no checkpoints")
    for row in rows:
        notes = [f"damaged: {problem}" for problem in row["problems"][:1]]
        notes += ["newest resumable"] if row["step"] == found["newest_resumable"] else []
        size = f"{row['bytes']:>15,} bytes in {counted(row['files'], 'file')}"
        print(f"step {row['step']:>8,}  {_when(row['time']):19}  {size}  {''.join(notes)}".rstrip())
    for what in ("set_aside", "unfinished"):
        if found[what]:
            print(f"{what.replace('_', ' ')}: {', '.join(found[what])}")


@app.command()
def show(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest if not given.", min=0)] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Describe a checkpoint. Example: muster checkpoint show quickstart --step 400"""
    run_dir = run_folder(run, root)
    newest = steps_of(run_dir, step)[-1]
    from trainer.checkpoint.manifest import CheckpointError, folder, read_manifest

    path = folder(run_dir, newest)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    found = {
        "run": run_dir.name,
        **manifest.model_dump(mode="json", include={"step", "time", "format", "state", "scalars", "files"}),
        "bytes": manifest.bytes,
        "topology": manifest.topology,
        "states": {
            state: {"tensors": len(shapes), "elements": sum(map(math.prod, shapes.values())), "shapes": shapes}
            for state, shapes in manifest.shapes.items()
        },
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    degrees = " ".join(f"{key}={value}" for key, value in found["topology"].items() if value is not None)
    print(f"{found['run']} step {found['step']:,}, written {_when(found['time'])}, format {found['format']}")
    print(f"written by {counted(len(found['files']), 'process')}: {degrees or 'topology not recorded'}")
    for key, value in found["state"].items():
        if key == "recent_losses":
            value = counted(len(value), "value")
        print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
    for state, held in found["states"].items():
        print(f"{state}: {counted(held['elements'], 'element')} in {counted(held['tensors'], 'tensor')}")
    for key, value in found["scalars"].items():
        print(f"{key}: {value:g}")
    for name, entry in found["files"].items():
        print(f"{name}: {entry['bytes']:,} bytes, sha256 {entry['sha256']}")


@app.command()
def verify(run: Run, step: Step = None, root: Root = RUNS, as_json: Json = False) -> None:
    """Recompute every digest; exit code 1 if one differs. Example: muster checkpoint verify quickstart"""
    run_dir = run_folder(run, root)
    steps = steps_of(run_dir, step)
    from trainer.checkpoint.manifest import folder

    rows = [_row(run_dir, each, digests=True) for each in steps]
    if as_json:
        print(json.dumps({"run": run_dir.name, "checkpoints": rows}, indent=1))
    for row in () if as_json else rows:
        path = folder(run_dir, row["step"])
        if not row["problems"]:
            print(
                f"{path.name}: {counted(row['files'], 'file')}, {counted(row['bytes'], 'byte')}, every digest "
                f"matches the manifest"
            )
        for problem in row["problems"]:
            print(f"{path.name}: damaged: {problem}")
    if any(row["problems"] for row in rows):
        raise typer.Exit(ExitCode.FAILED)


def steps_of(run_dir: Path, step: int | None) -> list[int]:
    """Steps of the run's checkpoints, or `step` alone. Raises ConfigError if there is no such checkpoint."""
    from trainer.checkpoint.manifest import committed  # no torch

    steps = committed(run_dir)
    if not steps or (step is not None and step not in steps):
        have = f"its checkpoints are at steps {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise ConfigError(f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}: {have}")
    return steps if step is None else [step]


def _row(run_dir: Path, step: int, *, digests: bool = False) -> dict[str, Any]:
    from trainer.checkpoint import store  # torch
    from trainer.checkpoint.manifest import CheckpointError, folder, read_manifest

    path = folder(run_dir, step)
    problems = store.verify(path, digests=digests)
    row: dict[str, Any] = {"step": step, "time": None, "bytes": 0, "files": 0}
    with contextlib.suppress(CheckpointError):
        manifest = read_manifest(path)
        row |= {"time": manifest.time, "bytes": manifest.bytes, "files": len(manifest.files)}
    return row | {"problems": problems}


def _when(seconds: float | None) -> str:
    return "unknown" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
