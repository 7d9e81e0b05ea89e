"""What reaches a terminal: control characters in names, reasons and texts are shown there, not obeyed.

Whatever is not a terminal (files, pipes) gets the bytes as they are.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import rich.console
from rich.segment import Segment

# All of C0 but tab and line feed, DEL, C1, what turns the direction of text around, and half characters, which are how
# Python reads bytes of a file's name that are no UTF-8.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every control character but tab and line feed as Python would write it, such as `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


class Stream:
    """A text stream for `print` and all else but a `Console`: made visible where it is a terminal at that moment."""

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
    """Let everything that this process writes to stdout and stderr go through a `Stream`; once, as it begins."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Stream):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")  # a name that cannot be encoded is no reason to fail
            setattr(sys, name, Stream(stream))


class Console(rich.console.Console):
    """Rich's, which writes colours and moves the cursor by itself, but only by itself: it reads no markup.

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
