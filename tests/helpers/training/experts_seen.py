"""What the processes of a team see of the experts at an evaluation, for test_experts_seen.py."""

import torch

from configs import Config
from trainer.data.read.reader import Dataset
from trainer.observe import expert_tokens
from trainer.observe.expert_tokens import ExpertTokens
from trainer.trainee import build_trainee


def seen_pieces(config: Config) -> list[expert_tokens.Piece] | None:
    trainee = build_trainee(config, torch.device("cpu"))
    seen = ExpertTokens(config, trainee.where, trainee.learner.task)
    trainee.held_out_loss(Dataset(config.data, config.train.seq_len, 0, split="held_out"), torch.device("cpu"), seen)
    return seen.gather()
