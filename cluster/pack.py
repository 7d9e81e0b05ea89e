"""The user's folder as one zip that a cluster can unpack: what .gitignore leaves out stays at home."""

import json
import logging
import re
import zipfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from configs import ConfigError
from trainer import revision

TOP = "work"
"""Ray puts the unpacked zip on its workers' sys.path, where a user's own `models/` would win over ours: so all of it
lies one folder down."""
LIMIT = 100 * 2**20
"""Bytes. Ray keeps the zip in the memory of the head, and refuses 512 MiB."""
LEFT_OUT = [".git", ".venv", "venv", "__pycache__"]


JOB = {
    "name": str, "run_dir": str, "command": str, "workers": int, "most": int, "cpus": (int, float),
    "gpus": (int, float), "group": int, "priority": int,
}  # fmt: skip
"""What is said of a job, and of which type."""


class BadMessage(ValueError):
    """What reached the queue is no message of ours; the text says why."""


def files(folder: Path, without: Sequence[Path] = ()) -> list[Path]:
    """The files below a folder that .gitignore and .rayignore, in any folder, do not name; relative, sorted.

    Args:
        without: folders below it that are left out too.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # what Ray packs by itself

    folder = folder.resolve()
    found: list[Path] = []
    names = [f"/{path.relative_to(folder)}" for path in without if path.is_relative_to(folder) and path != folder]
    quiet = logging.getLogger("muster.pack")
    quiet.setLevel(logging.ERROR)
    _dir_travel(
        folder,
        [_get_excludes(folder, [*LEFT_OUT, *names])],
        lambda path: found.append(path.relative_to(folder)) if path.is_file() else None,
        include_gitignore=True,
        logger=quiet,
    )
    return sorted(found)


def check_size(folder: Path, packed: Iterable[Path], limit: int = LIMIT) -> None:
    """Raise ConfigError, with the largest files, if they are more than goes to a cluster."""
    sizes = {path: (folder / path).stat().st_size for path in packed}
    if (total := sum(sizes.values())) > limit:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
        names = ", ".join(f"{path} ({_size(sizes[path])})" for path in largest)
        raise ConfigError(
            f"{folder} has {_size(total)} to send and the limit is {_size(limit)}; the largest: {names}.\n"
            f"Name them in .gitignore or .rayignore, and read data from a folder that the cluster reaches"
        )


def write_zip(target: Path, folder: Path, packed: Iterable[Path], message: str) -> None:
    """Write `message.json`, and the files below TOP, with the git commit that they were packed at."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("message.json", message)
        archive.writestr(f"{TOP}/", "")  # there even if the folder is empty
        if (packed := list(packed)) and (commit := revision.of(folder)):
            archive.writestr(f"{TOP}/{revision.SENT}", json.dumps(commit))
        for path in packed:
            # Zip knows no time before 1980, which some filesystems and build tools give.
            entry = zipfile.ZipInfo.from_file(folder / path, f"{TOP}/{path.as_posix()}", strict_timestamps=False)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (folder / path).read_bytes())


def read_message(content: bytes) -> dict[str, Any]:
    """The message of a zip, which need not be one that `write_zip` has made.

    Raises:
        BadMessage: it lacks something, an id would be no plain name of a file, or a file lies outside of TOP.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            outside = [name for name in archive.namelist() if not _is_ours(name)]
            message = json.loads(archive.read("message.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, RuntimeError) as error:
        raise BadMessage(f"no zip with a message.json: {' '.join(str(error).split())[:200]}") from None
    if outside:
        raise BadMessage(f"it holds {outside[0]!r}, a file outside of {TOP}/")
    if not isinstance(message, dict):
        raise BadMessage("its message.json is no mapping")
    kinds: dict[str, dict[str, Any]] = {
        "submit": {"id": str, "job": dict},
        "retry": {"id": str, "new": str},
        "stop": {"id": str, "now": bool},
    }
    if message.get("do") not in kinds:
        raise BadMessage(f"its do is {message.get('do')!r}")
    _check_types(message, kinds[message["do"]])
    for key in ("id", "new"):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", message.get(key, "none")):
            raise BadMessage(f"{key} {message[key]!r} is no name of a job")
    if "job" in message:
        _check_types(message["job"], JOB)
    return message


def _is_ours(name: str) -> bool:
    path = PurePosixPath(name)
    return name == "message.json" or (path.parts[:1] == (TOP,) and ".." not in path.parts and "\\" not in name)


def _check_types(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, kind in wanted.items():
        if not isinstance(given.get(key), kind):
            raise BadMessage(f"its {key} is {given.get(key)!r}")


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
