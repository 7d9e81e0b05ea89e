"""One evaluation of a run: the held-out loss, which tokens each expert took, texts; all of it in its folder."""

import time
from pathlib import Path

from models.tasks.language_modelling import LanguageModelling
from trainer.data.kinds import ExampleReader
from trainer.data.tokenizer.kept import tokenizer_of
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.health.watchdog import Beat
from trainer.processes.device import device
from trainer.record.lines import Record
from trainer.trainee import Trainee

from .expert_tokens import ExpertTokens, table, write_table
from .held_out import if_there_is_room, write_samples


def evaluate(
    run_dir: Path, trainee: Trainee, held_out: ExampleReader, step: int, record: Record | None, beat: Beat
) -> None:
    """Evaluate between two steps, in every process; rank 0 keeps what comes of it. A collective."""
    start, config, samples = time.perf_counter(), trainee.config, run_dir / "samples"
    task, seen = trainee.learner.task, None
    if isinstance(task, LanguageModelling) and config.model.is_moe:
        seen = ExpertTokens(config, trainee.where, [chooser.layer for chooser in task.choosers])
    loss, weight, more = trainee.held_out_loss(held_out, device(), seen, lambda: beat(step, "evaluation"))
    if record:
        found = {f"eval_{name}": value for name, value in more.items()}
        record.metrics({"step": step, "eval_loss": loss, f"eval_{task.counts[1]}": weight} | found)
    if seen and (pieces := seen.gather()):
        with TokenizerProcess(tokenizer_of(run_dir, config.data)[0], config.data.limits) as tokenizer:
            found = table(pieces, config, tokenizer, step)
        path = samples / f"experts-step-{step:08d}"
        with if_there_is_room(record, path):
            write_table(found, path)
    # A pipeline's stages have no whole model to sample from: `muster generate` has, from a checkpoint.
    if isinstance(task, LanguageModelling) and config.train.sample_tokens and config.parallel.pp == 1:
        sample = samples / f"step-{step:08d}.txt"
        trainee.engine.eval()
        folder, info = tokenizer_of(run_dir, config.data)
        with TokenizerProcess(folder, config.data.limits) as tokenizer, if_there_is_room(record, sample):
            write_samples(trainee.engine.module, config, tokenizer, info.eos_id, sample, write=record is not None)
        trainee.engine.train()
    if record:
        record.event("evaluation", step=step, eval_loss=loss, eval_weight=weight, seconds=time.perf_counter() - start)
