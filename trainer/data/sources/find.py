"""Find raw inputs (files, folders, globs, the standard library) and tell each file's kind by its name."""

import contextlib
import glob
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from configs import ConfigError

from .content import begins_as_json
from .unpack import ENDINGS, Compression

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "special", "beside"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".jl": "jsonl",
    ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_RECORDS = frozenset(_KINDS.values())
_BESIDE = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|datasheet|(md5|sha256)sums?)\b.*", re.I
)
"""Names of text files that accompany a data set without being part of it."""
_MARKER = re.compile(r"_[^.]*")
"""Names that Spark, Hive and Parquet give to files that are not data, such as `_SUCCESS` and `_metadata`. Their readers
skip every name that begins with `_`; here Python modules may have such names too."""
_UNDERNEATH = re.compile(r"/(_delta_log|_temporary|_spark_metadata)/")
_CARD = re.compile(
    rb"^(dataset_info|configs|task_categories|task_ids|size_categories|pretty_name|annotations_creators):", re.M
)
"""Keys at the head of a data set's README.md on Hugging Face (https://huggingface.co/docs/hub/datasets-cards)."""
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


class Input(NamedTuple):
    path: str
    kind: Kind
    """special: an unreadable folder, or neither a file nor a folder. beside: accompanies data without being data."""
    compression: Compression | None
    bytes: int
    mtime_ns: int


def find_inputs(inputs: Sequence[str | Path]) -> list[Input]:
    """List the files that the inputs stand for, each once, in the order given (folders: sorted, recursive).

    Args:
        inputs: files, folders, glob patterns, or `stdlib` (the .py files of this Python's standard library).
            In folders, names that start with a dot and `__pycache__` are skipped; links to folders are followed, to
            each folder once. A file with several names is read once. A file's extension tells its kind: .jsonl, .json,
            .csv, .tsv, .parquet; any other is text, unless its first bytes identify another kind. .gz, .zst, .bz2 or
            .xz may follow. In a folder with records, README, LICENSE and the like are `beside`, and so are `_SUCCESS`
            and other markers, unless they are given by name.

    Raises:
        ConfigError: an input that matches nothing.
    """
    found: dict[object, Input] = {}
    for given in inputs:
        files = [_describe(path) for path in _expand(str(given))]
        if not files:
            if os.path.isdir(given):
                raise ConfigError(f"folder {str(given)!r} holds no files (names that begin with a dot are skipped)")
            raise ConfigError(f"input {str(given)!r}: no file, folder or glob pattern matches anything")
        if str(given) != "stdlib" and (len(files) > 1 or files[0].path != str(given)):
            files = _without_what_is_beside(str(given), files)
        for file in files:
            name = _one_name(file.path)
            if name not in found or found[name].kind == "beside":
                found[name] = file
    if not found:
        raise ConfigError("no input: name files, folders or glob patterns, or `stdlib`")
    return list(found.values())


def linked_folders(files: Sequence[Input], inputs: Sequence[str | Path]) -> list[str]:
    """The links to folders, below the inputs, through which files were found: `link -> folder`."""
    found: dict[str, str] = {}
    seen = set()
    for each in map(str, inputs):
        root = os.path.dirname(each[: match.start()]) if (match := re.search(r"[*?\[]", each)) else each.rstrip(os.sep)
        seen |= {root, os.path.normpath(root)}
    for folder in {os.path.dirname(file.path) for file in files}:
        while folder and folder not in seen:
            seen.add(folder)
            if os.path.islink(folder):
                found[folder] = os.path.realpath(folder)
            folder = os.path.dirname(folder)
    return [f"{link} -> {folder}" for link, folder in sorted(found.items())]


def _expand(given: str) -> list[str]:
    if given == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        return [path for path in _walk(root, _STDLIB_LEFT_OUT, follow=False) if path.endswith(".py")]
    if os.path.isdir(given):
        return list(_walk(given))
    if os.path.lexists(given):
        return [given]
    unread: set[str] = set()
    matches = _matches(given, unread)
    return [
        path for match in sorted({*matches, *unread}) for path in ([match] if match in unread else _expand_match(match))
    ]


def _expand_match(match: str) -> list[str]:
    # With `**` a glob also lists the files in folders, so only patterns that end at a folder need it opened; a file
    # found both ways counts once.
    return list(_walk(match)) if os.path.isdir(match) else [match]


def _matches(pattern: str, unread: set[str]) -> list[str]:
    """Like `glob.glob(pattern, recursive=True)`, which never ends where a few links form cycles.

    Args:
        unread: receives the folders that `_tree` could not read.
    """
    before, recursive, after = _at_stars(pattern)
    if not recursive:
        return glob.glob(pattern)
    found = []
    for root in _matches(before, unread) if glob.has_magic(before) else [before]:
        for folder, names in _tree(root):
            if names is None:
                unread |= {folder} if os.path.isdir(folder) else set()  # to be refused by name
            elif after:
                found += _matches(os.path.join(glob.escape(folder), after), unread)
            else:
                found += [os.path.join(folder, name) for name in names]
    return found


