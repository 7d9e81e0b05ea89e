"""Packs the user's folder, without what .gitignore excludes, into a zip, and checks such zips."""

import errno
import json
import os
import stat
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

from cluster.gangs.access_token import known_tokens
from configs import ConfigError
from configs.reading.parse import clip
from configs.units import byte_size
from trainer.files.own_files import open_file
from trainer.run import revision

from .ignore import ignored_by, ignored_by_files
from .messages import BadMessage, Submit, parse
from .secret_files import holds_secret, is_secret

MESSAGE = "message.json"
TOP = "work"
"""Folder of all files in the zip. Ray puts the unpacked zip on its workers' sys.path, where a user's `models/` would
shadow ours."""
LIMIT = 100 * 2**20
"""Most bytes of a zip, and of its contents. Ray keeps it in the memory of the head, and refuses 512 MiB."""
JOB = ".muster-job"
"""Folder of a job's config. Left out when a job submits its own folder in turn."""
LEFT_OUT = [".git", ".hg", ".svn", ".venv", "venv", "__pycache__", JOB]
MOST_FILES, SHOWN = 10_000, 20
SECRETS = "secrets: --with FILE sends one"
LINKS = "links that lead out of this folder, into themselves, or to what is not sent"
SPECIAL = "not regular files"

_LONGEST_MESSAGE = 2**17
_MOST_DIRECTORY = 4 * 2**20
"""Most bytes of a zip's central directory; every 46 of them become an object."""


def files(folder: Path, without: Sequence[Path] = (), insisted: Sequence[str] = ()) -> list[Path]:
    """The files to send: all below a folder that no .gitignore or .rayignore excludes; relative paths, sorted.

    Links to files and folders among them are followed. Secrets, links that lead elsewhere or into themselves, and
    special files are left out, and listed on stderr.

    Args:
        without: folders below it to leave out.
        insisted: files below it to send in any case.

    Raises:
        ConfigError: a file cannot be read or sent, there are too many, or one of `insisted` does not exist.
    """
    folder = folder.resolve()
    names = [f"/{path.relative_to(folder)}" for path in without if path.is_relative_to(folder) and path != folder]
    try:
        tree = _tree(folder, names)
        found, left = _followed(folder, tree, [token.encode() for token in known_tokens()])
    except (OSError, UnicodeDecodeError) as error:
        where = _shown(getattr(error, "filename", None) or "a .gitignore or .rayignore")
        raise ConfigError(f"{where} cannot be read ({error}): name it in .gitignore or .rayignore") from None
    for name in insisted:
        path = Path(os.path.relpath(Path(name).absolute(), folder))
        real = Path(os.path.realpath(folder / path))
        if not (".." not in path.parts and real.is_relative_to(folder) and real.is_file()):
            raise ConfigError(f"--with {name} is not a file in {folder}, the folder that is sent to the cluster")
        found.add(path)
    _tell({why: [path for path in paths if path not in found] for why, paths in left.items()})
    for path in found:
        if "\\" in str(path) or any(0xD800 <= ord(letter) <= 0xDFFF for letter in str(path)):
            raise ConfigError(f"{_shown(path)} has a name that cannot be sent: rename it, or name it in .gitignore")
    return sorted(found)


def _tree(folder: Path, names: list[str]) -> dict[Path, list[os.DirEntry[str]]]:
    """The entries of each folder that no ignore file excludes. Links are not followed."""
    found: dict[Path, list[os.DirEntry[str]]] = {}
    todo = [(folder, [ignored_by(folder, [*LEFT_OUT, *names])])]
    while todo:
        here, above = todo.pop()
        rules = above + ignored_by_files(here)
        with os.scandir(here) as entries:
            found[here] = [entry for entry in entries if not any(ignored(here / entry.name) for ignored in rules)]
        todo += [(here / each.name, rules) for each in found[here] if each.is_dir(follow_symlinks=False)]
    return found


def _followed(
    folder: Path, tree: Mapping[Path, list[os.DirEntry[str]]], tokens: list[bytes]
) -> tuple[set[Path], dict[str, list[Path]]]:
    """The files to send, under the names that links give them, and what is left out by reason; relative paths."""
    regular = {here / each.name for here in tree for each in tree[here] if each.is_file(follow_symlinks=False)}
    secret = {file for file in regular if is_secret(file.relative_to(folder)) or holds_secret(file, tokens)}
    found: set[Path] = set()
    left: dict[str, list[Path]] = {SECRETS: [], LINKS: [], SPECIAL: []}
    todo: list[tuple[Path, Path, frozenset[Path]]] = [(folder, Path(), frozenset())]
    visits = 0
    while todo:
        here, name, above = todo.pop()
        above |= {here}
        visits += 1
        for entry in tree[here]:
            path, real, link = name / entry.name, here / entry.name, entry.is_symlink()
            if link:
                real = Path(os.path.realpath(real))
            if real in tree:
                if real in above:
                    left[LINKS].append(path)
                else:
                    todo.append((real, path, above))
            elif real in secret or (link and real in regular and is_secret(path)):
                left[SECRETS].append(path)
            elif real in regular:
                found.add(path)
            else:
                left[LINKS if link else SPECIAL].append(path)
        if visits + len(found) > MOST_FILES:
            raise ConfigError(
                f"{folder} has more than {MOST_FILES:,} files to send, counted through its links: name what no job "
                f"needs in .gitignore or .rayignore"
            )
    return found, left


