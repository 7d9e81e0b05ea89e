"""Which trials a sweep has: sizes at budgets, sizes times tokens, or a search over config keys."""

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.base import Section

MOST_TRIALS = 10_000
"""Of a sweep: each is a config that is checked, and listed, whenever the sweep is planned."""


def listed(value: Any) -> Any:
    """A number as a list of one."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


class IsoflopDesign(Section):
    """Several sizes at each of several budgets (Hoffmann et al., arXiv:2203.15556, approach 2)."""

    budgets: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Training FLOPs of a trial."""
    sizes: int = Field(5, gt=0, le=MOST_TRIALS)
    """Sizes at each budget, evenly spaced in log parameters."""
    spread: float = Field(3.0, gt=1)
    """A budget's largest size over its centre, and its centre over its smallest."""
    tokens_per_parameter: PositiveFloat = 20.0
    """Where the centre is: the size that spends the budget on so many tokens a parameter (Chinchilla's 20)."""
    parameters: tuple[PositiveFloat, ...] | None = Field(None, min_length=1)
    """The sizes themselves, the same at each budget; None: around the centre."""

    _lists = field_validator("budgets", "parameters", mode="before")(listed)


class LadderDesign(Section):
    """Each size trained on several multiples of its parameters in tokens (Gadre et al., arXiv:2403.08540)."""

    parameters: tuple[PositiveFloat, ...] = Field(min_length=1)
    """The sizes."""
    tokens_per_parameter: tuple[PositiveFloat, ...] = Field((20.0,), min_length=1)
    """Training tokens over parameters."""

    _lists = field_validator("parameters", "tokens_per_parameter", mode="before")(listed)


class GridDesign(Section):
    """Every combination of the values of `axes`."""

    budget: PositiveFloat | None = None
    """Training FLOPs of a trial, by its steps; None: train.steps is as it stands."""


class RandomDesign(GridDesign):
    """Draws from `axes`: Bergstra and Bengio, JMLR 13 (2012)."""

    n: int = Field(16, gt=0, le=MOST_TRIALS)
    """Trials of each variant and seed."""
    seed: NonNegativeInt = 0
    """Of the draws; a larger n keeps the first ones."""


class OptunaDesign(RandomDesign):
    """Optuna's TPE sampler draws from `axes`, at first at random, then by the held-out losses of the trials before."""

    startup: PositiveInt = 8
    """Trials drawn before any loss is known."""
    round: PositiveInt = 4
    """Trials drawn at once after those."""


class Axis(Section):
    """The values of one config key: a list, or a range."""

    values: tuple[Any, ...] | None = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draws are uniform in the logarithm."""

    @model_validator(mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return {"values": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.values is None) == (self.low is None and self.high is None):
            raise ValueError("should be a list of values, or {low: 1e-4, high: 1e-2, log: true}")
        if self.values is None and (self.low is None or self.high is None or not self.low < self.high):
            raise ValueError("low and high should be two numbers, low below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log: true needs a range whose low is above 0")
        return self


DESIGNS = ("isoflop", "ladder", "grid", "random", "optuna")
Design = IsoflopDesign | LadderDesign | GridDesign | RandomDesign | OptunaDesign