def _at_stars(pattern: str) -> tuple[str, bool, str]:
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return pattern, False, ""
    at = parts.index("**")
    return os.sep.join(parts[:at]) + os.sep * (parts[0] == "" and at == 1), True, os.sep.join(parts[at + 1 :])


def _walk(root: str, left_out: Container[str] = ("__pycache__",), follow: bool = True) -> Iterator[str]:
    for folder, names in _tree(root, left_out, follow):
        if names is None:
            yield folder  # to be refused by name
        else:
            yield from (os.path.join(folder, name) for name in names)


def _tree(root: str, left_out: Container[str] = (), follow: bool = True) -> Iterator[tuple[str, list[str] | None]]:
    """Every folder from `root` down, each once, with the sorted names of its files; None if it cannot be read. Names
    that start with a dot are skipped.

    Links to folders are followed last: they may form cycles, or lead to folders that have another name in the tree. A
    link to a folder that contains the tree would bring in far more than the tree, so it counts as unreadable. Unlike
    with os.walk, depth is not limited.
    """
    waiting, linked, seen = [root], deque[str](), set()
    above = {_identity(folder) for folder in Path(os.path.realpath(root)).parents}
    while waiting or linked:
        folder = waiting.pop() if waiting else linked.popleft()
        try:
            identity = _identity(folder or os.curdir)
            if identity in seen:
                continue
            seen.add(identity)
            names = None
            if identity not in above:
                names = sorted(name for name in os.listdir(folder or os.curdir) if not name.startswith("."))
        except OSError:
            names = None
        if names is None:
            yield folder, None
            continue
        paths = [os.path.join(folder, name) for name in names]
        folders = {path for path in paths if os.path.isdir(path)}
        below = [path for path, name in zip(paths, names, strict=True) if path in folders and name not in left_out]
        links = [path for path in below if os.path.islink(path)]
        waiting += [path for path in below[::-1] if path not in links]
        linked += links if follow else []
        yield folder, [name for path, name in zip(paths, names, strict=True) if path not in folders]


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _one_name(path: str) -> object:
    """An identity that all names of a file share."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_nlink > 1:
            return status.st_dev, status.st_ino
    return os.path.realpath(path)


def is_marker(path: str) -> bool:
    """Whether a file beside data only marks it as complete, or repeats its metadata."""
    return bool(_MARKER.fullmatch(os.path.basename(path)) or _UNDERNEATH.search(path))


def _without_what_is_beside(given: str, files: list[Input]) -> list[Input]:
    """The files, with kind `beside` for those that only describe others: in a folder with records, README, LICENSE and
    the like, and markers; in a data set from Hugging Face, all text except .txt."""
    records = any(file.kind in _RECORDS for file in files) or _are_parts(files)
    beside = {file.path for file in files if is_marker(file.path) and (records or file.bytes == 0)}
    if records:
        text = [file.path for file in files if file.kind == "text"]
        beside |= {path for path in text if _BESIDE.fullmatch(os.path.basename(path))}
        if _is_dataset(given):
            beside |= {path for path in text if not re.search(r"\.txt(\.\w+)?$", path, re.IGNORECASE)}
    return [file._replace(kind="beside") if file.path in beside else file for file in files]


def _are_parts(files: list[Input]) -> bool:
    """Whether these are the parts that Spark and Hadoop write: apart from files beside data, no name has an extension,
    and the first file begins like JSON."""
    names = [(file, os.path.basename(file.path)) for file in files if file.kind == "text"]
    parts = [(file, name) for file, name in names if not is_marker(file.path) and not _BESIDE.fullmatch(name)]
    if not parts or any("." in name for _, name in parts):
        return False
    with contextlib.suppress(OSError), open(parts[0][0].path, "rb") as opened:
        return begins_as_json(opened.read(512))
    return False


def _is_dataset(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "README.md"), "rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return False
    front, end, _ = head.removeprefix(b"---").partition(b"\n---")
    return head.startswith(b"---") and bool(end) and bool(_CARD.search(front))


def _describe(path: str) -> Input:
    stem, ending = os.path.splitext(path.lower())
    compression = ENDINGS.get(ending)
    if compression:
        ending = os.path.splitext(stem)[1]
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: reading it says so
        return Input(path, "text", None, 0, 0)
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device: reading it may never end
        return Input(path, "special", None, 0, status.st_mtime_ns)
    return Input(path, _KINDS.get(ending, "text"), compression, status.st_size, status.st_mtime_ns)
