"""A task and the networks that it trains, as the trainer sees them: losses, what is recorded, what is remembered."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.norm_memory import NormTap
from models.spectral_memory import SpectralTap

from .task import Memory, Modules, Nets, Phase, Sums, Task, Value

Shapes = dict[str, tuple[int, ...]]


class Learner:
    """Adds to a task what any network may have: BatchNorm's running statistics and spectral norms' vectors are memory.

    Args:
        modules: what this process holds of the model, by `Phase.parameters`.
        mean_over_parts: see `Task.attach`.
        listens: whether it is to be trained or evaluated; False: only filled with memory.

    Attributes:
        phases: of the task; its first is the run's own, whose numbers stand under their own names everywhere, and
            those of the others under `PHASE.NAME`.
        layout: names and shapes of what a step measures beside the first phase's loss, norm and whether it was skipped.
    """

    def __init__(
        self,
        task: Task,
        modules: Modules,
        mean_over_parts: Callable[[Tensor], Tensor] | None = None,
        listens: bool = True,
    ):
        self.task, self.modules, self.phases = task, modules, task.phases
        self._norms, self._spectral = NormTap(modules), SpectralTap(modules)
        if listens:
            task.attach(modules, mean_over_parts)
        self._extra = task.extra
        self.layout: Shapes = dict(self._extra)
        for phase in self.phases[1:]:
            self.layout |= {f"{phase.name}.{name}": shape for name, shape in {"loss": (), **self._extra}.items()}
        self.layout |= self._norms.extra
        for phase in self.phases[1:]:
            self.layout |= {f"{phase.name}.grad_norm": (), f"{phase.name}.skipped": ()}

    def loss(self, nets: Nets, batch: Any, phase: Phase) -> tuple[Sums, Tensor]:
        """(`Task.loss`, [loss, *extra, *what is remembered of the passes] in float64, without gradient)."""
        sums = self.task.loss(nets, batch, phase.name)
        values = [sums.loss.detach().double().view(1)]
        for name, shape in self._extra.items():
            value = sums.extra[name].detach()
            assert value.shape == shape, f"extra {name} has the shape {tuple(value.shape)}, it is declared as {shape}"
            values.append(value.double().reshape(-1))
        if self._norms:
            values += [value.reshape(-1) for value in self._norms.collect((batch.example_ids >= 0).any())]
        return sums, torch.cat(values)

    def joined(self, found: Mapping[str, Tensor]) -> Tensor:
        """[first phase's loss, *`layout` but for the norms of gradients] of what `loss` gave of each phase that was
        due, added up; the others' values are 0."""
        if len(self.phases) == 1:
            return found[self.phases[0].name]
        own = 1 + sum(torch.Size(shape).numel() for shape in self._extra.values())
        zeros = torch.zeros_like(next(iter(found.values())))
        parts = [found.get(phase.name, zeros) for phase in self.phases]
        return torch.cat([part[:own] for part in parts] + [sum(part[own:] for part in parts)])  # type: ignore[list-item]

    def metrics(self, found: Mapping[str, Value], weight: float, step: int) -> dict[str, Value]:
        """What the record says of a step beside the first phase's loss; `found`: by `layout`."""
        metrics = self.task.metrics({name: found[name] for name in self._extra}, weight)
        for phase in self.phases[1:]:
            if step % phase.every == 0:
                own = self.task.metrics({name: found[f"{phase.name}.{name}"] for name in self._extra}, weight)
                own |= {"loss": found[f"{phase.name}.loss"] / max(weight, 1)}
                own |= {"grad_norm": found[f"{phase.name}.grad_norm"]}
                metrics |= {f"{name}_{phase.name}": value for name, value in own.items()}
        return metrics

    def fresh_memory(self) -> dict[str, list]:
        """See `Task.fresh_memory`."""
        return self.task.fresh_memory(self.modules) | self._norms.fresh() | self._spectral.fresh()

    def known_memory(self) -> Shapes:
        """See `Task.known_memory`."""
        return self.task.known_memory(self.modules) | self._norms.known() | self._spectral.known()

    def after_step(self, memory: Memory, found: Mapping[str, Tensor], micro_batches: int) -> Memory:
        """See `Task.after_step`; `found`: by `layout`."""
        after = self._norms.after_step(self.task.after_step(memory, found, micro_batches), found)
        return self._spectral.after_step(after)

    def tell(self, memory: Memory) -> None:
        """Put memory in the place where the modules use it."""
        self.task.tell(self.modules, memory)
        self._norms.tell(memory)
        self._spectral.tell(memory)
