"""When and how the processes of a run are killed: a pure function of a seed."""

import random
from collections.abc import Sequence
from typing import NamedTuple

MOMENTS = ("step", "update", "shard", "receipt")
"""When a step begins; when its weights are updated; and, in the next checkpoint, when a shard is written or before the
receipt that the commit waits for."""


class Kill(NamedTuple):
    """The kill of one process of one attempt.

    Attributes:
        step: when it happens, or from when on it waits for the next checkpoint.
    """

    step: int
    rank: int
    moment: str


def kills(seed: int, count: int, steps: int, world: int, moments: Sequence[str] = MOMENTS) -> list[Kill]:
    """One kill per attempt, none at an earlier step than the one before, so that all are reached; the first few cover
    every moment once."""
    draw = random.Random(seed)
    drawn = [*draw.sample(moments, len(moments)), *draw.choices(moments, k=count)][:count]
    at = sorted(draw.randint(2, steps) for _ in range(count))
    return [Kill(step, draw.randrange(world), moment) for step, moment in zip(at, drawn, strict=True)]
