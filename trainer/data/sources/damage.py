"""Exceptions for what can be wrong with an input file."""

import lzma
import zlib

import pyarrow as pa

ERRORS = (OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading and decompressing raise."""


class Expands(Exception):
    """A file expanded beyond its budget."""


class Damaged(Exception):
    """The arguments are a reason, from a small set of phrases, and a detail."""
