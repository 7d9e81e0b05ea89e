"""One optimizer step: forward and backward over the micro-batches, and what it measured."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs import Config
from models.balance import RouterTap
from models.batch import Batch

from .straggler import sum_over_all


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
    """Of each MoE layer's router; see `models.balance.Heard`."""
    grad_norm: float
    """Before clipping; inf or nan where the step was skipped."""
    skipped: bool
    """Whether the weights were left alone because the loss or a gradient was not finite."""
    rank_time: list[float]
    """Seconds of each rank in which it waited for no other; see `straggler.OwnTime`."""


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


def train_step(
    engine: Any, tap: RouterTap | None, batches: Sequence[Batch], tokens: int, config: Config
) -> StepOutcome:
    """Take one optimizer step over this process's micro-batches.

    The objective is the sum of the token losses over all processes divided by `tokens`, so that a token weighs the
    same wherever it falls, plus the router losses, which are means over micro-batches (as in Switch Transformers).

    Args:
        tokens: labels trained on in the whole global batch.
    """
    # What DeepSpeed averages over: data-parallel ranks, and those that hold parts of the same sequences.
    averaged, accumulate = config.parallel.dp * config.parallel.sp, len(batches)
    model = config.model
    sums: Tensor | None = None
    for batch in batches:
        out = engine(batch)
        # DeepSpeed divides by the micro-batches of a process and averages over processes: undo both.
        loss = out.loss_sum * (accumulate * averaged / max(tokens, 1))
        measured = [out.loss_sum.detach().double().view(1)]
        router = tap.collect() if tap else None
        if router:
            loss = loss + model.aux_loss_weight * router.aux_loss + model.z_loss_weight * router.z_loss
            parts = (router.aux_loss, router.z_loss, router.by_layer())
            measured += [part.detach().double().view(-1) / (accumulate * averaged) for part in parts]
        # An infinite loss can have finite gradients; made NaN, they are seen by the engine's own check of the norm.
        engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        engine.step()
        values = torch.cat(measured)
        sums = values if sums is None else sums + values
    assert sums is not None
    sums, rank_time = sum_over_all(sums)
    # Tensor-parallel ranks counted the same tokens.
    return outcome(engine, sums / config.parallel.tp, rank_time, tokens, config)


def outcome(engine: Any, sums: Tensor, rank_time: list[float], tokens: int, config: Config) -> StepOutcome:
    """Of the step just taken, from [loss_sum] or [loss_sum, aux_loss, z_loss, `RouterStats.by_layer`] over all."""
    loss_sum, *router_sums = sums.tolist()
    width = config.model.num_experts + 3
    rows = [router_sums[i : i + width] for i in range(2, len(router_sums), width)]
    return StepOutcome(
        loss=loss_sum / max(tokens, 1),
        aux_loss=router_sums[0] if router_sums else 0.0,
        z_loss=router_sums[1] if router_sums else 0.0,
        load=[row[:-3] for row in rows],
        entropy=[row[-3] for row in rows],
        confidence=[row[-2] for row in rows],
        dropped=[row[-1] for row in rows],
        grad_norm=float(engine.get_global_grad_norm() or 0.0),
        skipped=not engine.was_step_applied(),
        rank_time=rank_time,
    )
