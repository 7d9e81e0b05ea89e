"""Split JSON and CSV files into records, and find the text in a record."""

import csv
import io
import re
import shlex
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from .damage import Damaged, Expands

RECORD_BYTES = 1 << 26
"""A longer JSON value, line or Parquet value is refused: it has to fit in memory as a whole."""
RECORD_VALUES = 1 << 22
"""A JSON value or CSV row with more values is refused: each value takes up to 100 bytes of memory."""

BOM = b"\xef\xbb\xbf"
BETWEEN = b" \t\r\n\x1e" + BOM
"""Bytes that may separate JSON values: white space, the record separator of RFC 7464, and the byte-order marks of
concatenated files."""
_TOKEN = re.compile(rb'"(?:[^"\\]*+(?:\\.[^"\\]*+)*+")?+|[\[\]{},]', re.DOTALL)
"""A whole string, the start of one that is cut off, or a bracket, brace or comma."""
_NAMES = {
    str: "a string", int: "a number", float: "a number", bool: "a boolean", list: "a list", dict: "an object"
}  # fmt: skip
_NESTED = 1000
"""json.loads has about the same limit."""


def text_in(value: object, key: str) -> str:
    """The text of a JSON value under a key, or under a key inside keys (`meta.text`). A list of texts is joined into
    one, with each on its own line.

    Raises:
        Damaged: there is none.
    """
    if not isinstance(value, dict):
        raise Damaged("not a JSON object", _what(value))
    found = value[key] if key in value else _within(value, key)
    if isinstance(found, str):
        return found
    texts: list[str] = []
    _collect(found, key, texts)
    if not texts:
        raise Damaged("not text", f"{key!r} is {_what(found)}" + (" of nothing but null" if found else ""))
    return "\n".join(texts)


def _collect(found: object, key: str, texts: list[str]) -> None:
    if isinstance(found, str):
        texts.append(found)
    elif isinstance(found, list):
        for each in found:
            if each is not None:
                _collect(each, key, texts)
    elif isinstance(found, dict) and found:
        keys = ", ".join(f"{key}.{each}" for each in islice(found, 5))
        raise Damaged("not text", f"{key!r} is an object: choose one of {keys}"[:200])
    else:
        raise Damaged("not text", f"{key!r} is {_what(found)}")


def _within(value: object, key: str) -> object:
    if isinstance(value, list):
        return [_within(each, key) for each in value if each is not None]
    if not isinstance(value, dict):
        raise Damaged("not a JSON object", _what(value))
    if key in value:
        return value[key]
    for dot in re.finditer(r"\.", key):
        if key[: dot.start()] in value:
            return _within(value[key[: dot.start()]], key[dot.end() :])
    raise Damaged("missing key", missing(key, list(islice(value, 1000))))


def missing(key: str, names: list[str]) -> str:
    """A message: there is no such key or column, which ones there are, and which one may be meant."""
    meant = next((name for name in names if name.strip().casefold() == key.strip().casefold()), None)
    among = f"no {key!r} among {', '.join(names[:20]) or 'no keys'}"[:200]
    return f"{among}; did you mean --text-key {shlex.quote(meant)}?" if meant is not None else among


def _what(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | dict | str) and not value:
        return f"an empty {_NAMES[type(value)].partition(' ')[2]}"
    return _NAMES[type(value)]


class Stopped(Damaged):
    """Damage after which nothing can be read; `unread`: the share of the bytes taken from the stream that is lost."""

    def __init__(self, reason: str, detail: str, unread: float):
        super().__init__(reason, detail)
        self.unread = unread


