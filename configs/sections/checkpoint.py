"""When checkpoints are written and which are kept."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from configs.base import Section


class CheckpointConfig(Section):
    every: NonNegativeInt | Literal["auto"] = 100
    """Steps between checkpoints; 0: only at the end and on a signal; auto: by what one costs and how often it fails."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Steps whose multiples are kept for good."""
    background: bool = True
    """Write on another thread; training waits only for the snapshot."""
