"""FLOPs of one training example: a family's own formula, or counted by torch on the meta device, where nothing is
computed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs import Config

from .families import build, family_of
from .tasks.table import task_of
from .tasks.task import Phase, trained_only


def submodule(module: nn.Module, phase: Phase) -> nn.Module:
    """The parts of a model that a phase trains."""
    return module.get_submodule(phase.parameters)


def flops_of_example(config: Config, batch: Callable[[], Any]) -> float:
    """Training FLOPs (forward and backward, twice with optim.sam, all phases, by how often each is due) of one example.

    Args:
        config: resolved.
        batch: reads a few examples, if their shapes are needed.

    Raises:
        RuntimeError: the task reads tensor values, which the meta device does not have, so its FLOPs cannot be counted.
    """
    passes = 2 if config.optim.sam else 1
    if (formula := family_of(config.model).flops) and (found := formula(config)) is not None:
        return passes * found
    return passes * counted_flops(config, batch())


def counted_flops(config: Config, batch: Any) -> float:
    """As `flops_of_example`, always by torch's counter; only the shapes and dtypes of the batch are used."""
    with torch.device("meta"):
        module = build(config.model)
    task, there, total = task_of(config), batch.to("meta"), 0.0
    nets: Mapping[str, nn.Module] = {phase.name: submodule(module, phase) for phase in task.phases}
    for phase in task.phases:
        with FlopCounterMode(display=False) as counter, trained_only(nets, phase.name):
            with torch.no_grad():
                given = task.taught(nets, there)
            sums = task.loss(nets, given, phase.name)
            sums.loss.backward()
        total += counter.get_total_flops() / phase.every
    return total / len(there.example_ids)
