"""`muster runs rm`, `note` and `tag`: delete and annotate existing runs."""

import json
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from configs import ConfigError, counted
from configs.reading.parse import is_file
from configs.units import byte_size

from .runs import RUNS, Json, Root, Run, complete_run, run_folder


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN", help="Names of runs under --root, or their folders.", autocompletion=complete_run
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    root: Root = RUNS,
) -> None:
    """Delete runs with their checkpoints; a tracker keeps its copy. Example: muster runs rm quickstart"""
    found = {name: removable(name, root) for name in names}  # check them all before deleting the first
    for run_dir in dict.fromkeys(found.values()):
        count, size = _size(run_dir)
        what = f"{run_dir}: {_state(run_dir)}, {counted(count, 'file')}, {byte_size(size)}"
        if not yes and not sys.stdin.isatty():
            raise ConfigError(
                f"would delete {what}\nThere is no terminal to confirm it on: --yes deletes without asking"
            )
        if not yes and not typer.confirm(f"Delete {what}?"):
            print("nothing deleted")
            continue
        delete(run_dir)
        print(f"deleted {run_dir}")


def removable(name: str, root: Path) -> Path:
    """The folder of a run that may be deleted.

    Raises:
        ConfigError: no such run, its folder is a link or not a run's, or it is being trained.
    """
    from trainer.record.lines import EVENTS, in_use, read_events

    given = next((folder for folder in (root / name, Path(name)) if is_file(folder / "config.yaml")), None)
    run_dir = run_folder(name, root)
    if given is not None and given.is_symlink():
        raise ConfigError(
            f"{given} is a link to {os.readlink(given)}: nothing is deleted through a link; name the folder itself"
        )
    if (run_dir / EVENTS).is_symlink() or not read_events(run_dir):
        raise ConfigError(f"{run_dir} is not a run's folder: it has a config.yaml but no record ({EVENTS})")
    if who := in_use(read_events(run_dir)):
        raise ConfigError(
            f"{run_dir.name} is being trained by {who}: stop it first.\n"
            f"If that machine is gone for good, delete {run_dir} by hand"
        )
    return run_dir


def delete(run_dir: Path) -> None:
    """Delete a run's folder, locked against training and sending. Raises ConfigError if either is in progress."""
    from trainer.run.folder import run_lock  # torch
    from trainer.tracking.shipper import only_one

    with ExitStack() as held:
        held.enter_context(run_lock(run_dir))
        if not held.enter_context(only_one(run_dir, 0.0)):
            raise ConfigError(f"the record of {run_dir.name} is being sent to its tracker: try again when that is done")
        try:
            shutil.rmtree(run_dir)
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; what is left of the run is in {run_dir}") from None


def note(
    run: Run,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="Text of the note; '' removes it.")] = None,
    root: Root = RUNS,
) -> None:
    """Write a note about a run, or print it. Example: muster runs note quickstart 'the one for the paper'"""
    from trainer.run.notes import read_notes, set_note

    run_dir = run_folder(run, root)
    if text is None:
        print(read_notes(run_dir).note or f"{run_dir.name} has no note")
        return
    set_note(run_dir, text)
    _say_later(run_dir)


def tag(
    run: Run,
    tags: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Tags to set; KEY= removes one. If none, print them."),
    ] = None,
    root: Root = RUNS,
    as_json: Json = False,
) -> None:
    """Set a run's tags, or print them. Example: muster runs tag quickstart project=stdlib"""
    from trainer.run.notes import read_notes, set_tags

    run_dir = run_folder(run, root)
    changes = {}
    for each in tags or ():
        key, sign, value = each.partition("=")
        if not sign:
            raise ConfigError(f"{each!r} is not KEY=VALUE, for example project=stdlib; {each}= removes the tag {each}")
        changes[key.strip()] = value.strip()
    if changes:
        set_tags(run_dir, changes)
    known = dict(read_notes(run_dir).tags)
    if as_json:
        print(json.dumps(known, indent=1))
    elif changes:
        _say_later(run_dir)
    else:
        print("\n".join(f"{key}={value}" for key, value in known.items()) or f"{run_dir.name} has no tags")


def _say_later(run_dir: Path) -> None:
    from trainer.tracking import read_state

    if read_state(run_dir).get("run_id"):
        print(f"saved; `muster sync {run_dir}` sends it to the tracker, as does the end of the next attempt")
    else:
        print("noted")


def _state(run_dir: Path) -> str:
    from trainer.record.lines import summary

    found = summary(run_dir)
    return f"{found['status']}, step {found['step']:,}"


def _size(run_dir: Path) -> tuple[int, int]:
    """Number of files, and their size in bytes."""
    sizes = [(Path(folder) / name).lstat().st_size for folder, _, names in os.walk(run_dir) for name in names]
    return len(sizes), sum(sizes)
