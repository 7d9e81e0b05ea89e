"""The git commit of the user's folder: which code a run was started from."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from trainer.files.scratch import temporary_folder

SENT = ".muster-commit.json"
"""File in a folder that was packed for a cluster, which has no .git: what `of` returned where it was packed."""
TIMEOUT = 1.5
"""Seconds for a git command: it would block on a pipe among the files that it reads."""
PATIENCE = 5.0
"""Seconds for `git status`; if a large repository on a network disk takes longer, `git_dirty` is left out."""
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
KEPT = re.compile(
    r"core\.(autocrlf|checkstat|eol|filemode|ignorecase|precomposeunicode|symlinks|trustctime) ([A-Za-z]+|[01])"
)
"""Settings, as `git config --get-regexp` prints them, without which git would see changes where there are none."""


def of(folder: Path) -> dict[str, Any]:
    """`git_commit`, and `git_dirty`: whether a tracked file differs from it. Untracked files do not count (a run's own
    folder is often one), nor do changes inside submodules.

    No program that the folder's own git configuration names is run: no filter, hook, monitor, pager or fetch. A file
    that git would have to filter before it can compare it (its size or time differs from the index) is compared
    unfiltered, and so may count as changed.

    Returns:
        What could be found out; empty if the folder is in no git repository or git is not installed.
    """
    if sent := _sent(folder):
        return sent
    asked = ("HEAD", "--show-object-format", "--show-toplevel", "--git-path", "objects", "--git-path", "index")
    told = (_git(folder, {}, "rev-parse", "--path-format=absolute", *asked) or "").split("\n")
    if len(told) != 5 or not HASH.fullmatch(told[0]):
        return {}
    found: dict[str, Any] = {"git_commit": told[0]}
    try:
        # git would block on a pipe in its place.
        changed = _changed(folder, *told) if Path(told[4]).is_file() else None
    except OSError:
        return found
    return found if changed is None else found | {"git_dirty": changed}


def _sent(folder: Path) -> dict[str, Any]:
    if not (path := folder / SENT).is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            told = json.loads(file.read(200))
    except (OSError, ValueError):
        return {}
    if not isinstance(told, dict) or not HASH.fullmatch(str(told.get("git_commit"))):
        return {}
    dirty = told.get("git_dirty")
    return {"git_commit": told["git_commit"]} | ({"git_dirty": dirty} if isinstance(dirty, bool) else {})


def _changed(folder: Path, commit: str, hashes: str, top: str, objects: str, index: str) -> bool | None:
    """Ask git, in a temporary repository with the folder's objects, index and files but a configuration of ours."""
    lines = (_git(folder, {}, "config", "--get-regexp", r"^core\.") or "").splitlines()
    kept = [f"{found[1]} = {found[2]}\n" for line in lines if (found := KEPT.fullmatch(line))]
    with temporary_folder() as there:
        (there / "refs").mkdir()
        (there / "HEAD").write_text(f"{commit}\n")
        (there / "config").write_text(
            f"[extensions]\nobjectFormat = {hashes}\n[core]\nrepositoryFormatVersion = 1\n{''.join(kept)}"
        )
        for shared in Path(index).parent.glob("sharedindex.*"):  # the larger part of a split index
            (there / shared.name).symlink_to(shared)
        environment = {
            "GIT_DIR": str(there),
            "GIT_WORK_TREE": top,
            "GIT_OBJECT_DIRECTORY": objects,
            "GIT_INDEX_FILE": index,
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        # Of a submodule only the commit: git would use the submodule's own configuration to look for changed files.
        asked = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
        told = _git(folder, environment, *asked, within=PATIENCE)
    return None if told is None else bool(told)


def _git(folder: Path, environment: dict[str, str], *arguments: str, within: float = TIMEOUT) -> str | None:
    """The output of a git command; None if it fails. git takes no lock, and is never run from a relative PATH entry.

    Args:
        environment: variables that lead git to a repository of ours; if empty, the user's own configuration counts.
    """
    dropped = "GIT_" if environment else "GIT_(?!CONFIG)"
    kept = {key: value for key, value in os.environ.items() if not re.match(dropped, key)}
    path = os.pathsep.join(filter(os.path.isabs, kept.get("PATH", os.defpath).split(os.pathsep)))
    if not (git := shutil.which("git", path=path)):
        return None
    command = [git, "--no-pager", "--no-optional-locks"]
    for setting in ("core.fsmonitor=false", f"core.hooksPath={os.devnull}", "safe.bareRepository=explicit"):
        command += ["-c", setting]
    try:
        done = subprocess.run(
            [*command, *arguments], cwd=folder, env=kept | {"PATH": path} | environment, timeout=within,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
