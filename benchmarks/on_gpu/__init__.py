"""What `benchmarks/gpu.py` runs: parts, each of which yields its results as it finds them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One result: plain values by name. A check has `ok`; a part that compares has a row for each contestant."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Attributes:
        device: "cuda", or "cpu" if there is no GPU or a dry run was asked for.
        dry: everything in miniature.
        folder: the part's own folder, for what it writes.
        seconds: time that it may take; a part that tries several sizes stops trying in time.
    """

    device: str
    dry: bool
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Part:
    """One thing to find out.

    Attributes:
        name: as given to `--only`; the section stands before the dot: `right`, `fast`, `layer`, `around`.
        run: yields rows; those yielded before it raises are kept.
        seconds: time that it takes on a GPU, approximately; it is ended at `PATIENCE` (`PATIENCE_ALONE`) times that.
        alone: whether it measures times, so that nothing else may run on the device.
    """

    name: str
    run: Callable[[Setting], Iterator[Row]]
    seconds: float
    alone: bool = True
