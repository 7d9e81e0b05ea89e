"""Draws of random and Optuna searches: pure functions of the design and of the losses known so far."""

import math
import random
import typing
from collections.abc import Callable, Mapping
from typing import Any

from configs import Config, ConfigError
from configs.explain import annotation_of
from configs.sweep.designs import Axis, OptunaDesign, RandomDesign

Values = dict[str, Any]


def random_draws(design: RandomDesign, axes: Mapping[str, Axis]) -> list[Values]:
    """`design.n` draws. Draw i does not depend on how many there are."""
    draws = []
    for i in range(design.n):
        source = random.Random(f"{design.seed}-{i}")
        draws.append({key: _draw(source, key, axis) for key, axis in axes.items()})
    return draws


def optuna_draws(
    design: OptunaDesign, axes: Mapping[str, Axis], loss_of: Callable[[int], float | None]
) -> tuple[list[Values], int]:
    """Those of `design.n` draws that can be made now: a round needs the losses of the rounds before it.

    Args:
        loss_of: trial number to its loss; NaN: it failed for good; None: not known yet.

    Returns:
        The draws, and how many are still to be made.
    """
    import optuna  # takes a second to import, and other designs do not need it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=design.seed, n_startup_trials=design.startup)
    study = optuna.create_study(sampler=sampler)
    space = {key: _distribution(key, axis) for key, axis in axes.items()}
    draws: list[Values] = []
    while len(draws) < design.n:
        count = min(design.round if draws else design.startup, design.n - len(draws))
        asked = [study.ask(space) for _ in range(count)]
        draws += [_values(trial.params, axes) for trial in asked]
        losses = [loss_of(trial.number) for trial in asked]
        if any(loss is None for loss in losses):
            break
        for trial, loss in zip(asked, losses, strict=True):
            if loss is None or math.isnan(loss):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, loss)
    return draws, design.n - len(draws)


def _draw(source: random.Random, key: str, axis: Axis) -> Any:
    if axis.values is not None:
        return source.choice(axis.values)
    assert axis.low is not None
    assert axis.high is not None
    whole = _is_whole(key, axis)
    # Whole numbers lie in the middle of intervals of width 1, so that both ends are as likely as the others.
    low, high = (axis.low - 0.5, axis.high + 0.5) if whole else (axis.low, axis.high)
    value = math.exp(source.uniform(math.log(low), math.log(high))) if axis.log else source.uniform(low, high)
    return min(max(round(value), int(axis.low)), int(axis.high)) if whole else float(f"{value:.4g}")


def _distribution(key: str, axis: Axis) -> Any:
    from optuna import distributions  # as above

    if axis.values is not None:
        return distributions.CategoricalDistribution(range(len(axis.values)))  # an index: a value may be a list
    assert axis.low is not None
    assert axis.high is not None
    if _is_whole(key, axis):
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _values(params: Mapping[str, Any], axes: Mapping[str, Axis]) -> Values:
    found: Values = {}
    for key, axis in axes.items():
        value = axis.values[params[key]] if axis.values is not None else params[key]
        found[key] = float(f"{value:.4g}") if isinstance(value, float) and axis.values is None else value
    return found


def _is_whole(key: str, axis: Axis) -> bool:
    """Whether the config's key takes whole numbers. Raises ConfigError if it takes none, or the range's ends do not."""

    def parts(annotation: Any) -> list[Any]:
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return [each for part in inner for each in parts(part)] if inner else [annotation]

    kinds = parts(annotation_of(key.split("."), Config))
    if float in kinds:
        return False
    if int not in kinds:
        raise ConfigError(f"axes.{key} is a range, but {key} does not take numbers: list its values")
    if max(abs(axis.low or 0), abs(axis.high or 0)) > 2**53:
        raise ConfigError(f"axes.{key}: {key} is a whole number: low and high should be under {2**53:,}")
    if axis.low != int(axis.low or 0) or axis.high != int(axis.high or 0):
        raise ConfigError(
            f"axes.{key}: {key} is a whole number: low ({axis.low:g}) and high ({axis.high:g}) should be, too"
        )
    return True
