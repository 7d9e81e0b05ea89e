"""Train a tiny model on the fixed batches of `engines`, cut into pipeline stages."""

import torch
from engines import batch_of, tokens_on_device
from torch import distributed as dist

from configs import Config
from models.families import build
from models.tasks.language_modelling import router_extra
from trainer.checkpoint.save import take_snapshot
from trainer.engine.parallel import place
from trainer.engine.pipeline import Pipeline, cut, pipeline_loss, pipeline_step
from trainer.schedule import learning_rate
from trainer.step import StepOutcome, micro_batches, outcome


class PipelineRun:
    """A pipeline engine, in this process group, and the steps it takes."""

    def __init__(self, config: Config):
        self.config = config
        self.dp = place(config, dist.get_rank()).dp
        with torch.device("meta"):
            module = build(config.model)
        stages = cut(module, config).to_empty(device="cpu")
        stages.init_weights(0)
        stages.set_activation_checkpointing(config.train.recompute_every)
        self.engine = Pipeline(stages, config)

    def steps(self, first: int, last: int) -> list[StepOutcome]:
        config, outcomes = self.config, []
        batches = micro_batches(config, (first - 1) * config.train.global_batch, self.dp)
        for step in range(first, last + 1):
            mine = [batch_of(config, next(batches)) for _ in range(self.engine.accumulation)]
            self.engine.set_learning_rate(learning_rate(step, 20, config.optim))
            values = pipeline_step(self.engine, mine, tokens_on_device(config, step), config)
            outcomes.append(outcome(values.tolist(), router_extra(config.model)))
        return outcomes

    def fragments(self) -> dict[str, torch.Tensor]:
        return take_snapshot(self.engine).tensors


def pipeline_losses(configs: list[Config], steps: int) -> list[tuple[list[StepOutcome], dict[str, torch.Tensor]]]:
    """[(outcomes, this process's fragments)], for several configs one after another."""
    runs = []
    for config in configs:
        run = PipelineRun(config)
        runs.append((run.steps(1, steps), run.fragments()))
    return runs


def pipeline_skips(config: Config, where: str) -> tuple[dict, StepOutcome, dict, StepOutcome]:
    """Two steps, then one with an infinite loss, or with a NaN gradient on the first stage only, then a good one.

    Returns:
        (fragments before, outcome of the bad step, fragments after, outcome of the step after it).
    """
    run = PipelineRun(config)
    run.steps(1, 2)
    before, handles = run.fragments(), []
    for stage in run.engine.stages:
        if where == "loss" and stage.last:
            handles.append(stage.model.norm.register_forward_hook(lambda module, args, out: out * torch.inf))
        elif where == "gradient" and stage.first:
            weight = stage.model.layers[0].self_attn.o_proj.weight
            handles.append(weight.register_hook(lambda gradient: gradient * torch.nan))
    (bad,) = run.steps(3, 3)
    for handle in handles:
        handle.remove()
    return before, bad, run.fragments(), run.steps(4, 4)[0]


def pipeline_evaluation(config: Config) -> tuple[list[float], dict, dict, list[StepOutcome]]:
    """Evaluate eight sequences before, between and after training steps; gradients and weights stay unchanged.

    Returns:
        ([loss, tokens] before any step, summed over all processes; fragments before and after an evaluation; the
        outcomes of the training steps around it).
    """
    run = PipelineRun(config)
    size = config.train.micro_batch
    mine = [list(range(i, i + size)) for i in range(run.dp * size, 8, size * config.parallel.dp)]
    batches = [batch_of(config, indices) for indices in mine]

    def evaluate() -> list[float]:
        sums = torch.stack([value.double() for value in pipeline_loss(run.engine, batches)])
        dist.all_reduce(sums)
        return sums.tolist()

    found = evaluate()
    outcomes, before = run.steps(1, 2), run.fragments()
    evaluate()
    return found, before, run.fragments(), outcomes + run.steps(3, 4)
