"""Terminal output: control characters in names, reasons and texts are shown, not obeyed.

Files and pipes get the bytes unchanged.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import rich.console
from rich.segment import Segment

# C0 except tab and line feed, DEL, C1, bidirectional overrides and isolates, and surrogates, in which Python represents
# bytes of a file name that are not UTF-8.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every control character except tab and line feed escaped as in Python, such as `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


class Stream:
    """A text stream for `print` and all else but a `Console`: while it is a terminal, text goes through `visible`."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(visible(text) if self.raw.isatty() else text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def guard() -> None:
    """Make all that this process writes to stdout and stderr go through a `Stream`. Call it once, at the start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Stream):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")  # a name that cannot be encoded must not raise
            setattr(sys, name, Stream(stream))


class Console(rich.console.Console):
    """Rich's console. It writes its own colours and cursor movements, but none from the text: markup is off.

    Args:
        file: None: stdout, or stderr.
    """

    def __init__(self, *, file: Any = None, stderr: bool = False, **options: Any) -> None:
        stream = file or (sys.stderr if stderr else sys.stdout)
        raw = stream.raw if isinstance(stream, Stream) else stream
        super().__init__(file=raw, stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:  # of rich 14 and 15
        if self.is_terminal:
            buffer = (each if each.control else each._replace(text=visible(each.text)) for each in buffer)
        return super()._render_buffer(buffer)
