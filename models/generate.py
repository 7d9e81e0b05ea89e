"""Sample text from a model."""

from collections.abc import Sequence

import torch
from torch import nn

from .batch import Batch


@torch.no_grad()
def generate(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[list[int]]:
    """Continue each prompt. Returns the new tokens of each, without the stop token."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            ids = torch.tensor([tokens])
            batch = Batch(ids, ids, torch.arange(len(tokens))[None], None, torch.zeros(1, dtype=torch.long))
            logits = module.logits(batch)[0, -1].float()
            if temperature:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).item()
            else:
                token = logits.argmax().item()
            if token == stop_token:
                break
            tokens.append(token)
        results.append(tokens[len(prompt) :])
    return results
