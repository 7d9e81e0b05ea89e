"""When and how the processes of a run are killed: a pure function of a seed."""

import random
from collections.abc import Sequence
from typing import NamedTuple

MOMENTS = ("step", "update", "shard", "receipt")
"""As a step begins, once its weights are updated, and, in the next checkpoint, with a shard written or before the
receipt that the commit waits for."""


class Kill(NamedTuple):
    """Of one process of one attempt.

    Attributes:
        step: at which it happens, or from which on the next checkpoint is waited for.
    """

    step: int
    rank: int
    moment: str


def kills(seed: int, count: int, steps: int, world: int, moments: Sequence[str] = MOMENTS) -> list[Kill]:
    """One for each attempt, none before the last, so that all are reached; the first few have every moment once."""
    draw = random.Random(seed)
    drawn = [*draw.sample(moments, len(moments)), *draw.choices(moments, k=count)][:count]
    at = sorted(draw.randint(2, steps) for _ in range(count))
    return [Kill(step, draw.randrange(world), moment) for step, moment in zip(at, drawn, strict=True)]
