"""A step's line in the record: losses, rates, MFU, memory."""

from typing import Any

import psutil
import torch
from torch import distributed as dist

from configs import Config
from models.tasks.learner import Learner
from trainer.health.rates import gpu_facts
from trainer.record.events import RATE
from trainer.schedule import learning_rates
from trainer.state import TrainState
from trainer.step import StepOutcome


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak matmul rate of this device in FLOP/s; None if it is not known (CPUs).

    Args:
        precision: that weights are held in; so fp8 training is compared with the peak of bf16.
    """
    if device.type != "cuda":
        return None
    known = gpu_facts(device)
    return known.flops[precision] if known else None


def memory_gb(device: torch.device) -> float:
    """In 10^9 bytes: peak memory allocated so far on a GPU; on a CPU, current resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def step_metrics(
    config: Config,
    learner: Learner,
    state: TrainState,
    outcome: StepOutcome,
    rate: float,
    seconds: float,
    waited: float,
    flops_of_example: float | None,
    here: torch.device,
) -> dict[str, Any]:
    """One line of metrics.jsonl: names and units as in trainer/README.md.

    Args:
        rate: the step's learning rate.
        seconds: the step's duration, of which `waited` were spent waiting for data.
        flops_of_example: FLOPs per example in training; None: they could not be counted.
    """
    each, unit = learner.task.counts
    metrics: dict[str, Any] = {
        "step": state.step,
        "loss": outcome.loss,
        "lr": rate,
        "grad_norm": outcome.grad_norm,
        unit: state.tokens,
        learner.task.example: state.cursor,
        unit + RATE: (config.train.global_batch * each or outcome.weight) / seconds,
        "memory_gb": memory_gb(here),
        "data_wait": waited,
        "step_time": seconds,
    }
    if flops_of_example:
        flops = flops_of_example * config.train.global_batch / seconds / dist.get_world_size()
        metrics["tflops"] = flops / 1e12
        if peak := peak_flops(here, config.train.kept_in):
            metrics["mfu"] = flops / peak
    rates = learning_rates(state.step, config, learner.phases[1:])
    metrics |= {f"lr_{name}": value for name, value in rates.items()}
    metrics |= learner.metrics(outcome.extra, outcome.weight, state.step)
    if outcome.rank_time:
        metrics["rank_time"] = [round(seconds, 6) for seconds in outcome.rank_time]
    if state.loss_scale:
        metrics["loss_scale"] = state.loss_scale["cur_scale"]
    if outcome.skipped:
        metrics["skipped"] = True
    return metrics
