"""The git commit of the user's folder: which code a run was started from."""

import json
import subprocess
from pathlib import Path
from typing import Any

SENT = ".muster-commit.json"
"""In a folder that was packed for a cluster, which has no .git: what `of` said where it was packed."""
TIMEOUT = 5.0
"""Seconds for each question to git; a large repository on a network disk may take longer, and is left out."""


def of(folder: Path) -> dict[str, Any]:
    """`git_commit`, and `git_dirty`: whether a file that git tracks differs from it. New files do not count: a run's
    own folder is often one.

    Returns:
        what could be found out, empty if the folder is in no git repository or git is not installed.
    """
    try:
        told = json.loads((folder / SENT).read_text(encoding="utf-8"))
        return {key: told[key] for key in ("git_commit", "git_dirty") if key in told}
    except (OSError, ValueError, TypeError):
        pass
    if not (commit := _git(folder, "rev-parse", "--verify", "HEAD")):
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit} | ({} if changed is None else {"git_dirty": bool(changed)})


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, None if it does not; it takes no lock and runs no hook of the folder's."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, timeout=TIMEOUT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
