"""The interface between a task and the trainer: its phases, and the loss of a micro-batch in each of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from configs import Config
from configs.sections.pairs import Words, kind_of_data

from .samples import Sample

Nets = Mapping[str, Callable[..., Any]]
"""The network that each phase trains, by the phase's name; called like the module itself."""
Modules = Mapping[str, nn.Module]
"""The parts of the model that this process holds, by `Phase.parameters`, as the engine has changed them."""
Memory = dict[str, Tensor]
"""State that no gradient trains and that is kept from step to step, such as router biases, by plain names."""
AVERAGED = "ema."
"""Begins the name of a memory's own moving average, where the weights beside it have one."""
Value = Any
"""A number, or lists of them."""


class Change(NamedTuple):
    """An event that a step gives rise to."""

    event: str
    """Its name in events.jsonl."""
    details: dict[str, Any]


class Sums(NamedTuple):
    """Sums over one micro-batch. A step's objective is the sum of all losses divided by the sum of all weights in the
    global batch, so that an example counts the same in whichever micro-batch it is.

    Attributes:
        loss: scalar, differentiable, summed over tokens, images, nodes or pairs.
        weight: scalar: how many of them were summed over.
        extra: further sums for the record, with the names and shapes of `Task.extra`.
        penalty: scalar, differentiable: its unweighted mean over micro-batches is added to the objective.
    """

    loss: Tensor
    weight: Tensor
    extra: Mapping[str, Tensor] = {}
    penalty: Tensor | None = None


@dataclass(frozen=True)
class Phase:
    """Parameters that one optimizer updates, and when.

    Attributes:
        name: of the phase, and of its network in `Nets`.
        parameters: the submodule of the model that it trains, such as `generator`; empty: the whole model.
        optimizer: keys of the config's section `optim` that it overrides.
        every: it is due at every step that this divides.
    """

    name: str = "model"
    parameters: str = ""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1


def alone(own: Tensor) -> tuple[Tensor, int]:
    """`Task.everyones` of a single process."""
    return own, 0