def _tell(left: Mapping[str, list[Path]]) -> None:
    """List on stderr what is not sent."""
    parts = []
    for why, paths in left.items():
        if paths:
            shown, more = ", ".join(_shown(path) for path in sorted(paths)[:SHOWN]), len(paths) - SHOWN
            parts.append(f"{shown}{f' and {more} more' if more > 0 else ''} ({why})")
    if parts:
        print(f"muster: not sent: {'; '.join(parts)}", file=sys.stderr)


def _shown(path: object) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))


def check_size(folder: Path, packed: Iterable[Path], limit: int = LIMIT) -> None:
    """Raise ConfigError, with the largest files, if files exceed the limit in bytes."""
    sizes = {path: (folder / path).stat().st_size for path in packed}
    if (total := sum(sizes.values())) > limit:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
        names = ", ".join(f"{path} ({byte_size(sizes[path])})" for path in largest)
        raise ConfigError(
            f"{folder} has {byte_size(total)} to send and the limit is {byte_size(limit)}; the largest: {names}.\n"
            f"Name them in .gitignore or .rayignore, and read data from a folder that the cluster reaches"
        )


def write_zip(
    target: Path, folder: Path, packed: Iterable[Path], message: str, more: Mapping[str, str] | None = None
) -> None:
    """Write a zip with `message.json`, and below TOP the files and their git commit.

    Args:
        more: text of additional files below TOP, by name.

    Raises:
        ConfigError: a file cannot be read.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MESSAGE, message)
        top = zipfile.ZipInfo(f"{TOP}/")  # exists even if the folder is empty
        top.external_attr = (stat.S_IFDIR | 0o700) << 16 | 0x10
        archive.writestr(top, "")
        if (packed := list(packed)) and (commit := revision.of(folder)):
            archive.writestr(f"{TOP}/{revision.SENT}", json.dumps(commit))
        for name, text in (more or {}).items():
            archive.writestr(f"{TOP}/{name}", text)
        for path in packed:
            content, executable = _read(folder, path)
            # Zip has no dates before 1980, which some file systems and build tools set.
            entry = zipfile.ZipInfo.from_file(folder / path, f"{TOP}/{path.as_posix()}", strict_timestamps=False)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | (0o700 if executable else 0o600)) << 16
            archive.writestr(entry, content)


def _read(folder: Path, path: Path) -> tuple[bytes, bool]:
    """A file's content, and whether it is executable. Raises ConfigError if it was replaced meanwhile."""
    real = Path(os.path.realpath(folder / path))
    try:
        with open_file(real) as file:  # does not block if it has become a pipe
            if not real.is_relative_to(folder.resolve()):
                raise OSError(errno.EINVAL, "not a file")
            return file.read(), bool(os.fstat(file.fileno()).st_mode & stat.S_IXUSR)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP):
            raise ConfigError(f"{_shown(path)} was changed while it was packed: try again") from None
        raise ConfigError(f"{_shown(path)} cannot be read ({error.strerror}): name it in .gitignore") from None


def read_message(content: bytes) -> Submit:
    """The message of a zip from a client, which need not be one that `write_zip` has made.

    Ray unpacks an accepted zip on every machine of the job, so everything is inflated here once, and counted.

    Raises:
        BadMessage: it is damaged, exceeds LIMIT, contains what `write_zip` does not write (a file outside of TOP, a
            duplicate name, a link, an encrypted or overlapping member), or its message is invalid.
    """
    if len(content) > LIMIT:
        raise BadMessage(f"it has {byte_size(len(content))} and the limit is {byte_size(LIMIT)}")
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
    """Raise BadMessage unless a zip ends like a plain one: no comment, no zip64, a directory of at most _MOST_DIRECTORY
    bytes. Every program then reads it alike."""
    if len(content) < 22:
        raise BadMessage("it is not a zip")
    mark, disk, start_disk, here, count, size, offset, comment = struct.unpack("<4s4H2LH", content[-22:])
    if mark != b"PK\x05\x06" or comment:
        raise BadMessage("it is not a zip, is cut, or ends in a comment")
    if count > MOST_FILES or size > _MOST_DIRECTORY:
        raise BadMessage(f"it has {count} files, with names of {byte_size(size)}, and the limit is {MOST_FILES}")
    if disk or start_disk or here != count or offset + size != len(content) - 22 or content[-42:-38] == b"PK\x06\x07":
        raise BadMessage("it is a zip of several parts, a zip64, or damaged")


def _check_members(archive: zipfile.ZipFile, content: bytes) -> None:
    """Raise BadMessage if a member's metadata is not as `write_zip` writes it."""
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
        raise BadMessage(f"it unpacks to {byte_size(total)} and the limit is {byte_size(LIMIT)}")
    if archive.getinfo(MESSAGE).file_size > _LONGEST_MESSAGE:
        raise BadMessage(f"its {MESSAGE} has more than {byte_size(_LONGEST_MESSAGE)}")
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
    """How a member differs from all that `write_zip` writes; empty if it does not."""
    kind, marks = stat.S_IFMT(member.external_attr >> 16), (member.external_attr >> 16) & 0o7000
    if member.flag_bits & ~0x0806:  # except: UTF-8 name, deflate options
        return "is encrypted, or written as a stream"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {member.compress_type}"
    if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG) or marks:
        return "is a link, a device, or setuid"
    return ""


def _is_ours(name: str) -> bool:
    """Whether a name is plain, not too long, and below TOP."""
    parts = name.removesuffix("/").split("/")
    plain = all(part not in ("", ".", "..") and len(os.fsencode(part)) < 256 for part in parts)
    return (
        plain and parts[0] == TOP and (len(parts) > 1 or name == f"{TOP}/") and len(name) <= 1024 and "\\" not in name
    )
