"""Texts for a model to continue: through the tokenizer, the model, and back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from models.decoder.generate import generate
from trainer.processes import collectives

from .tokenizer import TokenizerProcess


class Prompts:
    """Texts that a language model is to go on from.

    Args:
        end: the token between documents: an empty prompt starts from it and a text ends at it.
    """

    def __init__(self, texts: Sequence[str], tokenizer: TokenizerProcess, end: int) -> None:
        self.texts, self._tokenizer, self._end = texts, tokenizer, end

    def continued(self, module: nn.Module, **how: Any) -> list[str]:
        """Each text with what the model adds to it; every process that holds a part of the model must call it.

        Args:
            how: of `models.decoder.generate.generate`, whose ConfigError it raises.
        """
        tokens = [self._tokenizer.encode(text) or [self._end] for text in self.texts]
        added = generate(module, tokens, stop_token=self._end, agree=_as_the_first, **how)
        return [self._tokenizer.continued(*each) for each in zip(self.texts, tokens, added, strict=True)]


def _as_the_first(tokens: list[int]) -> list[int]:
    """The first process's tokens: drawing different ones, processes would not end together, and wait for ever."""
    if not dist.is_initialized():
        return tokens
    told = torch.tensor(tokens, device=collectives.here())
    dist.broadcast(told, src=0)
    return told.tolist()
