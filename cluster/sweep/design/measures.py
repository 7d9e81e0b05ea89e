"""Parameters and FLOPs of a trial's model: by the planner's formulas for a decoder, else counted by torch."""

from typing import NamedTuple

from configs import Config
from models.planning.cost import Parameters, has_formulas, parameters, training_flops_per_token


class Measures(NamedTuple):
    """The measures of one model on its data."""

    counts: Parameters
    flops: float
    """Training FLOPs per token, or per example if examples are not token sequences; 0: unknown."""
    units: int
    """Tokens per example, or 1."""


def measures_of(config: Config) -> Measures:
    """The measures of a resolved config's model."""
    if has_formulas(config.model):
        length = config.train.seq_len
        return Measures(parameters(config.model), training_flops_per_token(config.model, length), length)
    from trainer.run.counted import counts  # torch, which the family's plugin has imported already

    found = counts(config)
    return counted_measures(found["parameters"], found["flops_per_example"] or 0.0)


def counted_measures(total: int, flops: float) -> Measures:
    """The measures of a model without formulas, of so many parameters and training FLOPs per example (0: unknown)."""
    return Measures(Parameters(total, total, 0, 0, 0, 0, 0, total, 0), flops, 1)


def unit_of(config: Config) -> str:
    """What `Measures.units` counts: tokens, or the examples of a plugin's task, such as images."""
    if has_formulas(config.model):
        return "tokens"
    from models.tasks.table import task_of  # as above

    task = task_of(config)
    units, unit = task.counts
    return unit if units == 1 else task.example
