"""Train a tiny model with sequence parallelism, for test_ulysses.py."""

from dataclasses import replace
from typing import Any

import torch
from engines import batch_of as plain_batch
from engines import tokens_on_device
from torch import distributed as dist

from configs import Config
from models.batch import Batch
from models.decoder.generate import generate
from models.families import build
from models.tasks.language_modelling import LanguageModelling
from models.tasks.learner import Learner
from trainer.checkpoint.save import take_snapshot
from trainer.engine.engine import Engine
from trainer.engine.parallel import place
from trainer.engine.ulysses import mean_over, sequence_group, share_sequences, split
from trainer.schedule import learning_rate
from trainer.step import micro_batches, outcome, train_step

PROMPTS = [[1, 2, 3], [4, 5]]


def batch_of(config: Config, indices: list[int]) -> Batch:
    """Sequences of two documents each, with different boundaries in every sequence."""
    batch = plain_batch(config, indices)
    places = batch.position_ids
    ends = torch.tensor([5 + index % (config.train.seq_len - 6) for index in indices])[:, None]
    return replace(batch, document_ids=(places >= ends).long(), position_ids=places - ends * (places >= ends))


def train(config: Config, steps: int) -> dict[str, Any]:
    """Run in every process of a team: its measurements, and its fragments of the final weights."""
    sp, here, group = config.parallel.sp, place(config, dist.get_rank()), sequence_group(config)
    module = build(config.model)
    module.init_weights(0)
    engine = Engine(module, config)
    share_sequences(module, group)
    batches, outcomes = micro_batches(config, 0, here.dp), []
    # DeepSpeed averages over dp * sp processes.
    seen = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"dp": dist.get_world_size(), "sp": 1})}
    )
    learner = Learner(LanguageModelling(seen), {"": module}, mean_over(group))
    for step in range(1, steps + 1):
        engine.set_learning_rate(learning_rate(step, 20, config.optim))
        mine = [split(batch_of(config, next(batches)), here.sp, sp) for _ in range(engine.accumulation)]
        values = train_step({"model": engine}, learner, mine, tokens_on_device(config, step), seen)
        outcomes.append(outcome(values.tolist(), learner.layout))
    engine.eval()
    with torch.no_grad():
        held_out = engine(split(batch_of(config, [1000, 1001]), here.sp, sp)).loss_sum
    dist.all_reduce(held_out, group=group)
    texts = generate(module, PROMPTS, max_new_tokens=8, temperature=0)
    return {"outcomes": outcomes, "held_out": held_out.item(), "texts": texts, "weights": take_snapshot(engine).tensors}


def train_all(configs: list[Config], steps: int) -> list[dict[str, Any]]:
    return [train(config, steps) for config in configs]
