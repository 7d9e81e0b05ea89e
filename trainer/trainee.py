"""What one process trains, built the same way for every topology, and the two things done with it: a step, a loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config, ConfigError
from models.families import build
from models.init import fill, scale_outputs
from models.kernels.uncompiled import leave_uncompiled
from models.spectral_memory import fill_vectors
from models.tasks.learner import Learner
from models.tasks.table import task_of
from models.tasks.task import AVERAGED, Memory, Sums, Value, unless_skipped

from .checkpoint.init_from import load_weights
from .checkpoint.memory import as_rows, on_device, restored, with_averages, wrong_shapes
from .data.kinds import ExampleReader
from .engine.ema import Ema
from .engine.engine import Engine
from .engine.parallel import Place, everyones, place
from .engine.pipeline import Pipeline, cut, pipeline_loss, pipeline_step
from .engine.precision import multiply_in_fp8
from .engine.ulysses import mean_over, sequence_group, share_sequences, split
from .observe.expert_tokens import ExpertTokens
from .observe.held_out import held_out_loss
from .processes.compiled import Compilations, keep_compiled
from .schedule import learning_rates, optimizer_of
from .step import NO_RIDERS, extra_of, train_step


@dataclass
class Trainee:
    """An engine over this process's part of the model, and its place among the others."""

    config: Config
    engines: dict[str, Engine]
    """By the phase's name."""
    learner: Learner
    where: Place
    device: torch.device
    _memory: Memory = field(default_factory=dict)
    """Of the whole model."""
    compilations: Compilations = field(default_factory=Compilations)

    @property
    def engine(self) -> Engine:
        """Of the first phase: the only one of most tasks."""
        return next(iter(self.engines.values()))

    def set_learning_rate(self, step: int, drops: int = 0) -> float:
        """Of every phase, for a step, as `schedule.learning_rate`. Returns the first one's."""
        rates = learning_rates(step, self.config, self.learner.phases, drops)
        for name, rate in rates.items():
            engine = self.engines[name]
            engine.set_learning_rate(rate)
            engine.set_step(step)
        return next(iter(rates.values()))

    @cached_property
    def _averaged(self) -> list[tuple[str, Ema, int]]:
        """Names of the memory that is averaged, with the average of the weights that it belongs to, and every how many
        steps these change."""
        return [
            (name, ema, phase.every)
            for phase in self.learner.phases
            if (ema := self.engines[phase.name].ema)
            for name in self.learner.statistics
            if not phase.parameters or name.startswith(f"{phase.parameters}.")
        ]

    @property
    def has_ema(self) -> bool:
        """Whether it keeps an average of any weights."""
        return any(engine.ema for engine in self.engines.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it every network computes with the average of its weights, if it has one. A collective."""
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.averaged())
            self.learner.tell(with_averages(self._memory))
            yield
            self.learner.tell(self._memory)

    @property
    def networks(self) -> list[str]:
        """See `TrainState.networks`."""
        return [phase.parameters for phase in self.learner.phases] if len(self.engines) > 1 else []

    @property
    def frozen(self) -> list[str]:
        """See `TrainState.frozen`."""
        pieces = (piece for engine in self.engines.values() for piece in engine.pieces())
        return [piece.name for piece in pieces if not piece.parameter.requires_grad]

    def remember(self, rows: Mapping[str, list[list[float]]]) -> None:
        """Put a checkpoint's memory in place of this one, as far as the config asks for it. An average that it lacks
        begins with what it is the average of."""
        fresh, averaged = self.learner.fresh_memory(), [name for name, *_ in self._averaged]
        fresh |= {AVERAGED + name: fresh[name] for name in averaged}
        rows = {AVERAGED + name: rows[name] for name in averaged if name in rows} | dict(rows)
        self._tell(restored(rows, on_device(fresh, self.device)))

    def memory(self) -> dict[str, list[list[float]]]:
        """What is remembered after the last step launched: waits for the device."""
        return as_rows(self._memory)

    def _tell(self, memory: Memory) -> None:
        self._memory = memory
        self.learner.tell(memory)

    def part(self, batch: Any) -> Any:
        """What this process works on of a micro-batch of its data-parallel rank."""
        return split(batch, self.where.sp, self.config.parallel.sp)

    def step(
        self, batches: Sequence[Any], weight: Tensor, riders: Sequence[float] = NO_RIDERS, number: int = 0
    ) -> Tensor:
        """Launch one optimizer step over parts of micro-batches. Returns what `step.outcome` reads, on the device.

        Args:
            weight: of the whole global batch, a float64 scalar on the device.
            riders: of this process, as `step.NO_RIDERS`.
            number: of the step, which decides the phases that are due; 0: all.
        """
        if self.learner.task.has_teacher:
            batches = self._taught(batches)
        if isinstance(self.engine, Pipeline):
            values = pipeline_step(self.engine, batches, weight, self.config, riders)
        else:
            values = train_step(self.engines, self.learner, batches, weight, self.config, riders, number)
        if self._memory:
            before, (extra, skipped) = self._memory, extra_of(values, self.learner.layout)
            after = self.learner.after_step(before, extra, len(batches) * self.config.parallel.dp)
            for name, ema, every in self._averaged:
                if number % every == 0:
                    after[AVERAGED + name] = before[AVERAGED + name].lerp(after[name], ema.share)
            self._tell(unless_skipped(skipped, before, after))
        return values

    @torch.no_grad()
    def _taught(self, batches: Sequence[Any]) -> list[Any]:
        """`Task.taught` of each micro-batch, for which the averages take the weights' place once. A collective."""
        for engine in self.engines.values():
            engine.eval()
        with self.averaged():
            found = [self.learner.task.taught(self.engines, batch) for batch in batches]
        for engine in self.engines.values():
            engine.train()
        return found

    def held_out_loss(
        self,
        dataset: ExampleReader,
        device: torch.device,
        seen: ExpertTokens | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> tuple[float, int, dict[str, Value]]:
        """(mean loss, what it is the mean of, `Task.metrics`) over the first train.eval_sequences of a held-out split.

        Args:
            seen: is told what the routers chose.
            alive: is called before each forward pass.
        """
        train, parallel = self.config.train, self.config.parallel
        assert train.micro_batch

        def forward(*batches: Any) -> Sums:
            alive()
            parts = [self.part(batch) for batch in batches]
            sums = self._forward(parts)
            for name, value in sums.extra.items():
                extra[name] = extra[name] + value.double() if name in extra else value.double()
            if seen:
                for number, part in enumerate(parts):
                    seen.add(part, self._choices(number))
            return sums

        extra: dict[str, Tensor] = {}

        for engine in self.engines.values():
            engine.eval()
        first = range(min(train.eval_sequences, len(dataset)))
        loss, counted = held_out_loss(
            forward, dataset, first, train.micro_batch, device, (self.where.dp, parallel.dp), at_once=parallel.stages
        )
        for engine in self.engines.values():
            engine.train()
        weight = counted // parallel.tp  # tensor-parallel ranks counted the same ones
        for value in extra.values():
            dist.all_reduce(value)
        found = {name: (value / parallel.tp).tolist() for name, value in extra.items()}
        return loss, weight, self.learner.task.metrics(found, weight) if found else {}

    def _forward(self, batches: Sequence[Any]) -> Sums:
        if isinstance(self.engine, Pipeline):
            return Sums(*pipeline_loss(self.engine, batches))
        (batch,) = batches
        return self.learner.task.evaluate(self.engines, batch)

    def _choices(self, number: int) -> list[Tensor]:
        """[S, k] of each MoE layer that this process holds, in one of the batches just evaluated."""
        if isinstance(self.engine, Pipeline):
            return [choice for stage in self.engine.stages for choice in stage.measured[number].choices]
        return self.learner.task.choices()


SCALED_BY = 64
"""Examples that scale initial weights: as many in every topology."""


def build_trainee(
    config: Config, device: torch.device, *, warm: bool = True, dataset: ExampleReader | None = None
) -> Trainee:
    """Build, fill and cut the model, and make the engine; the process group must exist.

    Args:
        warm: start from train.init_from, if it is set; not for a run that has a checkpoint.
        dataset: whose first examples scale the initial weights, if the model's section asks for it.

    Raises:
        ConfigError: train.init_from is not what it should be, or the family cannot be cut as asked.
    """
    parallel, where = config.parallel, place(config, dist.get_rank())
    if parallel.pp > 1:
        with torch.device("meta"):
            module: Any = build(config.model)
        module = cut(module, config).to_empty(device=device)
    else:
        with device:
            module = build(config.model)
    fill(module, config.run.seed)
    task = task_of(config)
    if warm and dataset and config.model.scaled_by_examples:
        first = dataset.examples(range(SCALED_BY)).to(device)
        nets = {phase.name: module.get_submodule(phase.parameters) for phase in task.phases}
        scale_outputs(module, lambda: task.evaluate(nets, first))
    known = load_weights(module, config) if warm and config.train.init_from else {}
    fill_vectors(module, config.run.seed)
    if config.train.recompute_every:
        module.set_activation_checkpointing(config.train.recompute_every)
    mean = None
    if parallel.sp > 1:
        group = sequence_group(config)
        share_sequences(module, group)
        mean = mean_over(group)
    if config.train.precision == "fp8":
        multiply_in_fp8(module)
    if config.train.compile or device.type == "cuda":  # there attention is compiled in any case
        keep_compiled()
    if config.train.compile:
        leave_uncompiled()
        for layer in getattr(module, "compiled_parts", lambda: [module])():
            layer.compile(dynamic=False)
    if parallel.dp == dist.get_world_size() > 1:
        task.everyones = everyones
    engines: dict[str, Engine] = {}
    for phase in task.phases:
        optim, prefix = optimizer_of(config, phase), f"{phase.parameters}." if phase.parameters else ""
        part = module.get_submodule(phase.parameters)
        engine = engines[phase.name] = (Pipeline if parallel.pp > 1 else Engine)(part, config, optim, prefix)
        engine.set_every(phase.every)
    learner = Learner(task, {phase.parameters: engines[phase.name].module for phase in task.phases}, mean)
    if wrong := wrong_shapes(known, learner):
        raise ConfigError(f"train.init_from={config.train.init_from}: {wrong}")
    trainee = Trainee(config, engines, learner, where, device)
    trainee.remember(known)
    return trainee
