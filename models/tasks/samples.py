"""What a task shows of its networks at an evaluation: a text, a grid of images or a table."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Text(NamedTuple):
    text: str


class ImageGrid(NamedTuple):
    """Images of one size, row by row."""

    images_NCHW: Tensor
    """In [0, 1]; one channel or three."""
    across: int | None = None
    """Images in a row; None: about as many as there are rows."""


class Table(NamedTuple):
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


Sample = Text | ImageGrid | Table
