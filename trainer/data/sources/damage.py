"""What can be wrong with a file that is read."""

import lzma
import zlib

import pyarrow as pa

ERRORS = (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What unpacking raises."""


class Expands(Exception):
    """More than its budget came out of a file."""


class Damaged(Exception):
    """The arguments are a reason, one of few phrases, and a detail."""
