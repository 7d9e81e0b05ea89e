"""The models of a sweep and how much each reads, before batch, steps and learning rate are chosen."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from configs import ConfigError, ModelConfig
from configs.sections.model import MOST_WIDTH
from configs.sweep.definition import SweepConfig
from configs.sweep.designs import GridDesign, IsoflopDesign, LadderDesign, OptunaDesign, RandomDesign
from configs.units import scientific, short

from .arms import Arm, arms, resolved, with_values
from .measures import measures_of
from .search import optuna_draws, random_draws
from .sizes import Sizer, spaced

SAME = 0.03
"""Difference in ln N up to which another architecture takes exactly the first one's shape."""


class Cell(NamedTuple):
    """A model and how much it reads, before batch, steps and learning rate are chosen."""

    arm: Arm
    name: str
    keys: dict[str, Any]
    """Keys of `model` that the sweep chose."""
    model: ModelConfig
    """Resolved."""
    flops_per_token: float
    sequences: float
    """Number of sequences to read."""
    budget: float | None


def sizer(sweep: SweepConfig, arm: Arm, vocab_size: int) -> Sizer:
    """The `Sizer` of an arm. Raises ConfigError if no width suits every granularity of the sweep."""
    model = arm.config.model
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": -(-vocab_size // 64) * 64})
    every = [experts for variant in sweep.variants.values() for experts in variant.choices().values()]
    multiple = math.lcm(*(experts.granularity for experts in [*every, arm.experts] if experts))
    if multiple > MOST_WIDTH:
        raise ConfigError(
            f"variants: no width of at most {MOST_WIDTH:,} is a multiple of every granularity: leave some out"
        )
    return Sizer(model, sweep.shape, arm.experts, multiple, sweep.count, arm.config.train.seq_len)


def sized_cells(sweep: SweepConfig, compared: list[Arm], vocab_size: int) -> list[Cell]:
    """The cells of an isoflop or ladder design. The other arms match the first arm's sizes as closely as they can, so
    that models with the same number of parameters are compared."""
    design, cells = sweep.design, []
    sizers = [(arm, sizer(sweep, arm, vocab_size)) for arm in compared]
    first = sizers[0][1]
    budgets: tuple[float | None, ...] = design.budgets if isinstance(design, IsoflopDesign) else (None,)
    for budget in budgets:
        taken: dict[str, list[tuple[int, int]]] = defaultdict(list)
        try:
            for target in _targets(sweep, first, budget):
                like = first.shape(target, taken[compared[0].name])
                for arm, found in sizers:
                    keys = found.keys(*_shape_of(like))
                    if abs(math.log(found.n(keys) / first.n(like))) > SAME:
                        keys = found.shape(first.n(like), taken[arm.name])
                    taken[arm.name].append(_shape_of(keys))
                    cells += _rungs(sweep, arm, keys, found, budget)
        except ConfigError as error:
            where = f"isoflop.budgets={scientific(budget)}" if budget else "ladder.parameters"
            raise ConfigError(f"{where}: {error}") from None
    return cells


def _shape_of(keys: dict[str, Any]) -> tuple[int, int]:
    return keys["hidden_size"], keys["num_layers"]


def _targets(sweep: SweepConfig, found: Sizer, budget: float | None) -> list[float]:
    """The parameter counts asked for."""
    design = sweep.design
    if isinstance(design, IsoflopDesign) and not design.parameters:
        assert budget
        return spaced(found.centre(budget, design.tokens_per_parameter), design.spread, design.sizes)
    assert isinstance(design, IsoflopDesign | LadderDesign)
    return sorted(design.parameters or ())


def _rungs(sweep: SweepConfig, arm: Arm, keys: dict[str, Any], found: Sizer, budget: float | None) -> list[Cell]:
    """A size at its budget, or at each of the ladder's tokens per parameter."""
    n = found.n(keys)
    if budget:
        return [cell_of(arm, f"{arm.name}-{scientific(budget)}-{short(n)}", keys, found, budget)]
    assert isinstance(sweep.design, LadderDesign)
    return [cell_of(arm, f"{arm.name}-{short(n)}-{each:g}x", keys, found, each * n * found.flops(keys))
            for each in sweep.design.tokens_per_parameter]  # fmt: skip


def cell_of(arm: Arm, name: str, keys: dict[str, Any], found: Sizer, budget: float) -> Cell:
    flops = found.flops(keys)
    sequences = budget / flops / arm.config.train.seq_len
    return Cell(arm, name, keys, found.model(keys), flops, sequences, budget)


def as_it_stands(sweep: SweepConfig, arm: Arm, name: str, vocab_size: int) -> list[Cell]:
    """The cells of a grid or search, whose shape is the config's: one for each budget."""
    config = resolved(sweep, arm, arm.config, vocab_size, name)
    _, flops, units = measures_of(config)
    assert isinstance(sweep.design, GridDesign)
    budgets = sweep.design.budget
    if not budgets:
        sequences = float(config.train.steps * config.train.global_batch)
        return [Cell(arm, name, {}, config.model, flops, sequences, None)]
    if not flops:
        raise ConfigError(f"trial {name}: the FLOPs of this model cannot be counted, so no budget sets its steps")
    return [
        Cell(
            arm, name + (f"-{scientific(budget)}" if len(budgets) > 1 else ""), {}, config.model, flops,
            budget / flops / units, budget,
        )
        for budget in budgets
    ]  # fmt: skip


def drawn(sweep: SweepConfig, losses: Mapping[str, float]) -> tuple[list[tuple[str, Arm]], int]:
    """(name, arm) of each trial of a grid or search, and how many are still to be drawn."""
    found, left, compared = [], 0, arms(sweep)
    for arm in compared:
        stem = arm.name or sweep.name
        if isinstance(sweep.design, OptunaDesign):
            if len(sweep.seeds) > 1 or len(sweep.rules.lr_scale) > 1:
                raise ConfigError("optuna needs one loss per trial: give seeds and rules.lr_scale one value each")

            def loss_of(i: int, stem: str = stem) -> float | None:
                return losses.get(f"{stem}-{i:03d}")

            draws, more = optuna_draws(sweep.design, sweep.axes, loss_of)
            left += more
        elif isinstance(sweep.design, RandomDesign):
            draws = random_draws(sweep.design, sweep.axes)
        else:
            found.append((stem, arm))
            continue
        found += [(f"{stem}-{i:03d}", with_values(sweep, arm, values)) for i, values in enumerate(draws)]
    return found, left
