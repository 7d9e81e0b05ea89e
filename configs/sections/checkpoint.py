"""When checkpoints are written and which of them are kept."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from configs.base import Section


class CheckpointConfig(Section):
    every: NonNegativeInt | Literal["auto"] = 100
    """Steps between checkpoints; 0: only at the end and on a signal; auto: from the cost of a checkpoint and the
    failure rate."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept permanently."""
    background: bool = True
    """Write in a background thread; training waits only for the snapshot."""
