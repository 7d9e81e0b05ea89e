"""The user's folder as one zip that a cluster can unpack: what .gitignore leaves out stays at home."""

import json
import logging
import os
import stat
import struct
import zipfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from configs import ConfigError
from trainer import revision

from .messages import BadMessage as BadMessage
from .messages import clip, parse

MESSAGE = "message.json"
TOP = "work"
"""Ray puts the unpacked zip on its workers' sys.path, where a user's own `models/` would win over ours: so all of it
lies one folder down."""
LIMIT = 100 * 2**20
"""Bytes. Ray keeps the zip in the memory of the head, and refuses 512 MiB."""
LEFT_OUT = [".git", ".venv", "venv", "__pycache__"]

MOST_FILES = 10_000
_LONGEST_MESSAGE = 2**17
_MOST_DIRECTORY = 4 * 2**20
"""Bytes of a zip's central directory: what reads it makes an object of every 46."""


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
        archive.writestr(MESSAGE, message)
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

    Ray unpacks what is accepted on every machine of the job: so all of it is inflated here once, and counted.

    Raises:
        BadMessage: it is damaged, holds more than LIMIT or what `write_zip` does not write (a file outside of TOP, one
            of two names, a link, an encrypted or overlapping member), or says what `messages` refuses.
    """
    if len(content) > LIMIT:
        raise BadMessage(f"it has {_size(len(content))} and the limit is {_size(LIMIT)}")
    _check_end(content)
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            _check_members(archive, content)
            message = b""
            for member in archive.infolist():
                left = member.file_size
                with archive.open(member) as file:
                    while chunk := file.read(2**20):
                        left -= len(chunk)
                        if member.filename == MESSAGE:
                            message += chunk
                if left:
                    raise BadMessage(f"its {clip(repr(member.filename), 100)} has another size than it says")
    except BadMessage:
        raise
    except Exception as error:  # zipfile and the decompressors raise some ten kinds
        raise BadMessage(f"it is a damaged zip: {clip(error)}") from None
    return parse(message)


def _check_end(content: bytes) -> None:
    """Raise BadMessage unless a zip's last bytes are those of a plain one: no comment, no zip64, a directory of at most
    _MOST_DIRECTORY bytes. All that reads it then reads the same."""
    if len(content) < 22:
        raise BadMessage("it is no zip")
    mark, disk, start_disk, here, count, size, offset, comment = struct.unpack("<4s4H2LH", content[-22:])
    if mark != b"PK\x05\x06" or comment:
        raise BadMessage("it is no zip, is cut, or ends in a comment")
    if count > MOST_FILES or size > _MOST_DIRECTORY:
        raise BadMessage(f"it has {count} files, with names of {_size(size)}, and the limit is {MOST_FILES}")
    if disk or start_disk or here != count or offset + size != len(content) - 22 or content[-42:-38] == b"PK\x06\x07":
        raise BadMessage("it is a zip of several parts, a zip64, or damaged")


def _check_members(archive: zipfile.ZipFile, content: bytes) -> None:
    """Raise BadMessage if a member is none that `write_zip` writes, by what is said of it."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(names) > MOST_FILES:
        raise BadMessage(f"it has {len(names)} files and the limit is {MOST_FILES}")
    if outside := [name for name in names if name != MESSAGE and not _is_ours(name)]:
        raise BadMessage(f"it holds {clip(repr(outside[0]), 100)}, a file outside of {TOP}/")
    if MESSAGE not in names:
        raise BadMessage(f"it has no {MESSAGE}")
    files = {name for name in names if not name.endswith("/")}
    above = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    if len(set(names)) < len(names) or files & above:
        raise BadMessage("two of its files have one name")
    if (total := sum(member.file_size for member in members)) > LIMIT:
        raise BadMessage(f"it unpacks to {_size(total)} and the limit is {_size(LIMIT)}")
    if archive.getinfo(MESSAGE).file_size > _LONGEST_MESSAGE:
        raise BadMessage(f"its {MESSAGE} has more than {_size(_LONGEST_MESSAGE)}")
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        unlike = _unlike_ours(member)
        if not unlike and member.header_offset < end:
            unlike = "overlaps another"
        if unlike:
            raise BadMessage(f"its {clip(repr(member.filename), 100)} {unlike}")
        lengths = content[member.header_offset + 26 : member.header_offset + 30]
        name, extra = struct.unpack("<2H", lengths) if len(lengths) == 4 else (0, 0)
        end = member.header_offset + 30 + name + extra + member.compress_size
    at = archive.start_dir
    for _ in members:
        name, extra, comment = struct.unpack("<3H", content[at + 28 : at + 34])
        if extra or comment:
            raise BadMessage("its directory of files has extra fields or comments")
        at += 46 + name
    if end > archive.start_dir or at != len(content) - 22:
        raise BadMessage("its directory of files is damaged")


def _unlike_ours(member: zipfile.ZipInfo) -> str:
    """What tells a member from all that `write_zip` writes; empty: nothing."""
    kind, marks = stat.S_IFMT(member.external_attr >> 16), (member.external_attr >> 16) & 0o7000
    if member.flag_bits & ~0x0806:  # all but: the name is UTF-8; how hard it was deflated
        return "is encrypted, or written as a stream"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {member.compress_type}"
    if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG) or marks:
        return "is a link, a device, or setuid"
    return ""


def _is_ours(name: str) -> bool:
    """Whether a name is plain, of a possible length, and lies below TOP."""
    parts = name.removesuffix("/").split("/")
    plain = all(part not in ("", ".", "..") and len(os.fsencode(part)) < 256 for part in parts)
    return (
        plain and parts[0] == TOP and (len(parts) > 1 or name == f"{TOP}/") and len(name) <= 1024 and "\\" not in name
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
