"""Find raw inputs (text, JSONL, Parquet, compressed, folders, globs, the standard library) and stream their records."""

import glob
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from configs import ConfigError
from configs.sections.data import LimitsConfig
from trainer.data.child import MIB

from .formats import RECORD_BYTES, csv_rows, first_object, first_value, foreign, json_values, text_in
from .parquet import EXPANDS, RAISE, RECORD_WEIGHT, ParquetProcess
from .unpack import ENDINGS, ERRORS, MAGIC, Compression, Damaged, Expands, Opened, budget_of, opened, reason_of

DOCUMENT_BYTES = 1 << 18
"""A longer document is cut, at a line end where it has one, into documents of at most this many UTF-8 bytes."""

FREE_BYTES = 1 << 24
"""What any file may unpack to, however small."""

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "special", "beside"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".jl": "jsonl",
    ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_RECORDS = frozenset(_KINDS.values())
_BESIDE = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|datasheet|(md5|sha256)sums?)\b.*", re.I
)
"""Names of text files that stand beside a data set without being of it."""
_CARD = re.compile(
    rb"^(dataset_info|configs|task_categories|task_ids|size_categories|pretty_name|annotations_creators):", re.M
)
"""Keys at the head of a data set's README.md on Hugging Face (https://huggingface.co/docs/hub/datasets-cards)."""
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


class Input(NamedTuple):
    path: str
    kind: Kind
    """special: a folder that cannot be read, or neither a file nor a folder. beside: stands beside data and is none."""
    compression: Compression | None
    bytes: int
    mtime_ns: int


class Record(NamedTuple):
    """One undecoded document: UTF-8 text, or a JSON object that holds it."""

    path: str
    where: str
    """Inside the file: `line 3`, `row 5`, `bytes 0-262144`; empty when the file is the document."""
    kind: Literal["text", "json"]
    data: bytes


class Refusal(NamedTuple):
    """Something that was left out: where it stands and why."""

    path: str
    where: str
    reason: str
    """One of few phrases, so that refusals can be counted by it."""
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.path} ({self.where})" if self.where else self.path
        return f"{place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


def find_inputs(inputs: Sequence[str | Path]) -> list[Input]:
    """List the files that the inputs stand for, each once, in the order given (folders: sorted, recursive).

    Args:
        inputs: files, folders, glob patterns, or `stdlib` (the .py files of this Python's standard library).
            In folders, names that start with a dot and `__pycache__` are passed over, and links to folders followed, to
            each folder once. A file's ending tells its
            kind: .jsonl, .json, .csv, .tsv, .parquet, anything else is text, unless it begins with what only another
            kind does; .gz, .zst, .bz2 and .xz may follow. Of a folder with a data set, README, LICENSE and the like
            are `beside`, unless they are given by name.

    Raises:
        ConfigError: an input that matches nothing.
    """
    found: dict[str, Input] = {}
    for given in inputs:
        files = [_describe(path) for path in _expand(str(given))]
        if not files:
            raise ConfigError(f"input {str(given)!r}: no file, folder or glob pattern matches anything")
        if str(given) != "stdlib" and (len(files) > 1 or files[0].path != str(given)):
            files = _without_what_is_beside(str(given), files)
        for file in files:
            path = os.path.realpath(file.path)
            if path not in found or found[path].kind == "beside":
                found[path] = file
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
    return [path for match in sorted(set(_matches(given))) for path in _expand_match(match)]


def _expand_match(match: str) -> list[str]:
    # With `**` a glob lists a folder's files too, so folders are opened only for patterns that end at one;
    # a file found both ways counts once.
    return list(_walk(match)) if os.path.isdir(match) else [match]


