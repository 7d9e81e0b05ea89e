"""What counts as a loss spike: a pure function of the recent losses."""

import math
import statistics
from collections.abc import Sequence

from configs.sections.train import SpikeConfig


def spike(loss: float, recent: Sequence[float], config: SpikeConfig) -> float | None:
    """Standard deviations by which `loss` is above the mean of the `recent` losses, if it is a spike, else None.

    None until `config.window` losses are known. The standard deviation has a floor of 1e-3 of the mean, so that noise
    on a flat curve does not count as spikes.
    """
    if len(recent) < config.window or not math.isfinite(loss):
        return None
    mean = statistics.fmean(recent)
    deviation = max(statistics.pstdev(recent, mean), 1e-3 * abs(mean), 1e-9)  # losses of 0: every label masked
    deviations = (loss - mean) / deviation
    return deviations if deviations > config.deviations else None
