"""One evaluation of a run: held-out loss, the tokens each expert takes, and samples, written to the run's folder."""

import time
from pathlib import Path

import torch

from models.tasks.samples import Sample
from trainer.data.kinds import ExampleReader, kind_of
from trainer.data.tokenizer.kept import tokenizer_of
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.health.watchdog import Beat
from trainer.processes.device import device
from trainer.record.lines import Record
from trainer.trainee import Trainee

from .expert_tokens import ExpertTokens, table, write_table
from .held_out import if_there_is_room
from .samples import write_sample


def evaluate(
    run_dir: Path, trainee: Trainee, held_out: ExampleReader, step: int, record: Record | None, beat: Beat
) -> float:
    """Evaluate between two steps. A collective: every process takes part, rank 0 writes the results.

    Returns:
        The held-out loss of the weights that are trained, the same in every process.
    """
    start, config, folder = time.perf_counter(), trainee.config, run_dir / "samples"
    task, files = trainee.learner.task, []
    seen = None if task.routed is None else ExpertTokens(config, trainee.where, task)
    loss, weight, more = trainee.held_out_loss(held_out, device(), seen, lambda: beat(step, "evaluation"))
    averaged = {}
    if trainee.has_ema:
        with trainee.averaged():
            ema_loss, _, more_of_ema = trainee.held_out_loss(held_out, device(), None, lambda: beat(step, "evaluation"))
        averaged = {f"eval_{name}_ema": value for name, value in ({"loss": ema_loss} | more_of_ema).items()}
    if record:
        found = {f"eval_{name}": value for name, value in more.items()}
        record.metrics({"step": step, "eval_loss": loss, f"eval_{task.counts[1]}": weight} | found | averaged)
    if seen and (pieces := seen.gather()):
        with TokenizerProcess(tokenizer_of(run_dir, config.data)[0], config.data.limits) as tokenizer:
            found = table(pieces, config, tokenizer, step)
        path = folder / f"experts-step-{step:08d}"
        with if_there_is_room(record, path):
            files += write_table(found, path)
    if task.draws:
        sample, path = _drawn(run_dir, trainee, held_out), folder / f"step-{step:08d}"
        if record:
            with if_there_is_room(record, path):
                files.append(write_sample(sample, path))
    if record:
        names, seconds = [file.name for file in files], time.perf_counter() - start
        record.event("evaluation", step=step, eval_loss=loss, eval_weight=weight, seconds=seconds, files=names)
    return loss


@torch.no_grad()
def _drawn(run_dir: Path, trainee: Trainee, held_out: ExampleReader) -> Sample:
    """`Task.samples` with the EMA weights, where there are any, computed identically by every process: ZeRO-3 gathers
    weights collectively."""
    engines, config = trainee.engines, trainee.config
    for engine in engines.values():
        engine.eval()
    with trainee.averaged(), kind_of(config).shown(run_dir, config, held_out) as batch:
        sample = trainee.learner.task.samples({name: engine.module for name, engine in engines.items()}, batch)
    for engine in engines.values():
        engine.train()
    return sample
