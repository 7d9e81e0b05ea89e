"""Detect a file's type by its first bytes, whatever its name: JSON, or something that cannot be read as text."""

import io
import json
import re
from collections.abc import Callable

from .damage import Damaged
from .formats import BETWEEN, BOM, json_values, text_in

LOOKED_AT = 16
"""Number of first lines that decide whether a file has a JSON object on each line."""
SHORT = 4096
"""Fewer bytes than this after a value may be too few to tell what they are."""

_DECODER = json.JSONDecoder(parse_int=str)
_JSON = re.compile(rb'(?:\[\s*+)?\{\s*+(?:"(?:[^"\\\n]|\\.)*"\s*:|\})')
"""How JSON records begin."""

_PICKLES = (b"(dp0\n", b"(lp0\n", b"ccollections\nOrderedDict\np0\n", b"ccopy_reg\n_reconstructor\np0\n")
"""How pickles of protocol 0, which is ASCII, begin: a dict, a list, an ordered dict, an object."""
_FOREIGN = {
    b"ARROW1\0\0": "an Arrow file",
    b"FEA1\0\0\0\0": "a Feather file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "a ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "LZ4; decompress it, or use zstd",
    b"\x02\x21\x4c\x18": "LZ4; decompress it, or use zstd",
    b"\xff\x06\0\0sNaPpY": "Snappy; decompress it, or use zstd",
    b"\x89LZO\0": "LZO; decompress it, or use zstd",
    b"LZIP\x01": "lzip; decompress it, or use xz",
    b"\x1f\x9d": "compressed by `compress`; decompress it",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"Obj\x01": "an Avro file",
    b"%PDF-": "a PDF file",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a Microsoft Office document",
    b"WARC/1.": "a WARC file",
    b"\x7fELF": "a program",
    b"\xff\xfe\0\0": "UTF-32 text; convert it to UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text; convert it to UTF-8",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


def foreign(head: bytes) -> str:
    """The type of a file that cannot be read as text, by its first 512 bytes; empty if it is not recognised."""
    if _is_tar(head):
        return "a tar archive"
    if head[:3] == b"ORC" and min(head[3:16], default=9) < 9:
        return "an ORC file"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle"
    if head.startswith(_PICKLES):
        return "a Python pickle"
    if found := next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), ""):
        return found
    return _wide(head) if head.count(0) * 10 > len(head) else ""


def _is_tar(head: bytes) -> bool:
    if head[257:262] == b"ustar":
        return True
    # A tar file from before 1988 has no magic number, but a checksum of its header.
    checksum = head[148:156].strip(b"\0 ")
    if len(head) < 512 or not checksum.isdigit() or b"8" in checksum or b"9" in checksum:
        return False
    return int(checksum, 8) == sum(head[:148]) + 8 * 0x20 + sum(head[156:512])


def _wide(head: bytes) -> str:
    """The type of a file with many NUL bytes, by their positions."""
    share = [head[at::4].count(0) / max(len(head[at::4]), 1) for at in range(4)]
    if min(share[2:]) > 0.9 > share[0] or min(share[:2]) > 0.9 > share[3]:
        return "UTF-32 text without a byte-order mark; convert it to UTF-8"
    even, odd = share[0] + share[2], share[1] + share[3]
    if min(even, odd) < max(even, odd) / 4:
        return "UTF-16 text without a byte-order mark; convert it to UTF-8"
    return f"binary: {head.count(0) / len(head):.0%} of its first {len(head)} bytes are NUL"


def begins_as_json(head: bytes) -> bool:
    """Whether JSON records begin like this."""
    return bool(_JSON.match(head.removeprefix(BOM).lstrip(BETWEEN)))


def json_kind(head: bytes, whole: bool, kind: str, key: str, plain: bool, count: Callable[[int], None]) -> str | None:
    """The type, by its first bytes, of a file that is named like text, jsonl or json; None: more bytes are needed.

    A file named like text counts as JSON only if JSON records follow one another, whatever their keys: prose that
    starts with an object, or a notebook, is text.

    Args:
        head: the file's first bytes.
        whole: whether that is the whole file.
        key: key of the text.
        plain: the name does not tell the type, such as `part-0` or `a.txt`: a single object is JSON too.
        count: charges work to the budget, in bytes.
    """
    head = head.lstrip(BETWEEN)
    if kind == "text" and not _JSON.match(head):
        return kind
    lines = [] if head.startswith(b"[") else _whole_lines(head, whole)
    marks = [_mark(line) for line in lines]
    objects, parts = marks.count("object"), marks.count("part")
    if (objects > 1 and 2 * objects > len(lines)) or (
        objects and not parts and kind != "text" and (whole or len(lines) > 1)
    ):
        return "jsonl"
    prose = kind == "text" and objects and not parts and len(lines) > 2
    if prose or not head.startswith((b"{", b"[")):
        return kind
    first, value = _first_value(head, count)
    if not first and not whole:
        return None
    if not isinstance(value, dict):
        return "json" if kind == "text" and plain else kind
    if head.startswith(b"["):
        return "json"
    rest = head[len(first) :].lstrip(BETWEEN)
    if not whole and len(rest) < SHORT:
        return None
    if not rest:
        return kind if kind == "text" and not plain and not _has_text(value, key) else "json"
    if _JSON.match(rest):
        own_line = b"\n" not in first and b"\n" in head[len(first) : len(head) - len(rest)]
        return "jsonl" if own_line and len(lines) < 2 else "json"
    return "json" if parts and kind != "text" else kind


def _whole_lines(head: bytes, whole: bool) -> list[bytes]:
    """The first LOOKED_AT lines that are complete, without blank ones; a head's last line may be cut off."""
    lines = head.split(b"\n", LOOKED_AT)
    ended = lines if whole and len(lines) <= LOOKED_AT else lines[:-1]
    return [line for line in ended if line.strip(BETWEEN)]


def _mark(line: bytes) -> str:
    """`object` for a line that is one JSON object; `part` for part of a value on several lines, or several values on
    one line; empty for any other line."""
    line = line.strip(BETWEEN)
    if line.endswith((b"{", b"[")):
        return "part"
    if not line.startswith(b"{"):
        return ""
    text = line.decode("utf-8", "replace")
    try:
        end = _DECODER.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return ""
    rest = text[end:].lstrip()
    return "part" if rest.startswith("{") else "" if rest else "object"


def _first_value(head: bytes, count: Callable[[int], None]) -> tuple[bytes, object]:
    """The first object, or element of an array, as bytes and decoded; empty bytes if it is not complete."""
    try:
        found = next(json_values(io.BytesIO(head), count), b"")
    except Damaged:
        return b"", None
    try:
        return found, _DECODER.decode(found.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return found, None


def _has_text(value: object, key: str) -> bool:
    try:
        text_in(value, key)
    except (Damaged, RecursionError):
        return False
    return True
