"""Pipeline parallelism: DeepSpeed's pipeline engine over the stages of a plain decoder, with the trainer's own step."""

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from configs import Config, ConfigError
from configs.stages import stages_of_rank
from models.batch import Batch
from models.decoder.model import Decoder
from models.decoder.stages import PlainNames, Stage, Stages
from models.loss import LossOutput
from trainer.step import NO_RIDERS, loss_factor, measured

from . import private
from .engine import Engine
from .parallel import place
from .private import DualPipeVModule, PipelineModule
from .settings import engine_config


class OneStage(PlainNames, PipelineModule):
    """DeepSpeed's pipeline with one stage per rank, on the 1F1B (one forward, one backward) schedule."""


class TwoStages(PlainNames, DualPipeVModule):
    """DeepSpeed's V-shaped pipeline (DualPipeV): two stages per rank; the first rank holds the first and last stage."""


def cut(module: nn.Module, config: Config) -> Stages:
    """This process's stages of a whole module on the meta device.

    Raises:
        ConfigError: the model's family cannot be split into stages.
    """
    if not isinstance(module, Decoder):
        raise ConfigError(
            f"parallel.pp={config.parallel.pp}: only model.family=decoder can be split into pipeline stages, not "
            f"{config.model.family}: set parallel.pp=1"
        )
    parallel = config.parallel
    held = stages_of_rank(parallel, place(config, dist.get_rank()).pp)
    # A stage takes over a module's parts, so each gets a copy.
    return Stages(Stage(copy.deepcopy(module), index, parallel.stages) for index in held)


class Pipeline(Engine):
    """An engine over this process's stages of a network; all its micro-batches go through them in one call."""

    def _for_deepspeed(self, module: nn.Module, config: Config) -> tuple[nn.Module, dict[str, Any]]:
        assert isinstance(module, Stages)
        parallel, held = config.parallel, {stage.index: stage for stage in module}
        settings = engine_config(config)
        if parallel.ep > 1:
            settings["expert_parallel"]["moe_layer_pattern"] = (
                rf"(?:{'|'.join(map(str, held))})\." + settings["expert_parallel"]["moe_layer_pattern"]
            )
        kind = TwoStages if parallel.pp_schedule == "dualpipev" else OneStage
        # One module per stage. DeepSpeed builds only this rank's own, so the others may be None.
        layers = [held.get(index) for index in range(parallel.stages)]
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds, topology and partition
            return kind(layers, num_stages=parallel.pp, partition_method="uniform"), settings

    @property
    def stages(self) -> list[Stage]:
        """The stages that this process runs, in the order of layers."""
        return [part for part in self.module.children() if isinstance(part, Stage)]

    def train_step(self, batches: Sequence[Batch]) -> None:
        """Forward and backward over a step's micro-batches, already fed to the stages, and the optimizer update."""
        self.deepspeed.train_batch(_inputs(batches))

    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Forward over micro-batches already fed to the stages, without gradients; then back to training mode."""
        private.evaluate(self.deepspeed, _inputs(batches), len(batches))
        self.train()


def pipeline_step(
    engine: Pipeline, batches: Sequence[Batch], tokens: Tensor, config: Config, riders: Sequence[float] = NO_RIDERS
) -> Tensor:
    """Launch one optimizer step, as `step.train_step` does.

    Args:
        batches: this data-parallel rank's micro-batches, the same on all its stages; at least as many as stages if a
            rank holds two.
        tokens, riders: as in `step.train_step`.
    """
    stages, dp, accumulate = engine.stages, config.parallel.dp, len(batches)
    # DeepSpeed divides the last stage's loss by a process's micro-batches, and averages over data-parallel ranks.
    factor = loss_factor(tokens, accumulate * dp)
    for stage in stages:
        stage.feed(batches, loss_factor=factor, balance_factor=1 / accumulate)
    engine.train_step(batches)
    return measured([engine], _sums(stages, accumulate * dp), tokens, riders, config)


def pipeline_loss(engine: Pipeline, batches: Sequence[Batch]) -> LossOutput:
    """Evaluate this data-parallel rank's batches, all of the same shape as in training, without gradients.

    Args:
        batches: at least as many as stages if a rank holds two.

    Returns:
        their loss and tokens on the last stage's rank, zeros on all others: the sum over all processes is the total.
    """
    stages = engine.stages
    for stage in stages:
        stage.feed(batches)
    engine.evaluate(batches)
    zero = LossOutput(torch.zeros((), device=engine.device), torch.zeros((), dtype=torch.int64, device=engine.device))
    found = [measured.loss or zero for stage in stages for measured in stage.measured]
    return LossOutput(*(torch.stack(values).sum() for values in zip(*found, strict=True)))


def _inputs(batches: Sequence[Batch]) -> Any:
    """What DeepSpeed reads on the first and the last stage; the stages themselves already have their micro-batches."""
    return iter([(batch.input_ids, batch.labels) for batch in batches])


def _sums(stages: Sequence[Stage], micro_batches: int) -> Tensor:
    """This process's part of the sums that `step.packed` makes over all micro-batches, in float64.

    Args:
        stages: this process's stages.
        micro_batches: number in the whole step; the router's values are means over them.
    """
    device, moe_layers = next(stages[0].parameters()).device, stages[0].moe_layers
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    layers = torch.zeros(len(moe_layers), stages[0].config.num_experts + 3, dtype=torch.float64, device=device)
    for stage in stages:
        own = [moe_layers.index(i) for i in stage.own_moe_layers]
        for loss, router, _ in stage.measured:
            if loss is not None:
                sums[0] += loss.loss_sum
            if router is not None:
                share = len(own) / len(moe_layers) / micro_batches
                sums[1] += router.aux_loss * share
                sums[2] += router.z_loss * share
                for row, values in zip(own, router.by_layer() / micro_batches, strict=True):
                    layers[row] += values
    return torch.cat([sums, layers.flatten()]) if moe_layers else sums[:1]