def json_values(stream: io.BufferedIOBase, count: Callable[[int], None]) -> Iterator[bytes]:
    """Every value in a stream of JSON: the elements of arrays, and objects that follow one another.

    Only strings, brackets and commas are scanned, so a value can still be malformed.

    Args:
        count: charges work to the budget, in bytes.

    Raises:
        Stopped: there is something other than JSON between the values, or a value does not end.
    """
    data, at, start, depth, array, elements, taken = b"", 0, 0, 0, False, 0, 0

    def stopped(reason: str, detail: str) -> Stopped:
        return Stopped(reason, detail, (len(data) - start) / max(taken, 1))

    while more := stream.read(max(1 << 18, len(data) - start)):
        taken += len(more)
        data, at, start = data[start:] + more, at - start, 0
        tokens = 0
        for match in _TOKEN.finditer(data, at):
            first, end = data[match.start()], match.end()
            if first == 0x22 and end == match.start() + 1:
                break  # a string that is cut off: scanned again with what follows
            at, tokens = end, tokens + 1
            if depth == 0 and first == 0x2C and not data[start : match.start()].strip(BETWEEN):
                start = end  # between objects, as in an array
                continue
            if depth == 0 and (data[start : match.start()].strip(BETWEEN) or first not in b"[{"):
                raise stopped("malformed JSON", "not an object or array: " + _shown(data[start:]))
            if first in b"[{":
                depth += 1
                if depth > _NESTED:
                    raise stopped("malformed JSON", f"nested more than {_NESTED:,} deep")
                if depth == 1:
                    array, elements = first == 0x5B, 0
                    start = end if array else match.start()
            elif first in b"]}":
                depth -= 1
                if depth == 0:
                    value = data[start : match.start()] if array else data[start:end]
                    if not array or elements or value.strip():
                        yield value
                    start = end
            elif first == 0x2C and depth == 1 and array:
                elements += 1
                yield data[start : match.start()]
                start = end
        count(16 * tokens)
        if len(data) - start > RECORD_BYTES:
            raise stopped("record too long", f"over {RECORD_BYTES} bytes")
    rest = data[start:].strip(BETWEEN)
    if depth == 1 and array and rest.endswith((b"}", b"]", b'"')):
        yield rest  # a complete last element of an incomplete array
        rest = b""
    if rest:
        raise stopped("malformed JSON", f"its end is missing: {_shown(rest)}" if depth else f"not JSON: {_shown(rest)}")
    if depth:
        raise stopped("malformed JSON", "the end of the array is missing")


def csv_rows(
    stream: io.BufferedReader,
    text_key: str,
    tab: bool,
    count: Callable[[int], None],
    damaged: Callable[[], bool] = lambda: False,
) -> Iterator[bytes | Damaged]:
    """The text of every row of a CSV or TSV file with a header, or why there is none.

    Args:
        tab: columns are separated by tabs; otherwise by commas, or by the delimiter that gives the header a column
            `text_key`.
        count: charges work to the budget, in bytes.
        damaged: whether the stream ended because of damage.

    Raises:
        Damaged: no column has that name, or two have; a row is too long.
    """
    first = (
        stream.peek(1)
        .removeprefix(BOM)
        .lstrip()
        .replace(b"\r", b"\n")
        .partition(b"\n")[0]
        .decode("utf-8", "surrogateescape")
    )
    delimiters = "\t" if tab else ",;\t|"
    delimiter = next((each for each in delimiters if text_key in _split(first, each)), delimiters[0])
    lines = _Lines(stream, delimiter, count, damaged)
    rows = csv.reader(lines, strict=True, delimiter=delimiter)
    columns, torn, row = 0, _Torn(), list[str]()
    while True:
        wrong = ""
        try:
            row = next(rows)
            if not row:  # a blank line
                lines.next_row()
                continue
            if not columns:
                columns, column = len(row), _text_column(row, text_key)
                lines.next_row()
                continue
            if len(row) != columns:
                wrong = f"{len(row)} values in a row of {columns} columns"
        except StopIteration:
            yield from torn.end()
            return
        except (Damaged, Expands):
            yield from torn.end()
            raise
        except csv.Error as error:
            wrong = str(error)
            if not columns:
                raise Damaged("malformed CSV", wrong) from None
        read = lines.next_row()
        if tab and len(read) > 1 and not wrong and any("\t" in each and "\n" in each for each in row):
            wrong = "a quoted field spans several lines and columns"
        unquoted = [line.rstrip("\r\n").split("\t") for line in read] if tab and wrong else []
        if unquoted and all(len(each) == columns for each in unquoted):  # most writers of TSV quote nothing
            yield from (each[column].encode("utf-8", "surrogateescape") for each in unquoted)
        elif wrong:
            yield from torn.end()
            yield Damaged("malformed CSV", wrong)
            torn.begin()
        else:
            yield from torn(row[column].encode("utf-8", "surrogateescape"), read)


