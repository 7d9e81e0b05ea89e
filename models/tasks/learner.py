"""A task and the networks that it trains, as the trainer sees them: losses, recorded metrics, memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.norm_memory import NormTap
from models.spectral_memory import SpectralTap

from .task import AVERAGED, Memory, Modules, Nets, Phase, Sums, Task, Value

Shapes = dict[str, tuple[int, ...]]


class Learner:
    """Adds to a task's memory what any network may have: BatchNorm's running statistics, spectral norms' vectors.

    Args:
        modules: the parts of the model that this process holds, by `Phase.parameters`.
        mean_over_parts: see `Task.attach`.
        listens: the modules are to be trained or evaluated; False: they are only given their memory.

    Attributes:
        phases: of the task. Values of the first, the run's own, have plain names everywhere, those of the others
            `PHASE.NAME`.
        layout: names and shapes of what a step measures besides the first phase's loss, gradient norm and skipped flag.
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
        """(`Task.loss`, [loss, *extra, *BatchNorm's statistics of the passes] in float64, without gradient)."""
        sums = self.task.loss(nets, batch, phase.name)
        values = [sums.loss.detach().double().view(1)]
        for name, shape in self._extra.items():
            value = sums.extra[name].detach()
            assert value.shape == shape, f"extra {name} has shape {tuple(value.shape)}, but is declared as {shape}"
            values.append(value.double().reshape(-1))
        if self._norms:
            values += [value.reshape(-1) for value in self._norms.collect((batch.example_ids >= 0).any())]
        return sums, torch.cat(values)

    def joined(self, found: Mapping[str, Tensor]) -> Tensor:
        """[first phase's loss, *`layout` without gradient norms and skipped flags], from the sums of `loss` over each
        phase that was due; the other phases' values are 0."""
        if len(self.phases) == 1:
            return found[self.phases[0].name]
        own = 1 + sum(torch.Size(shape).numel() for shape in self._extra.values())
        zeros = torch.zeros_like(next(iter(found.values())))
        parts = [found.get(phase.name, zeros) for phase in self.phases]
        return torch.cat([part[:own] for part in parts] + [sum(part[own:] for part in parts)])  # type: ignore[list-item]

    def metrics(self, found: Mapping[str, Value], weight: float, step: int) -> dict[str, Value]:
        """A step's recorded metrics besides the first phase's loss; `found`: values by `layout`."""
        metrics = self.task.metrics({name: found[name] for name in self._extra}, weight)
        for phase in self.phases[1:]:
            if step % phase.every == 0:
                own = self.task.metrics({name: found[f"{phase.name}.{name}"] for name in self._extra}, weight)
                own |= {"loss": found[f"{phase.name}.loss"] / max(weight, 1)}
                own |= {"grad_norm": found[f"{phase.name}.grad_norm"]}
                metrics |= {f"{name}_{phase.name}": value for name, value in own.items()}
        return metrics

    @property
    def statistics(self) -> Shapes:
        """Names and shapes of what of the memory is averaged as weights are: running statistics, which belong to
        them."""
        return self._norms.known()

    def fresh_memory(self) -> dict[str, list]:
        """See `Task.fresh_memory`."""
        return self.task.fresh_memory(self.modules) | self._norms.fresh() | self._spectral.fresh()

    def known_memory(self) -> Shapes:
        """See `Task.known_memory`."""
        averaged = {f"{AVERAGED}{name}": shape for name, shape in self.statistics.items()}
        return self.task.known_memory(self.modules) | self.statistics | averaged | self._spectral.known()

    def after_step(self, memory: Memory, found: Mapping[str, Tensor], micro_batches: int) -> Memory:
        """See `Task.after_step`; `found`: values by `layout`."""
        after = self._norms.after_step(self.task.after_step(memory, found, micro_batches), found)
        return self._spectral.after_step(after)

    def tell(self, memory: Memory) -> None:
        """Write memory to where the modules use it."""
        self.task.tell(self.modules, memory)
        self._norms.tell(memory)
        self._spectral.tell(memory)
