"""What one process trains, built the same way for every topology, and the two things done with it: a step, a loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from configs import Config
from models.batch import Batch
from models.families import build
from models.kernels.uncompiled import leave_uncompiled
from models.loss import LossOutput
from models.moe.balance import RouterTap
from models.moe.router import Chooser, choosers

from .checkpoint.init_from import load_weights
from .checkpoint.router_state import Routers, after_step, fresh_routers, on_device, tell
from .data.read.reader import Dataset
from .engine.engine import Engine
from .engine.parallel import Place, place
from .engine.pipeline import Pipeline, cut, pipeline_loss, pipeline_step
from .engine.precision import multiply_in_fp8
from .engine.ulysses import mean_over, sequence_group, share_sequences, split
from .observe.expert_tokens import ExpertTokens
from .observe.held_out import held_out_loss
from .processes.compiled import Compilations, keep_compiled
from .step import NO_RIDERS, router_load, train_step


@dataclass
class Trainee:
    """An engine over this process's part of the model, and its place among the others."""

    config: Config
    engine: Engine
    tap: RouterTap | None
    """On the routers; None for dense models, and in a pipeline, whose stages have their own."""
    where: Place
    choosers: list[Chooser]
    """Of the MoE layers that this process holds."""
    device: torch.device
    _routers: dict[str, Tensor] = field(default_factory=dict)
    """Of the whole model."""
    compilations: Compilations = field(default_factory=Compilations)

    def remember(self, routers: Routers) -> None:
        """Put a checkpoint's router state in place of this one, as far as the config asks for it."""
        fresh = fresh_routers(self.config.model)
        self._tell(on_device({key: routers.get(key, value) for key, value in fresh.items()}, self.device))

    def routers(self) -> Routers:
        """The router state, after the last step launched: waits for the device."""
        return {key: value.tolist() for key, value in self._routers.items()}

    def _tell(self, routers: dict[str, Tensor]) -> None:
        self._routers = routers
        tell(self.choosers, routers, self.config.model)

    def part(self, batch: Batch) -> Batch:
        """What this process works on of a micro-batch of its data-parallel rank."""
        return split(batch, self.where.sp, self.config.parallel.sp)

    def step(self, batches: Sequence[Batch], tokens: Tensor, riders: Sequence[float] = NO_RIDERS) -> Tensor:
        """Launch one optimizer step over parts of micro-batches. Returns what `step.outcome` reads, on the device.

        Args:
            tokens: trained on in the whole global batch, a float64 scalar on the device.
            riders: of this process, as `step.NO_RIDERS`.
        """
        if isinstance(self.engine, Pipeline):
            values = pipeline_step(self.engine, batches, tokens, self.config, riders)
        else:
            values = train_step(self.engine, self.tap, batches, tokens, self.config, riders)
        if self._routers:
            micro_batches = len(batches) * self.config.parallel.dp
            self._tell(after_step(self._routers, *router_load(values, self.config), micro_batches, self.config))
        return values

    def held_out_loss(
        self,
        dataset: Dataset,
        device: torch.device,
        seen: ExpertTokens | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> tuple[float, int]:
        """(mean loss in nats per token, tokens) over the first train.eval_sequences of a held-out split.

        Args:
            seen: is told what the routers chose.
            alive: is called before each forward pass.
        """
        train, parallel = self.config.train, self.config.parallel
        assert train.micro_batch

        def forward(*batches: Batch) -> LossOutput:
            alive()
            parts = [self.part(batch) for batch in batches]
            loss = self._forward(parts)
            if seen:
                for number, part in enumerate(parts):
                    seen.add(part, self._choices(number))
            return loss

        self.engine.eval()
        first = range(min(train.eval_sequences, len(dataset)))
        loss, tokens = held_out_loss(
            forward, dataset, first, train.micro_batch, device, (self.where.dp, parallel.dp), at_once=parallel.stages
        )
        self.engine.train()
        if self.tap:
            self.tap.collect()
        return loss, tokens // parallel.tp  # tensor-parallel ranks counted the same ones

    def _forward(self, batches: Sequence[Batch]) -> LossOutput:
        if isinstance(self.engine, Pipeline):
            return pipeline_loss(self.engine, batches)
        (batch,) = batches
        return self.engine(batch)

    def _choices(self, number: int) -> list[Tensor]:
        """[S, k] of each MoE layer that this process holds, in one of the batches just evaluated."""
        if isinstance(self.engine, Pipeline):
            return [choice for stage in self.engine.stages for choice in stage.measured[number].choices]
        return self.tap.choices() if self.tap else []


def build_trainee(config: Config, device: torch.device, *, warm: bool = True) -> Trainee:
    """Build, fill and cut the model, and make the engine; the process group must exist.

    Args:
        warm: start from train.init_from, if it is set; not for a run that has a checkpoint.

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
    module.init_weights(config.run.seed)
    routers = fresh_routers(config.model)
    if warm and config.train.init_from:
        routers |= load_weights(module, config)
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
        for part in module if parallel.pp > 1 else [module]:
            for layer in part.model.layers:
                layer.compile(dynamic=False)
    engine = (Pipeline if parallel.pp > 1 else Engine)(module, config)
    tap = RouterTap(engine.module, config.model, mean) if config.model.is_moe and parallel.pp == 1 else None
    trainee = Trainee(config, engine, tap, where, list(choosers(module)), device)
    trainee.remember(routers)
    return trainee
