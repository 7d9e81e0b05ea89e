"""Learning rate, batch, warmup and schedule of a trial, by the rule that its sweep names."""

import math
from typing import Any, NamedTuple

from configs import Config
from configs.sweep.definition import HyperRules, SweepConfig

STEP_LAW_N, STEP_LAW_D = (6e7, 1.1e9), (2e9, 1e11)
"""Smallest and largest N and D of the models that Step Law was fitted to; outside that range it extrapolates."""


class Rules(NamedTuple):
    """The rules of a sweep with the design's defaults filled in; None: the config's own value."""

    lr: str
    batch: str
    warmup: float | None
    schedule: str | None

    @classmethod
    def of(cls, sweep: SweepConfig) -> "Rules":
        """An axis over a key replaces the rule for it."""
        rules, sized = sweep.rules, sweep.sizes_chosen
        steps_chosen = sized or getattr(sweep.design, "budget", None) is not None
        default = "step_law" if sized else "fixed"
        return cls(
            rules.lr or ("fixed" if "optim.lr" in sweep.axes else default),
            rules.batch or ("fixed" if "train.global_batch" in sweep.axes else default),
            rules.warmup if rules.warmup is not None or "optim.warmup" in sweep.axes or not steps_chosen else 0.05,
            rules.schedule or ("cosine" if sized and "optim.schedule" not in sweep.axes else None),
        )

    def keys(self) -> dict[str, str]:
        """{config key: the rule that sets it}, for keys that nothing else may set."""
        found = {}
        if self.lr == "step_law":
            found["optim.lr"] = "rules.lr=step_law"
        if self.batch == "step_law":
            found["train.global_batch"] = "rules.batch=step_law"
        if self.warmup is not None:
            found["optim.warmup"] = f"rules.warmup={self.warmup:g}"
        if self.schedule is not None:
            found["optim.schedule"] = f"rules.schedule={self.schedule}"
        if self.schedule in ("wsd", "wsd_branches"):
            found["optim.decay_steps"] = "rules.decay"
        return found


def step_law_lr(n: float, d: float) -> float:
    """Peak learning rate of AdamW (arXiv:2503.04715, eq. 1).

    Args:
        n: parameters without embeddings; for a Mixture of Experts the active ones.
        d: training tokens.
    """
    return 1.79 * n**-0.713 * d**0.307


def step_law_batch(d: float) -> float:
    """Tokens per step for a run of `d` tokens (arXiv:2503.04715, eq. 1)."""
    return 0.58 * d**0.571


def inverse_width_lr(lr: float, base_width: int, width: int) -> float:
    """muP's learning rate for hidden matrices under Adam (arXiv:2203.03466, table 3): proportional to 1 / width.

    This is only a part of muP, which also keeps the embedding's learning rate, scales the head's output and its initial
    weights, and divides attention logits by head_dim instead of its square root. Here one learning rate applies to all
    parameters, so it transfers across widths less well than muP proves.
    """
    return lr * base_width / width


def learning_rate(rule: str, rules: HyperRules, config: Config, base_width: int, n: float, d: float) -> float:
    """A trial's learning rate, before rules.lr_scale.

    Args:
        config: before the rule is applied.
        base_width: hidden size that the config's optim.lr is tuned for, under `inverse_width`.
        n: active parameters without embeddings.
        d: training tokens.
    """
    if rule == "step_law":
        return min(rules.max_lr, step_law_lr(n, d))
    if rule == "inverse_width":
        return inverse_width_lr(config.optim.lr, base_width, config.model.hidden_size)
    return config.optim.lr


def rounded(value: float) -> float:
    """Rounded to four significant digits."""
    return float(f"{value:.4g}")


class Course(NamedTuple):
    """Keys of one run's schedule, and where a branch of it starts."""

    optim: dict[str, Any]
    checkpoint: dict[str, Any]
    stable: int
    """The last step before the decay."""


def course(rules: Rules, decay: float, steps: int, shortest: int, every: int | str, branch: bool) -> Course:
    """The schedule of a run, which ends when the run does.

    Args:
        decay: fraction of the steps over which WSD's learning rate decays.
        steps: of the run.
        shortest: steps of the shortest run of its chain, whose warmup all share; outside a chain the run's own.
        every: the config's checkpoint.every.
        branch: another run starts from this one, so its checkpoint at `stable` is written and kept for good.
    """
    optim: dict[str, Any] = {}
    if rules.warmup is not None:
        optim["warmup"] = max(1, round(rules.warmup * shortest)) if rules.warmup else 0
    if rules.schedule is None:
        return Course(optim, {}, steps)
    if rules.schedule not in ("wsd", "wsd_branches"):
        return Course(optim | {"schedule": rules.schedule}, {}, steps)
    stable = steps - max(1, round(decay * steps))
    checkpoint: dict[str, Any] = {}
    if branch:
        # A checkpoint is due at multiples of `every`, and one is kept for good at multiples of `keep_every`; with a
        # decay of less than half of the run the only multiple of `stable` is itself.
        spacing = stable
        if isinstance(every, int) and 0 < every < stable:
            spacing = stable // math.ceil(stable / every)
            stable -= stable % spacing
        checkpoint = {"every": spacing, "keep_every": stable}
    return Course(optim | {"schedule": "wsd", "decay_steps": steps - stable}, checkpoint, stable)
