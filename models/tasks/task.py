"""The contract between a task and the trainer: its phases, and what a micro-batch comes to in each of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from configs import Config

from .samples import Sample

Nets = Mapping[str, Callable[..., Any]]
"""What each phase trains, by the phase's name: called as the module that it is."""
Modules = Mapping[str, nn.Module]
"""What this process holds of the model, by `Phase.parameters`, as the engine has changed it."""
Memory = dict[str, Tensor]
"""What is no gradient's and stays from step to step, such as biases of routers, by plain names."""
Value = Any
"""A number, or lists of them."""


class Change(NamedTuple):
    """What a step has to tell beside its numbers."""

    event: str
    """Its name in events.jsonl."""
    details: dict[str, Any]


class Sums(NamedTuple):
    """Of one micro-batch. The objective of a step is the sum of its losses over the sum of its weights, over the whole
    global batch, so that an example weighs the same wherever it falls.

    Attributes:
        loss: scalar, differentiable, summed over what is learned from.
        weight: scalar: the tokens, images, nodes or pairs that it is summed over.
        extra: more sums, for the record: by the names and in the shapes of `Task.extra`.
        penalty: scalar, differentiable: its mean over micro-batches, whatever they weigh, is added to the objective.
    """

    loss: Tensor
    weight: Tensor
    extra: Mapping[str, Tensor] = {}
    penalty: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """Parameters that one optimizer updates, and when.

    Attributes:
        name: of the phase, and of what it trains in `Nets`.
        parameters: the submodule of the model that it trains, such as `generator`; empty: the whole model.
        optimizer: keys of the config's section `optim` that are its own.
        every: it is due at each step that this divides.
    """

    name: str = "model"
    parameters: str = ""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1


class Task:
    """What is learned from what: a subclass gives `loss`, and of the rest what it needs.

    Attributes:
        reads: the kind of examples that it learns from: an entry of `trainer.data.kinds.KINDS`.
        takes, gives: what a network of its takes and gives: `tokens`, `images`, `classes`, ...; a family says the same.
        example: what the record calls its examples.
    """

    reads: ClassVar[str] = "tokens"
    example: ClassVar[str] = "examples"
    takes: ClassVar[str]
    gives: ClassVar[str]

    def __init__(self, config: Config):
        self.config = config

    @property
    def counts(self) -> tuple[int, str]:
        """What one example counts in rates and totals, and the unit of `Sums.weight`: a sequence its tokens. The record
        has the total under this name, the rate under `UNIT_per_second`, and `eval_UNIT` of an evaluation."""
        return 1, "examples"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """In their order within a step; the first one's loss is that of the run."""
        return (Phase(),)

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `loss` gives in `Sums.extra`; () for a number."""
        return {}

    def attach(self, modules: Modules, mean_over_parts: Callable[[Tensor], Tensor] | None = None) -> None:
        """Listen to what this process trains, where a loss needs to know more of it than it returns.

        Args:
            mean_over_parts: differentiable mean over the processes that hold parts of the same examples.
        """

    def loss(self, nets: Nets, batch: Any, phase: str) -> Sums:
        """Of a micro-batch in one of the phases."""
        raise NotImplementedError

    def evaluate(self, nets: Nets, batch: Any) -> Sums:
        """Of held-out examples."""
        return self.loss(nets, batch, self.phases[0].name)

    @property
    def draws(self) -> bool:
        """Whether an evaluation asks for `samples`."""
        return type(self).samples is not Task.samples

    def samples(self, nets: Modules, batch: Any) -> Sample:
        """What an evaluation shows to a person, without gradients; every process computes the same.

        Args:
            nets: what each phase trains, by the phase's name, in evaluation mode.
            batch: the first held-out examples, or what else `trainer.data.kinds.Kind.shown` gives.
        """
        raise NotImplementedError

    @property
    def routed(self) -> list[int] | None:
        """The MoE layers whose `choices` this process knows, where an evaluation is to show the tokens that each expert
        takes; None: the model has none, in no process."""
        return None

    def choices(self) -> list[Tensor]:
        """[S, k] of each of the `routed` layers in the last forward pass, which is then forgotten."""
        return []

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        """What the record says of `Sums.extra`: by default the mean of each by weight.

        Args:
            extra: added up over the global batch.
        """
        return {name: value / max(weight, 1) for name, value in extra.items()}

    def watch(self, counts: Any, extra: Mapping[str, Value]) -> tuple[Any, list[Change]]:
        """Follow what a step measured over many steps: (counts after it, what is to be recorded as events).

        Args:
            counts: rows of whole numbers, as it returned them of the step before; empty at first.
        """
        return [], []

    @property
    def counted(self) -> tuple[int, int]:
        """Shape of what `watch` counts: rows and columns."""
        return 0, 0

    def fresh_memory(self, modules: Modules) -> dict[str, list]:
        """Memory before the first step, as (nested) lists of numbers."""
        return {}

    def known_memory(self, modules: Modules) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all the memory that a checkpoint may hold, of which a config may use only some."""
        return {}

    def after_step(self, memory: Memory, extra: Mapping[str, Tensor], micro_batches: int) -> Memory:
        """Memory after a step that was not skipped. All of it stays on the device.

        Args:
            extra: float64, added up over the global batch.
            micro_batches: of the global batch, filled ones included.
        """
        return memory

    def tell(self, modules: Modules, memory: Memory) -> None:
        """Put memory in the place where the modules use it."""


def unless_skipped(skipped: Tensor, before: Memory, after: Memory) -> Memory:
    """Memory after a step: as it was before, where the step was skipped (a bool on the device)."""
    return {name: torch.where(skipped, before[name], value) for name, value in after.items()}


class Trained(Protocol):
    """What has parameters: a module, or an engine over one."""

    def parameters(self) -> Iterator[Tensor]: ...


@contextmanager
def trained_only(nets: Mapping[str, Trained], name: str) -> Iterator[None]:
    """Within it, gradients are made for one of the phases' networks alone, though they pass through others."""
    others = [p for other, net in nets.items() if other != name for p in net.parameters() if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
