"""One optimizer step: forward and backward over the micro-batches, and what it measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config
from models.batch import MicroBatch
from models.loss import nan_if_infinite
from models.tasks.learner import Learner
from models.tasks.task import Nets, Phase, Sums, Value, trained_only

from .engine.engine import Engine
from .health.straggler import sum_with_riders


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step measured, over all processes."""

    loss: float
    """Of the first phase, mean by weight: of a language model the cross-entropy in nats per token."""
    extra: dict[str, Value]
    """By `Learner.layout`: `Sums.extra`, added up over the global batch, and what later phases measured."""
    grad_norm: float
    """Of the first phase, before clipping; inf or nan where it was skipped."""
    skipped: bool
    """Whether the weights were left alone because the loss or a gradient was not finite."""
    rank_time: list[float]
    """Seconds of each rank in which it waited for no other; see `clock.OwnTime`. On GPUs of an earlier step."""
    weight: int
    """Of the whole global batch: the tokens, images, ... that were trained on."""
    asked_to_stop: bool
    """Whether a process was asked to, by a signal or the file `stop`."""
    checkpoint_every: int
    """Steps between checkpoints, by rank 0's `Cadence`; 0 without one."""


NO_RIDERS = (0.0, 0.0)
"""What a process tells the others with a step: whether it was asked to stop, and steps between checkpoints."""


def micro_batches(config: Config, cursor: int, rank: int) -> Iterator[list[int]]:
    """Indices of the examples of each micro-batch of one process, without end, from `cursor` on.

    Micro-batch i of a step holds its examples [i * micro_batch, (i + 1) * micro_batch) in every topology; what lies
    beyond the global batch is -1, an example of weight zero.
    """
    size, whole, dp = config.train.micro_batch, config.train.global_batch, config.parallel.dp
    assert size
    accumulate = math.ceil(math.ceil(whole / size) / dp)
    while True:
        for turn in range(accumulate):
            first = (turn * dp + rank) * size
            yield [cursor + i if i < whole else -1 for i in range(first, first + size)]
        cursor += whole


def loss_factor(weight: Tensor, share: int) -> Tensor:
    """`share` / weight, rounded to fp32 once; of a batch that weighs nothing, `share`."""
    return (share / weight.clamp(min=1)).float()


def train_step(
    engines: Mapping[str, Engine],
    learner: Learner,
    batches: Sequence[MicroBatch],
    weight: Tensor,
    config: Config,
    riders: Sequence[float] = NO_RIDERS,
    step: int = 0,
) -> Tensor:
    """Launch one step over this process's micro-batches: an update in every phase that is due.

    The objective of a phase is the sum of its losses over all processes divided by `weight`, so that an example weighs
    the same wherever it falls, plus the penalties, which are means over micro-batches (as Switch Transformers' router
    losses).

    Args:
        engines: of each phase.
        weight: of the whole global batch (`MicroBatch.weight`), a float64 scalar on the device.
        riders: this process's, as `NO_RIDERS`.
        step: its number; a phase is due at those that its `every` divides.

    Returns:
        What `outcome` reads, on the device.
    """
    # What DeepSpeed averages over: data-parallel ranks, and those that hold parts of the same sequences.
    averaged, accumulate = config.parallel.dp * config.parallel.sp, len(batches)
    # DeepSpeed divides by the micro-batches of a process and averages over processes: undo both.
    factor = loss_factor(weight, accumulate * averaged)
    found: dict[str, Tensor] = {}
    for phase in learner.phases:
        if step % phase.every:
            continue
        engine = engines[phase.name]
        # Through another phase's network gradients pass, but its engine has no part in that.
        nets = {name: engine if name == phase.name else each.module for name, each in engines.items()}
        with trained_only(engines, phase.name):
            measured_before = _climb(engine, nets, learner, batches, phase, factor) if engine.sam else None
            for number, batch in enumerate(batches, 1):
                sums, values = learner.loss(nets, batch, phase)
                engine.backward(_objective(sums, factor))
                if engine.sam and number == len(batches):  # the update is of the weights where they were
                    engine.sam.descend()
                engine.step()
                found[phase.name] = found[phase.name] + values if phase.name in found else values
            if measured_before is not None:
                found[phase.name] = measured_before
    due = [engines[phase.name] if phase.name in found else None for phase in learner.phases]
    return measured(due, learner.joined(found), weight, riders, config)


def _objective(sums: Sums, factor: Tensor) -> Tensor:
    """Of a micro-batch."""
    loss = sums.loss * factor
    return nan_if_infinite(loss if sums.penalty is None else loss + sums.penalty)


def _climb(
    engine: Engine, nets: Nets, learner: Learner, batches: Sequence[MicroBatch], phase: Phase, factor: Tensor
) -> Tensor:
    """Move a phase's weights to where `optim.sam` takes the gradient. Returns what was measured before, which is what a
    step records: the sum of the values of `Learner.loss`."""
    assert engine.sam
    found: list[Tensor] = []
    for batch in batches:
        sums, values = learner.loss({**nets, phase.name: engine.module}, batch, phase)
        engine.sam.add(_objective(sums, factor))
        found.append(values)
    engine.sam.climb()
    return torch.stack(found).sum(0)


def measured(
    engines: Sequence[Engine | None], sums: Tensor, weight: Tensor, riders: Sequence[float], config: Config
) -> Tensor:
    """Of the step just launched, on the device.

    Args:
        engines: of each phase; None: it was not due. The first one always is.
        sums: this process's part of what `Learner.joined` gives.
    """
    sums, told = sum_with_riders(sums, riders)
    sums = sums / config.parallel.tp  # tensor-parallel ranks counted the same examples
    first, *others = [engine.norm_and_skipped() if engine else weight.new_zeros(2) for engine in engines]
    if others:  # a step that is skipped in one phase changes no memory, and counts as skipped
        first = torch.stack([first[0], torch.stack([first, *others])[:, 1].max()])
    return torch.cat([sums[:1], weight.view(1), first, told, sums[1:], *others])


def extra_of(values: Tensor, extra: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], Tensor]:
    """(`StepOutcome.extra` as float64 tensors, whether the step was skipped) of what `measured` returned; `extra`: see
    `Learner.layout`."""
    sizes = [math.prod(shape) for shape in extra.values()]
    parts = values[_head() :].split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(extra.items(), parts, strict=True)}, values[3] > 0


def outcome(values: Sequence[float], extra: Mapping[str, tuple[int, ...]]) -> StepOutcome:
    """Of the step that `measured` these values; `extra`: see `Learner.layout`."""
    loss_sum, weight, grad_norm, skipped, asked, every, *rank_time = values[: _head()]
    found, rest = {}, iter(values[_head() :])
    for name, shape in extra.items():
        found[name] = _nested(rest, shape)
    return StepOutcome(
        loss=loss_sum / max(weight, 1),
        extra=found,
        grad_norm=grad_norm,
        skipped=skipped > 0,
        rank_time=rank_time,
        weight=int(weight),
        asked_to_stop=asked > 0,
        checkpoint_every=int(every),
    )


def _nested(values: Iterator[float], shape: tuple[int, ...]) -> Value:
    """The next of the values, in lists of this shape."""
    return [_nested(values, shape[1:]) for _ in range(shape[0])] if shape else next(values)


def _head() -> int:
    """Values before the extra ones: six, and each rank's own time."""
    world = dist.get_world_size()
    return 6 + (world if world > 1 else 0)