class _Torn:
    """Rows after a malformed one. They are part of it if a quote that it opened is closed some rows later."""

    MOST = 16

    def __init__(self) -> None:
        self._held: list[bytes] | None = None

    def begin(self) -> None:
        self._held = []

    def end(self) -> list[bytes]:
        """Release the held rows as ordinary rows."""
        held, self._held = self._held or [], None
        return held

    def __call__(self, text: bytes, lines: list[str]) -> Iterator[bytes | Damaged]:
        if self._held is None:
            yield text
        elif len(lines) == 1 and lines[0].count('"') % 2:
            yield from [Damaged("malformed CSV", "part of the malformed row before it")] * (len(self._held) + 1)
            self._held = None
        else:
            self._held.append(text)
            if '"' in lines[0] or len(self._held) == self.MOST:
                yield from self.end()


csv.field_size_limit(RECORD_BYTES)  # _Lines limits the size of a row


def _text_column(header: list[str], text_key: str) -> int:
    header = [name.strip() for name in header]
    if (named := header.count(text_key)) > 1:
        raise Damaged("ambiguous column", f"{named} columns are named {text_key!r}")
    if not named:
        raise Damaged("missing column", missing(text_key, header))
    return header.index(text_key)


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


class _Lines:
    """The lines of a file for a csv.reader, with a limit on the size of one row."""

    def __init__(
        self, stream: io.BufferedReader, delimiter: str, count: Callable[[int], None], damaged: Callable[[], bool]
    ):
        self._stream, self._delimiter, self._count, self._damaged = stream, delimiter.encode(), count, damaged
        self._first = True
        self._waiting: deque[bytes] = deque()
        self._cut = b""
        self._size = self._values = 0
        self._read: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def next_row(self) -> list[str]:
        """The lines since the last row."""
        read, self._read = self._read, []
        self._size = self._values = 0
        return read

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._line()
        self._count(64)
        self._size += len(line)
        self._values += line.count(self._delimiter)
        if self._size >= RECORD_BYTES or self._values > RECORD_VALUES:
            what = f"over {RECORD_BYTES} bytes" if self._size >= RECORD_BYTES else f"over {RECORD_VALUES:,} values"
            raise Damaged("record too long", f"{what}; is a closing quote missing?")
        # Bytes that are not UTF-8 survive the round trip, so that only their row is refused.
        self._read.append(text := line.decode("utf-8", "surrogateescape"))
        return text

    def _line(self) -> bytes:
        line = self._stream.readline(RECORD_BYTES)
        ends = not line or (not line.endswith(b"\n") and self._damaged())
        if ends and not self._cut:
            raise StopIteration
        if self._first:
            line, self._first = line.removeprefix(BOM), False
        if not self._cut and line.find(b"\r", 0, -2) < 0:
            return line
        # Lines that end with a carriage return alone, as in old Macintosh files.
        parts = (self._cut + line).splitlines(keepends=True)
        self._cut = parts.pop() if len(line) == RECORD_BYTES and not line.endswith(b"\n") and len(parts) > 1 else b""
        self._waiting.extend(parts)
        return self._waiting.popleft()


def _shown(data: bytes) -> str:
    return data[:60].strip().decode("utf-8", "replace")[:40]
