"""What Git LFS leaves in the place of a file that it has not fetched (docs/spec.md of git-lfs)."""

import os
import re
from pathlib import Path

POINTER = "a Git LFS pointer, not the file itself: `git lfs pull` fetches it"
LONGEST = 1024
"""Bytes of a pointer are fewer."""
_POINTER = re.compile(
    rb"version https://(git-lfs|hawser)\.github\.com/spec/v1\r?\n"
    rb"(ext-[^\n]*\n)*oid sha256:[0-9a-f]{64}\r?\nsize [0-9]+\s*"
)


def is_pointer(content: bytes) -> bool:
    """Whether this, which is all of a file or its first LONGEST bytes, is a pointer."""
    return len(content) < LONGEST and _POINTER.fullmatch(content) is not None


def refuse_pointer(path: str | Path) -> None:
    """Raise ValueError for a file that is a pointer, OSError for one that cannot be read."""
    with open(os.fsencode(path), "rb") as file:
        if is_pointer(file.read(LONGEST)):
            raise ValueError(f"it is {POINTER}")
