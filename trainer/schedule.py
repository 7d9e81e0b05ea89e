"""Learning rate as a pure function of the step."""

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


def learning_rates(step: int, config: Config, phases: Iterable[Phase]) -> dict[str, float]:
    """Of each phase in a step of the run, by its name."""
    return {phase.name: learning_rate(step, config.train.steps, optimizer_of(config, phase)) for phase in phases}


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (the first is 1) of a run of `steps`.

    Warmup rises linearly and reaches `optim.lr` at step `optim.warmup`; the schedule then spans the rest and, where
    it has an end, reaches `optim.min_lr_ratio * optim.lr` at the last step. WSD is the warmup-stable-decay schedule of
    MiniCPM (arXiv 2404.06395) with a linear decay; `inverse_sqrt` is that of "Attention Is All You Need", section 5.3,
    scaled to peak at the end of the warmup.
    """
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
    return optim.lr * factor
