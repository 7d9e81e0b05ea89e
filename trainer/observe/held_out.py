"""Loss on the held-out split, from a plain module or from an engine."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from configs import Config, ConfigError
from models.tasks.table import task_of
from models.tasks.task import Nets, Sums, Task, Value
from trainer.data.kinds import ExampleReader, kind_of
from trainer.data.read.reader import Dataset
from trainer.record.lines import Record


@torch.no_grad()
def held_out_loss(
    forward: Callable[..., Any],
    dataset: ExampleReader,
    indices: Sequence[int],
    micro_batch: int,
    here: torch.device,
    share: tuple[int, int] = (0, 1),
    at_once: int = 1,
) -> tuple[float, int]:
    """Mean loss in nats per token over sequences of a held-out split, reduced over all processes.

    Every process runs the same number of forward passes (ZeRO-3 gathers weights collectively); batches are padded with
    sequences of weight zero.

    Args:
        forward: gives the `Sums` or `LossOutput` of its batches. Of the processes that compute the same batches, either
            one returns them and the others zeros (a pipeline), or all do, and the tokens count several times.
        share: (i, n): this process takes micro-batch i of every n.
        at_once: micro-batches passed to `forward` together; with fewer than its stages a pipeline has idle ones.

    Returns:
        (loss, number of tokens averaged over).
    """
    sequences = len(indices)
    index, shares = share
    sums = torch.zeros(2, dtype=torch.float64, device=here)
    stride = micro_batch * shares
    for first in range(index * micro_batch, sequences + index * micro_batch, stride * at_once):
        starts = range(first, first + stride * at_once, stride)
        mine = [[indices[i] if i < sequences else -1 for i in range(s, s + micro_batch)] for s in starts]
        loss, tokens, *_ = forward(*(dataset.examples(each).to(here) for each in mine))
        sums += torch.stack([loss.double(), tokens.double()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item(), int(sums[1])


def held_out_metrics(
    task: Task, nets: Nets, dataset: ExampleReader, count: int, micro_batch: int, here: torch.device
) -> tuple[float, int, dict[str, Value]]:
    """(mean loss, its weight, `Task.metrics`) over the first `count` examples of a held-out split, in one process."""
    extra: dict[str, Tensor] = {}

    def forward(batch: Any) -> Sums:
        sums = task.evaluate(nets, batch)
        for name, value in sums.extra.items():
            extra[name] = extra.get(name, 0) + value.double()
        return sums

    loss, weight = held_out_loss(forward, dataset, range(count), micro_batch, here)
    return loss, weight, task.metrics({name: value.tolist() for name, value in extra.items()}, weight) if extra else {}


class Split(NamedTuple):
    """A trained module with what its held-out loss is computed from, in one process."""

    task: Task
    nets: Nets
    dataset: ExampleReader
    here: torch.device
    micro_batch: int


def held_out_split(
    module: nn.Module, config: Config, otherwise: str = "prepare data with data.prepare.held_out"
) -> Split:
    """Open the held-out split of a run's data, and move the module, in fp32, to the device.

    Args:
        otherwise: what to do where there is none, for the message.

    Raises:
        ConfigError: there is none.
    """
    # A task may look at the precision.
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
    dataset = kind_of(config).open(config, "held_out")
    if dataset is None:
        raise ConfigError(f"data.path={config.data.path} has no held-out examples: {otherwise}")
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(here)
    task = task_of(config)
    nets = {phase.name: module.get_submodule(phase.parameters) for phase in task.phases}
    return Split(task, nets, dataset, here, config.train.micro_batch or 8)


class SourceLoss(NamedTuple):
    """A model's loss on one source of held-out data, or on several, weighted by tokens."""

    loss: float
    """In nats per token."""
    tokens: int
    """Number that `loss` averages over."""
    sequences: int
    bytes: float
    """Of text that these tokens encode, by the source's mean bytes per token."""
    unigram_entropy: float
    """In nats per token: the best loss without context, for a model that knows the source."""

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes


def held_out_loss_by_source(
    forward: Callable[..., Any], dataset: Dataset, sequences: int, micro_batch: int, here: torch.device
) -> list[tuple[str, SourceLoss]]:
    """Path and loss of each source with a token among the first `sequences` of a held-out split, in the config's order;
    two sources may have the same path.

    Raises:
        ConfigError: no source has one.
    """
    indices: dict[int, list[int]] = {}
    for index in range(sequences):
        indices.setdefault(dataset.locate(index).source, []).append(index)
    found = []
    for source, own in sorted(indices.items()):
        split = dataset.manifests[source].splits["held_out"]
        loss, tokens = held_out_loss(forward, dataset, own, min(micro_batch, len(own)), here)
        if tokens:
            size = tokens * split.bytes / split.tokens
            found.append((dataset.sources[source].path, SourceLoss(loss, tokens, len(own), size, split.entropy)))
    if not found:
        raise ConfigError("there are no held-out tokens to predict: prepare more text, or evaluate more sequences")
    return found


def together(sources: Iterable[SourceLoss]) -> SourceLoss:
    """All sources as one, weighted by tokens."""
    sources = list(sources)
    tokens = sum(each.tokens for each in sources)
    return SourceLoss(
        sum(each.loss * each.tokens for each in sources) / tokens,
        tokens,
        sum(each.sequences for each in sources),
        sum(each.bytes for each in sources),
        sum(each.unigram_entropy * each.tokens for each in sources) / tokens,
    )


@contextmanager
def if_there_is_room(record: Record | None, path: Path) -> Iterator[None]:
    """Write a file that training does not depend on: a full disk, or another OSError, becomes an event."""
    try:
        yield
    except OSError as error:
        if record:
            record.event("not_written", file=path.name, reason=str(error))
