"""Learning rate as a pure function of the step, and of how often a plateau has lowered it."""

import math
from collections.abc import Iterable

from configs import Config
from configs.load import validated
from configs.sections.optim import OptimConfig
from models.tasks.task import Phase


def optimizer_of(config: Config, phase: Phase) -> OptimConfig:
    """The section `optim` with a phase's own keys. Raises ConfigError if one of them is not right."""
    if not phase.optimizer:
        return config.optim
    return validated(OptimConfig, config.optim.model_dump() | dict(phase.optimizer), f"optim of the phase {phase.name}")


def learning_rates(step: int, config: Config, phases: Iterable[Phase], drops: int = 0) -> dict[str, float]:
    """Of each phase in a step of the run, by its name; `drops` as in `learning_rate`."""
    return {phase.name: learning_rate(step, config.train.steps, optimizer_of(config, phase), drops) for phase in phases}


def learning_rate(step: int, steps: int, optim: OptimConfig, drops: int = 0) -> float:
    """Learning rate of optimizer step `step` (the first is 1) of a run of `steps`.

    Args:
        drops: how often the schedule `plateau` has lowered it so far, see `trainer.bookkeeping.after_evaluation`.

    Warmup rises linearly and reaches `optim.lr` at step `optim.warmup`; the schedule then spans the rest and, where
    it has an end, reaches `optim.min_lr_ratio * optim.lr` at the last step. WSD is the warmup-stable-decay schedule of
    MiniCPM (arXiv 2404.06395) with a linear decay; `inverse_sqrt` is that of "Attention Is All You Need", section 5.3,
    scaled to peak at the end of the warmup. `one_cycle` (arXiv:1708.07120) is torch's OneCycleLR: its own rise takes
    the warmup, or 0.3 of the run; `cyclic` (arXiv:1506.01186) is the triangular CyclicLR, and `cosine_restarts`
    (arXiv:1608.03983) CosineAnnealingWarmRestarts, both after the warmup.
    """
    if optim.schedule == "one_cycle":
        return optim.lr * _one_cycle(step, steps, optim.warmup or 0.3 * steps)
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    span = max(steps - optim.warmup, 1)
    done = min(step - optim.warmup, span)
    low = optim.min_lr_ratio
    match optim.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - (1 - low) * done / span
        case "cosine":
            factor = low + (1 - low) * (1 + math.cos(math.pi * done / span)) / 2
        case "wsd":
            decay = min(optim.decay_steps or max(steps // 5, 1), span)
            into = max(done - (span - decay), 0)
            factor = 1 - (1 - low) * into / decay
        case "inverse_sqrt":
            factor = math.sqrt(max(optim.warmup, 1) / step)
        case "step":
            every = optim.step_every or max(steps // 3, 1)
            factor = optim.step_factor ** ((done - 1) // every)
        case "exponential":
            factor = low ** (done / span)
        case "cyclic":
            length = optim.cycle_steps or max(steps // 5, 1)
            half = length / 2 if optim.warmup else 0.0  # a warmup has already gone up
            factor = low + (1 - low) * (1 - abs(2 * ((done - 1 + half) % length) / length - 1))
        case "cosine_restarts":
            into, length = done - 1, optim.cycle_steps or max(steps // 5, 1)
            if optim.cycle_growth == 1:
                into %= length
            while into >= length:
                into, length = into - length, length * optim.cycle_growth
            factor = low + (1 - low) * (1 + math.cos(math.pi * into / length)) / 2
        case "plateau":
            factor = max(optim.plateau_factor**drops, low)
    return optim.lr * factor


def _one_cycle(step: int, steps: int, rise: float) -> float:
    """From 1/25 to 1 by half a cosine, which ends at step `rise`, then to 1/250,000 by another."""
    begin, end, part = 1 / 25, 1.0, (step - 1) / max(rise - 1, 1e-9)
    if step > rise:
        begin, end, part = 1.0, begin / 1e4, min((step - rise) / max(steps - rise, 1), 1.0)
    return end + (begin - end) * (1 + math.cos(math.pi * part)) / 2
