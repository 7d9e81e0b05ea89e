"""Texts for a model to continue: encoded, continued by the model, and decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from models.decoder.generate import generate
from trainer.processes import collectives

from .tokenizer import TokenizerProcess


class Prompts:
    """Texts that a language model is to continue.

    Args:
        end: the end-of-text token: an empty prompt starts from it, and a continuation ends at it.
    """

    def __init__(self, texts: Sequence[str], tokenizer: TokenizerProcess, end: int) -> None:
        self.texts, self._tokenizer, self._end = texts, tokenizer, end

    def continued(self, module: nn.Module, **how: Any) -> list[str]:
        """Each text with the model's continuation; every process that holds a part of the model must call it.

        Args:
            how: arguments of `models.decoder.generate.generate`, whose ConfigError it raises.
        """
        tokens = [self._tokenizer.encode(text) or [self._end] for text in self.texts]
        added = generate(module, tokens, stop_token=self._end, agree=_as_the_first, **how)
        return [self._tokenizer.continued(*each) for each in zip(self.texts, tokens, added, strict=True)]


def _as_the_first(tokens: list[int]) -> list[int]:
    """Rank 0's tokens: with different samples, processes would not end together, and would wait for ever."""
    if not dist.is_initialized():
        return tokens
    told = torch.tensor(tokens, device=collectives.here())
    dist.broadcast(told, src=0)
    return told.tolist()