def _matches(pattern: str) -> list[str]:
    """As `glob.glob(pattern, recursive=True)`, which with a few links that lead in circles never ends."""
    before, recursive, after = _at_stars(pattern)
    if not recursive:
        return glob.glob(pattern)
    found = []
    for root in _matches(before) if glob.has_magic(before) else [before]:
        for folder, names in _tree(root):
            if names is None:
                found += [folder] if os.path.isdir(folder) and not os.path.islink(folder) else []  # refused by name
            elif after:
                found += _matches(os.path.join(glob.escape(folder), after))
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
    """Every folder from `root` down, each once, with the sorted names of what is in it and no folder; None where it
    cannot be read. Names that start with a dot are passed over.

    Links to folders are followed once all else has been seen: they may lead in circles, or to what has another name in
    the tree. One that leads to what the tree is in stands for far more than it, and counts as one that cannot be read.
    Unlike os.walk's its depth has no limit.
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


def _without_what_is_beside(given: str, files: list[Input]) -> list[Input]:
    """The files with those as `beside` that only describe the others: README, LICENSE and the like where there is no
    other text, and of a data set from Hugging Face all text but .txt."""
    if not any(file.kind in _RECORDS for file in files):
        return files
    text = [file for file in files if file.kind == "text"]
    if _is_dataset(given):
        beside = {file.path for file in text if not re.search(r"\.txt(\.\w+)?$", file.path, re.I)}
    elif all(_BESIDE.fullmatch(os.path.basename(file.path)) for file in text):
        beside = {file.path for file in text}
    else:
        return files
    return [file._replace(kind="beside") if file.path in beside else file for file in files]


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


class Reader:
    """Reads the records of one file after the other. Use it as a context manager or call `close()`.

    Args:
        text_key: key or column that holds the text.
        limits: what a file may unpack to and take.
    """

    def __init__(self, text_key: str, limits: LimitsConfig):
        self.text_key, self.limits = text_key, limits
        self._parquet_process = ParquetProcess()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._parquet_process.close()

    def read(self, file: Input) -> Iterator[tuple[int, Record | Refusal]]:
        """Stream a file's records in order with the position (bytes of the file) reached.

        Whatever is wrong with the file ends as a Refusal; the records before it stand. Memory is bounded by one
        record.
        """
        if file.kind == "special":
            what = "a folder that cannot be read" if os.path.isdir(file.path) else "neither a file nor a folder"
            if os.path.islink(file.path) and os.path.isdir(file.path):
                what = "a link to a folder that cannot be read, or that holds the input itself"
            yield 0, Refusal(file.path, "", "unreadable file", what)
            return
        if file.bytes == 0 and os.path.exists(file.path):
            yield 0, Refusal(file.path, "", "empty file")
            return
        if file.kind == "beside":
            yield file.bytes, Refusal(file.path, "", "not data", "it describes other files; give it by name to read it")
            return
        progress = [""]
        try:
            yield from self._records(_by_content(file), progress)
        except Expands as error:
            yield file.bytes, Refusal(file.path, progress[0], EXPANDS, f"{error}{RAISE} expansion=N)")
        except (*ERRORS, Damaged) as error:
            yield file.bytes, Refusal(file.path, progress[0], *reason_of(error))

    def budget(self, file: Input) -> int:
        """Bytes that a file may unpack to."""
        return budget_of(file.bytes, file.path, self.limits.expansion, FREE_BYTES)

    def _records(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        if file.kind == "parquet":
            yield from self._parquet(file, progress)
            return
        with self._open(file) as unpacked:
            head = unpacked.stream.peek(1)
            if not head and not unpacked.damaged():
                raise Damaged("empty file", "")
            if what := foreign(head[:512]):
                raise Damaged("not text", what)
            kind = self._kind(file.kind, head) if file.kind in ("text", "jsonl", "json") else file.kind
            read = {"jsonl": self._jsonl, "json": self._json, "csv": self._csv, "tsv": self._csv}.get(kind, self._text)
            yield from read(file, unpacked, progress)

    def _kind(self, kind: Kind, head: bytes) -> Kind:
        """What a file is by what it begins with: JSON lines, other JSON, else what its name says."""
        value: object = first_object(head)
        lines = value is not None
        if not lines:
            value = first_value(head)
        try:
            if kind != "json":  # of another name it may be a text all the same
                text_in(value, self.text_key)
        except (Damaged, RecursionError):
            return kind
        return "jsonl" if lines else "json"

    def _text(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        carry, start = b"", 0
        while True:
            buffer = carry + unpacked.stream.read(DOCUMENT_BYTES - len(carry))
            if not buffer:
                break
            ends = len(buffer) < DOCUMENT_BYTES
            size = _cut(buffer) if not ends or unpacked.damaged() else len(buffer)
            where = f"bytes {start}-{start + size}" if start or size < len(buffer) else ""
            if size:
                yield unpacked.tell(), Record(file.path, where, "text", buffer[:size])
            carry, start = buffer[size:], start + size
            progress[0] = f"after byte {start}" if start else ""
            if ends:
                break

    def _jsonl(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        number, stream = 0, unpacked.stream
        while line := stream.readline(RECORD_BYTES):
            if not line.endswith(b"\n") and unpacked.damaged():
                break  # cut off
            number += 1
            unpacked.count(RECORD_WEIGHT)
            progress[0] = f"after line {number}"
            where = f"line {number}"
            if len(line) == RECORD_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(RECORD_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield unpacked.tell(), Refusal(file.path, where, "record too long", f"over {RECORD_BYTES} bytes")
            elif line.strip():
                yield unpacked.tell(), Record(file.path, where, "json", line)

    def _json(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        number = 0
        try:
            for number, value in enumerate(json_values(unpacked.stream, unpacked.count), 1):
                unpacked.count(RECORD_WEIGHT)
                progress[0] = f"after value {number}"
                yield unpacked.tell(), Record(file.path, f"value {number}", "json", value)
        except Damaged:
            if not unpacked.damaged():  # which is why, and is told
                raise
        if number == 0 and not unpacked.damaged():
            raise Damaged("empty file", "")

    def _csv(self, file: Input, unpacked: Opened, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        number = 0
        rows = csv_rows(unpacked.stream, self.text_key, file.kind == "tsv", unpacked.count, unpacked.damaged)
        for number, row in enumerate(rows, 1):
            unpacked.count(RECORD_WEIGHT)
            progress[0], where = f"after row {number}", f"row {number}"
            if isinstance(row, bytes):
                yield unpacked.tell(), Record(file.path, where, "text", row)
            elif not unpacked.damaged():
                yield unpacked.tell(), Refusal(file.path, where, *row.args)
        if number == 0 and not unpacked.damaged():
            raise Damaged("empty file", "")

    def _parquet(self, file: Input, progress: list[str]) -> Iterator[tuple[int, Record | Refusal]]:
        if file.compression:
            yield file.bytes, Refusal(file.path, "", "compressed Parquet", "unpack it: Parquet is read by ranges")
            return
        memory = self.limits.memory * MIB
        bounds = (self.budget(file), RECORD_BYTES, memory, self.limits.seconds)
        for row in self._parquet_process.rows(file.path, self.text_key, *bounds):
            if row.data is None:
                yield int(file.bytes * row.done), Refusal(file.path, row.where, row.reason, row.detail)
            else:
                yield int(file.bytes * row.done), Record(file.path, row.where, "text", row.data)

    @contextmanager
    def _open(self, file: Input) -> Iterator[Opened]:
        budget = self.budget(file)
        with opened(file.path, file.compression, budget if file.compression or file.bytes > budget else None) as found:
            yield found


def _by_content(file: Input) -> Input:
    """The file as what it begins with, where that is certain."""
    with open(file.path, "rb") as opened_file:
        head = opened_file.read(16)
    if not file.compression:
        compression = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
        file = file._replace(compression=compression)
    return file._replace(kind="parquet") if head.startswith(b"PAR1") and not file.compression else file


def cut(data: bytes) -> Iterator[bytes]:
    """Cut one UTF-8 document into pieces of at most DOCUMENT_BYTES; together they are the whole."""
    start = 0
    while len(data) - start > DOCUMENT_BYTES:
        size = _cut(data[start : start + DOCUMENT_BYTES])
        yield data[start : start + size]
        start += size
    yield data[start:] if start else data


def _cut(buffer: bytes) -> int:
    """Where to end a piece: after the last line end, else between two characters."""
    line_end = buffer.rfind(b"\n") + 1
    if line_end:
        return line_end
    for size in range(len(buffer) - 1, len(buffer) - 5, -1):
        if buffer[size] & 0xC0 != 0x80:  # the first byte of a character
            return size
    return len(buffer)  # not UTF-8: decoding says so
