"""Every topology of a number of devices, evaluated: which fit and are fastest, and why the others do not (no torch)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from configs import Config, ConfigError
from configs.sections.optim import OPTIMIZERS
from configs.topology import LISTED, RULES, topologies

from .devices import Device
from .plan import Plan, predict
from .shards import micro_batches

KEYS = ("dp", "tp", "pp", "pp_schedule", "ep", "sp", "zero_stage")
"""Of parallel.*: what is searched."""


@dataclass(frozen=True)
class Choice:
    """A config that runs and fits, with its prediction."""

    config: Config
    plan: Plan

    def overrides(self) -> list[str]:
        """What to add to the command line."""
        parallel, train = self.config.parallel, self.config.train
        keys = [f"parallel.{key}={getattr(parallel, key)}" for key in KEYS]
        return [*keys, f"train.micro_batch={train.micro_batch}",
                f"train.activation_checkpointing={train.activation_checkpointing}"]  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        choices: fastest first, at most one per topology.
        refused: how many topologies each reason rules out.
        too_large: topologies that run but fit with no micro-batch.
        least: the smallest peak memory of those, in bytes; None if there are none.
    """

    choices: list[Choice]
    refused: Counter[str]
    too_large: int
    least: float | None


def search(config: Config, device: Device, devices: int) -> Found:
    """Judge all topologies of `devices` devices; offload and hpZ stay as `config` has them.

    Raises ConfigError if there are over LISTED.
    """
    if any(True for _ in islice(topologies(devices, config.parallel), LISTED, None)):
        raise ConfigError(
            f"{devices} devices have over {LISTED:,} topologies, too many to compare: search with fewer devices, such "
            f"as {1 << (devices.bit_length() - 1)}"
        )
    choices: list[Choice] = []
    refused: Counter[str] = Counter()
    too_large, least = 0, None
    seen = set()
    for parallel in topologies(devices, config.parallel):
        if parallel in seen or (parallel.hpz, parallel.offload) != (config.parallel.hpz, config.parallel.offload):
            continue
        seen.add(parallel)
        smallest_batch = config.train.model_copy(update={"micro_batch": 1})
        asked = config.model_copy(update={"parallel": parallel, "train": smallest_batch})
        if reasons := _reasons(asked):
            refused.update(reasons)
            continue
        best: Choice | None = None
        smallest = float("inf")
        for candidates in _variants(asked):
            plans = [predict(candidate, device) for candidate in candidates]
            smallest = min(smallest, *(plan.memory.peak for plan in plans))
            for candidate, plan in zip(candidates, plans, strict=True):
                if plan.fits and (best is None or plan.step_time < best.plan.step_time):
                    best = Choice(candidate, plan)
            if not any(plan.fits for plan in plans):
                break  # a larger micro-batch needs at least as much
        if best:
            choices.append(best)
        else:
            too_large += 1
            least = min(smallest, least or smallest)
    choices.sort(key=lambda choice: (choice.plan.step_time, choice.plan.memory.peak))
    return Found(choices, refused, too_large, least)


def _reasons(config: Config) -> list[str]:
    sections = {"p": config.parallel, "m": config.model, "t": config.train}
    reasons = [f"{name}: {rule.why.format(**sections)}" for name, rule in RULES.items() if rule.broken(config)]
    stage, optim = config.parallel.zero_stage, config.optim.name
    if stage == 0 and config.train.precision == "fp16":
        reasons.append("fp16: gradients accumulate in fp32 from ZeRO-1 on")
    if stage and OPTIMIZERS[optim].whole_matrices:
        reasons.append(f"optimizer: {optim} needs whole matrices, which ZeRO 1 to 3 flatten and partition")
    if config.train.global_batch < config.parallel.dp:
        batch = config.train.global_batch
        reasons.append(f"batch: train.global_batch ({batch}) is too small for the data-parallel ranks")
    return reasons


def _variants(config: Config) -> Iterator[list[Config]]:
    """For micro-batches of 1, 2, 4, ... up to a rank's share of the batch: without and with activation checkpointing.

    Those that make fewer than a pipeline has stages are left out, but for the smallest.
    """
    size = 1
    while size * config.parallel.dp <= config.train.global_batch:
        update = [{"micro_batch": size, "activation_checkpointing": kind} for kind in ("none", "full")]
        pair = [config.model_copy(update={"train": config.train.model_copy(update=keys)}) for keys in update]
        if size > 1 and micro_batches(pair[0]) < config.parallel.stages:
            return
        yield pair
        size *= 2