class Task:
    """What is learned from what. A subclass must define `loss`; everything else is optional.

    Attributes:
        reads: the kind of examples that it learns from: an entry of `trainer.data.kinds.KINDS`.
        takes, gives: inputs and outputs of its network: `tokens`, `images`, `classes`, ...; each one or several, of
            which the family must have one.
        example: what the record calls its examples.
        has_teacher: it learns from the moving average of the weights (optim.ema_decay): see `taught`.
    """

    reads: ClassVar[str] = "tokens"
    example: ClassVar[str] = "examples"
    has_teacher: ClassVar[bool] = False
    takes: ClassVar[Words]
    gives: ClassVar[Words]

    def __init__(self, config: Config):
        self.config = config
        self.everyones: Callable[[Tensor], tuple[Tensor, int]] = alone
        """What all data-parallel processes have of a tensor, in the order of their micro-batches, and where this one's
        begins; differentiable, if all compute a loss from it. A collective, for use in `loss`."""

    @classmethod
    def kind(cls, config: Config) -> str:
        """The kind of examples that a run learns from: `reads`, unless the family decides. Raises ConfigError."""
        return cls.reads

    @property
    def counts(self) -> tuple[int, str]:
        """How much one example counts in totals and rates (0: its own weight), and the unit, that of `Sums.weight`: a
        sequence counts its tokens. The record has the total under the unit's name, the rate as `UNIT_per_second`, and
        `eval_UNIT` for an evaluation."""
        return 1, "examples"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases, in their order within a step; the first one's loss is the run's."""
        return (Phase(),)

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `loss` returns in `Sums.extra`; () for a number."""
        return {}

    def attach(self, modules: Modules, mean_over_parts: Callable[[Tensor], Tensor] | None = None) -> None:
        """Install hooks on this process's modules, if the loss needs more than their forward pass returns.

        Args:
            mean_over_parts: differentiable mean over the processes that hold parts of the same examples.
        """

    def taught(self, nets: Nets, batch: Any) -> Any:
        """What `loss` is given in place of a micro-batch, if the task `has_teacher`: the micro-batch with what its
        teacher says of it. Called before each step, without gradients.

        Args:
            nets: the networks with the moving average of their weights, in evaluation mode.
        """
        return batch

    def loss(self, nets: Nets, batch: Any, phase: str) -> Sums:
        """The loss of a micro-batch in one of the phases."""
        raise NotImplementedError

    def evaluate(self, nets: Nets, batch: Any) -> Sums:
        """The loss of held-out examples."""
        return self.loss(nets, batch, self.phases[0].name)

    @property
    def draws(self) -> bool:
        """Whether an evaluation asks for `samples`."""
        return type(self).samples is not Task.samples

    def samples(self, nets: Modules, batch: Any) -> Sample:
        """What an evaluation shows; called without gradients, and computed identically by every process.

        Args:
            nets: the network of each phase, by the phase's name, in evaluation mode.
            batch: the first held-out examples, or whatever `trainer.data.kinds.Kind.shown` gives instead.
        """
        raise NotImplementedError

    @property
    def routed(self) -> list[int] | None:
        """The MoE layers whose `choices` this process knows, for an evaluation to show the tokens that each expert
        takes; None: the model has no MoE layers, in any process."""
        return None

    def choices(self) -> list[Tensor]:
        """The chosen experts of each `routed` layer in the last forward pass, [S, k]; they are then discarded."""
        return []

    def routed_tokens(self, batch: Any) -> Tensor:
        """[S] ids of the tokens that `choices` of a batch stand for; below 0: not to be shown."""
        raise NotImplementedError

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        """What is recorded of `Sums.extra`: by default each sum divided by the weight.

        Args:
            extra: summed over the global batch.
        """
        return {name: value / max(weight, 1) for name, value in extra.items()}

    def watch(self, counts: Any, extra: Mapping[str, Value]) -> tuple[Any, list[Change]]:
        """Follow a measurement over many steps: (counts after this step, events to record).

        Args:
            counts: rows of integers, as returned for the previous step; empty at first.
        """
        return [], []

    @property
    def counted(self) -> tuple[int, int]:
        """Shape of the counts of `watch`: rows and columns."""
        return 0, 0

    def fresh_memory(self, modules: Modules) -> dict[str, list]:
        """Memory before the first step, as (nested) lists of numbers."""
        return {}

    def known_memory(self, modules: Modules) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all memory that a checkpoint may hold; a config may use only some of it."""
        return {}

    def after_step(self, memory: Memory, extra: Mapping[str, Tensor], micro_batches: int) -> Memory:
        """Memory after a step that was not skipped. All of it stays on the device.

        Args:
            extra: float64, summed over the global batch.
            micro_batches: of the global batch, including those of padding.
        """
        return memory

    def tell(self, modules: Modules, memory: Memory) -> None:
        """Write memory to where the modules use it."""


class OfAnyKind(Task):
    """A task that learns from several kinds of examples: those of `data.kind`, or the first that the family takes."""

    @classmethod
    def kind(cls, config: Config) -> str:
        """Raises ConfigError as `kind_of_data`."""
        return kind_of_data(config)

    @property
    def counts(self) -> tuple[int, str]:
        return 1, self.kind(self.config)


def unless_skipped(skipped: Tensor, before: Memory, after: Memory) -> Memory:
    """Memory after a step: unchanged if the step was skipped (a bool on the device)."""
    return {name: torch.where(skipped, before[name], value) for name, value in after.items()}


class Trained(Protocol):
    """Anything with parameters: a module, or the engine of one."""

    def parameters(self) -> Iterator[Tensor]: ...


@contextmanager
def trained_only(nets: Mapping[str, Trained], name: str) -> Iterator[None]:
    """Within the block, only one phase's network accumulates gradients, though they flow through the others."""
    others = [p for other, net in nets.items() if other != name for p in net.parameters() if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
