"""Which trials a sweep has: sizes at compute budgets, sizes x tokens, or a search over config keys."""

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.base import Section

MOST_TRIALS = 10_000
"""Most trials of a sweep: each config is checked and listed whenever the sweep is planned."""


def listed(value: Any) -> Any:
    """A single number as a list of one."""
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


class IsoflopDesign(Section):
    """Several sizes at each of several budgets (Hoffmann et al., arXiv:2203.15556, approach 2)."""

    budgets: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Training FLOPs per trial."""
    sizes: int = Field(5, gt=0, le=MOST_TRIALS)
    """Sizes at each budget, evenly spaced in log parameters."""
    spread: float = Field(3.0, gt=1)
    """Ratio of a budget's largest size to its centre, and of its centre to its smallest."""
    tokens_per_parameter: PositiveFloat = 20.0
    """Tokens per parameter at the centre, which spends the whole budget (Chinchilla's 20)."""
    parameters: tuple[PositiveFloat, ...] | None = Field(None, min_length=1)
    """Explicit sizes, the same at each budget; None: spaced around the centre."""

    _lists = field_validator("budgets", "parameters", mode="before")(listed)


class LadderDesign(Section):
    """Each size trained on several multiples of its parameter count in tokens (Gadre et al., arXiv:2403.08540)."""

    parameters: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Parameter counts."""
    tokens_per_parameter: tuple[PositiveFloat, ...] = Field((20.0,), min_length=1)
    """Training tokens per parameter."""

    _lists = field_validator("parameters", "tokens_per_parameter", mode="before")(listed)


class GridDesign(Section):
    """Every combination of the values of `axes`."""

    budget: tuple[PositiveFloat, ...] | None = Field(None, min_length=1)
    """Training FLOPs per trial, which sets its steps: one number, or a list, each for every combination. None:
    train.steps is unchanged."""

    _lists = field_validator("budget", mode="before")(listed)


class RandomDesign(GridDesign):
    """Random search over `axes`: Bergstra and Bengio, JMLR 13 (2012)."""

    n: int = Field(16, gt=0, le=MOST_TRIALS)
    """Trials per variant and seed."""
    seed: NonNegativeInt = 0
    """Seed of the draws; a larger n keeps the first ones."""


class OptunaDesign(RandomDesign):
    """Optuna's TPE sampler over `axes`: random at first, then guided by the held-out losses of earlier trials."""

    startup: PositiveInt = 8
    """Trials drawn before any loss is known."""
    round: PositiveInt = 4
    """Trials drawn at a time after those."""


class Axis(Section):
    """The values of one config key: a list, or a range."""

    values: tuple[Any, ...] | None = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Draw uniformly in the logarithm."""

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
