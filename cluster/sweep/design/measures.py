"""What a trial's model comes to, whatever its family: the planner's formulas for a decoder, else counted by torch."""

from typing import NamedTuple

from configs import Config
from models.planning.cost import Parameters, has_formulas, parameters, training_flops_per_token


class Measures(NamedTuple):
    """Of one model on its data."""

    counts: Parameters
    flops: float
    """In training, of a token, or of an example where those are not token sequences; 0: not known."""
    units: int
    """Tokens of an example, or 1."""


def measures_of(config: Config) -> Measures:
    """Of a resolved config."""
    if has_formulas(config.model):
        length = config.train.seq_len
        return Measures(parameters(config.model), training_flops_per_token(config.model, length), length)
    from trainer.run.counted import counts  # torch, which the family's plugin has brought already

    found = counts(config)
    total = found["parameters"]
    return Measures(Parameters(total, total, 0, 0, 0, 0, 0, total, 0), found["flops_per_example"] or 0.0, 1)
