"""Parameters and FLOPs of a trial's model: by the planner's formulas for a decoder, else counted by torch."""

from typing import NamedTuple

from configs import Config
from models.planning.cost import Parameters, has_formulas, parameters, training_flops_per_token


class Measures(NamedTuple):
    """The measures of one model on its data."""

    counts: Parameters
    flops: float
    """Training FLOPs per token, or per example if the task is not language modelling; 0: unknown."""
    units: int
    """Tokens per example, or 1."""


def measures_of(config: Config) -> Measures:
    """The measures of a resolved config's model."""
    if has_formulas(config.model):
        length = config.train.seq_len
        return Measures(parameters(config.model), training_flops_per_token(config.model, length), length)
    from trainer.run.counted import counts  # torch

    found, units = counts(config), units_of(config)
    return counted_measures(found["parameters"], found["embedding"], (found["flops_per_example"] or 0.0) / units, units)


def units_of(config: Config) -> int:
    """`Measures.units` of a model without formulas."""
    return config.train.seq_len if config.task == "language_modelling" else 1


def counted_measures(total: int, embedding: int, flops: float, units: int) -> Measures:
    """The measures of a model without formulas, of so many parameters and training FLOPs per unit (0: unknown)."""
    return Measures(Parameters(total, total, embedding, 0, 0, 0, 0, total - embedding, 0), flops, units)


def unit_of(config: Config) -> str:
    """What `Measures.units` counts: tokens, or the examples of a plugin's task, such as images."""
    if has_formulas(config.model) or config.task == "language_modelling":
        return "tokens"
    from models.tasks.table import task_of  # as above

    task = task_of(config)
    units, unit = task.counts
    return unit if units == 1 else task.example
