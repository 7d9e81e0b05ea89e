"""One optimizer step: forward and backward over the micro-batches, and what it measured."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config
from models.batch import Batch
from models.loss import nan_if_infinite
from models.moe.balance import RouterTap

from .engine.engine import Engine
from .health.straggler import sum_with_riders


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step measured, over all processes."""

    loss: float
    """Mean cross-entropy in nats per token."""
    aux_loss: float
    z_loss: float
    """Of the routers, unweighted, mean over micro-batches and MoE layers."""
    load: list[list[float]]
    """Share of the assignments, [MoE layers][experts]; empty when dense."""
    entropy: list[float]
    confidence: list[float]
    dropped: list[float]
    """Of each MoE layer's router; see `models.moe.balance.Heard`."""
    grad_norm: float
    """Before clipping; inf or nan where the step was skipped."""
    skipped: bool
    """Whether the weights were left alone because the loss or a gradient was not finite."""
    rank_time: list[float]
    """Seconds of each rank in which it waited for no other; see `clock.OwnTime`. On GPUs of an earlier step."""
    tokens: int
    """Labels trained on in the whole global batch."""
    asked_to_stop: bool
    """Whether a process was asked to, by a signal or the file `stop`."""
    checkpoint_every: int
    """Steps between checkpoints, by rank 0's `Cadence`; 0 without one."""


NO_RIDERS = (0.0, 0.0)
"""What a process tells the others with a step: whether it was asked to stop, and steps between checkpoints."""


def micro_batches(config: Config, cursor: int, rank: int) -> Iterator[list[int]]:
    """Indices of the sequences of each micro-batch of one process, without end, from `cursor` on.

    Micro-batch i of a step holds its sequences [i * micro_batch, (i + 1) * micro_batch) in every topology; what lies
    beyond the global batch is -1, a sequence of weight zero.
    """
    size, whole, dp = config.train.micro_batch, config.train.global_batch, config.parallel.dp
    assert size
    accumulate = math.ceil(math.ceil(whole / size) / dp)
    while True:
        for turn in range(accumulate):
            first = (turn * dp + rank) * size
            yield [cursor + i if i < whole else -1 for i in range(first, first + size)]
        cursor += whole


def loss_factor(tokens: Tensor, share: int) -> Tensor:
    """`share` / tokens, rounded to fp32 once; of a batch without a label to train on, `share`."""
    return (share / tokens.clamp(min=1)).float()


def train_step(
    engine: Engine,
    tap: RouterTap | None,
    batches: Sequence[Batch],
    tokens: Tensor,
    config: Config,
    riders: Sequence[float] = NO_RIDERS,
) -> Tensor:
    """Launch one optimizer step over this process's micro-batches.

    The objective is the sum of the token losses over all processes divided by `tokens`, so that a token weighs the
    same wherever it falls, plus the router losses, which are means over micro-batches (as in Switch Transformers).

    Args:
        tokens: labels trained on in the whole global batch, a float64 scalar on the device.
        riders: this process's, as `NO_RIDERS`.

    Returns:
        What `outcome` reads, on the device.
    """
    # What DeepSpeed averages over: data-parallel ranks, and those that hold parts of the same sequences.
    averaged, accumulate = config.parallel.dp * config.parallel.sp, len(batches)
    model = config.model
    # DeepSpeed divides by the micro-batches of a process and averages over processes: undo both.
    factor = loss_factor(tokens, accumulate * averaged)
    sums: Tensor | None = None
    for batch in batches:
        out = engine(batch)
        loss = out.loss_sum * factor
        loss_sum = out.loss_sum.detach().double().view(1)
        parts = [loss_sum, torch.zeros_like(loss_sum).expand(2)]
        router = tap.collect() if tap else None
        if router:
            loss = loss + model.aux_loss_weight * router.aux_loss + model.z_loss_weight * router.z_loss
            found = (router.aux_loss, router.z_loss, router.by_layer())
            parts[1:] = [part.detach().double().view(-1) / (accumulate * averaged) for part in found]
        engine.backward(nan_if_infinite(loss))
        engine.step()
        values = torch.cat(parts)
        sums = values if sums is None else sums + values
    assert sums is not None
    return measured(engine, sums, tokens, riders, config)


def measured(engine: Engine, sums: Tensor, tokens: Tensor, riders: Sequence[float], config: Config) -> Tensor:
    """Of the step just launched, on the device.

    Args:
        sums: this process's part of [loss_sum, aux_loss, z_loss, `RouterStats.by_layer`], in float64.
    """
    sums, told = sum_with_riders(sums, riders)
    sums = sums / config.parallel.tp  # tensor-parallel ranks counted the same tokens
    return torch.cat([sums[:3], tokens.view(1), engine.norm_and_skipped(), told, sums[3:]])


def router_load(values: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """([MoE layers, experts] float64, whether the step was skipped) of what `measured` returned."""
    rows = values[_head() :].view(-1, config.model.num_experts + 3)
    return rows[:, :-3], values[5] > 0


def outcome(values: Sequence[float], config: Config) -> StepOutcome:
    """Of the step that `measured` these values."""
    loss_sum, aux_loss, z_loss, tokens, grad_norm, skipped, asked, every, *rank_time = values[: _head()]
    width = config.model.num_experts + 3
    rows = [values[i : i + width] for i in range(_head(), len(values), width)]
    return StepOutcome(
        loss=loss_sum / max(tokens, 1),
        aux_loss=aux_loss,
        z_loss=z_loss,
        load=[list(row[:-3]) for row in rows],
        entropy=[row[-3] for row in rows],
        confidence=[row[-2] for row in rows],
        dropped=[row[-1] for row in rows],
        grad_norm=grad_norm,
        skipped=skipped > 0,
        rank_time=rank_time,
        tokens=int(tokens),
        asked_to_stop=asked > 0,
        checkpoint_every=int(every),
    )


def _head() -> int:
    """Values before those of the layers: eight, and each rank's own time."""
    world = dist.get_world_size()
    return 8 + (world if world > 1 else 0)
