"""A task and the networks that it trains, as the trainer sees them: losses, what is recorded, what is remembered."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from models.norm_memory import NormTap

from .task import Memory, Modules, Nets, Phase, Sums, Task, Value


class Learner:
    """Adds to a task what any network may have: BatchNorm's running statistics are memory.

    Args:
        modules: what this process holds of the model, by `Phase.parameters`.
        mean_over_parts: see `Task.attach`.
        listens: whether it is to be trained or evaluated; False: only filled with memory.
    """

    def __init__(
        self,
        task: Task,
        modules: Modules,
        mean_over_parts: Callable[[Tensor], Tensor] | None = None,
        listens: bool = True,
    ):
        self.task, self.modules = task, modules
        self._norms = NormTap(modules)
        if listens:
            task.attach(modules, mean_over_parts)
        self._own = task.extra
        self.extra = self._own | self._norms.extra
        """Names and shapes of `Sums.extra`."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.task.phases

    def loss(self, nets: Nets, batch: Any, phase: str) -> Sums:
        """See `Task.loss`."""
        sums = self.task.loss(nets, batch, phase)
        if not self._norms:
            return sums
        return sums._replace(extra={**sums.extra, **self._norms.collect((batch.example_ids >= 0).any())})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        """See `Task.metrics`."""
        return self.task.metrics({name: extra[name] for name in self._own}, weight)

    def fresh_memory(self) -> dict[str, list]:
        """See `Task.fresh_memory`."""
        return self.task.fresh_memory(self.modules) | self._norms.fresh()

    def known_memory(self) -> dict[str, tuple[int, ...]]:
        """See `Task.known_memory`."""
        return self.task.known_memory(self.modules) | self._norms.known()

    def after_step(self, memory: Memory, extra: Mapping[str, Tensor], micro_batches: int) -> Memory:
        """See `Task.after_step`."""
        return self._norms.after_step(self.task.after_step(memory, extra, micro_batches), extra)

    def tell(self, memory: Memory) -> None:
        """Put memory in the place where the modules use it."""
        self.task.tell(self.modules, memory)
        self._norms.tell(memory)
