"""Sample text from a model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from configs import ConfigError
from models.batch import Batch

from .attention import Cache
from .model import Decoder


@torch.no_grad()
def generate(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> list[list[int]]:
    """Continue each prompt (one token or more); all prompts at once, with a cache of keys and values.

    Args:
        temperature: 0: the most likely token.
        top_k: sample from this many most likely tokens; None: all.
        top_p: nucleus sampling: the smallest set of most likely tokens with this much probability (arXiv:1904.09751).
        seed: prompt i draws from a generator seeded with seed + i, whatever else is in the batch.
        agree: turns the tokens that this process drew, one per prompt, into those that all processes continue with; a
            model split over processes may round differently on each.

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        ConfigError: the model's logits are not finite.
    """
    assert all(prompts), "a prompt needs at least one token"
    device = next(module.parameters()).device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    results: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = Cache(padding)
    was_training = module.training
    module.eval()
    for _ in range(max_new_tokens):
        with _uncompiled(module):
            logits_BV = _next_logits(module, ids, padding, cache).float().cpu()
        if not logits_BV.amax(-1).isfinite().all():
            module.train(was_training)
            raise ConfigError(
                f"the model's logits are not finite after {ids.shape[1]} tokens, so no token can be sampled: its "
                "weights are too large, or a key of model.* is wrong, such as rope_theta or norm_eps"
            )
        drawn = [_sample(row, g, temperature, top_k, top_p) for row, g in zip(logits_BV, generators, strict=True)]
        tokens = agree(drawn)
        for row in tuple(open_rows):
            if tokens[row] == stop_token:
                open_rows.remove(row)
            else:
                results[row].append(tokens[row])
        if not open_rows:
            break
        ids = torch.cat([ids, torch.tensor(tokens, device=device)[:, None]], dim=1)
    module.train(was_training)
    return results


def _uncompiled(module: nn.Module) -> AbstractContextManager[Any]:
    """Use uncompiled layers: those compiled for training would be recompiled for every length."""
    if any(part._compiled_call_impl is not None for part in module.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _next_logits(module: nn.Module, ids: Tensor, padding: Tensor, cache: Cache) -> Tensor:
    """[B, V] after the last column of ids [B, T]. A family without a cache recomputes all columns."""
    first = cache.length if isinstance(module, Decoder) else 0
    ids_BT = ids[:, first:]
    place_BT = (torch.arange(first, ids.shape[1], device=ids.device) - padding[:, None]).clamp(min=0)
    zeros = torch.zeros_like(padding)
    if isinstance(module, Decoder):
        return module.logits(Batch(ids_BT, ids_BT, place_BT, None, zeros), cache)[:, -1]
    # The padding is a document of its own, so that no token attends to it.
    documents = (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long()
    logits: Callable[[Batch], Tensor] = module.logits  # type: ignore[assignment]
    return logits(Batch(ids_BT, ids_BT, place_BT, documents, zeros))[:, -1]


def _sample(logits_V: Tensor, generator: torch.Generator, temperature: float, top_k: int | None, top_p: float) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))
    p_V = (logits_V / temperature).softmax(-1)
    if top_p < 1:
        sorted_p, order = p_V.sort(descending=True)
        p_V[order[sorted_p.cumsum(-1) - sorted_p >= top_p]] = 0
    return int(torch.multinomial(p_V, 1, generator=generator))
