"""Generation with a cache equals generation without one; prompts do not touch each other."""

import pytest
import tiny_models as tiny
import torch

from configs import BlockSparse
from models.batch import Batch
from models.decoder.generate import generate

PROMPTS = [[5], [7, 8, 9, 10, 11], [1, 2, 3]]


def greedy_without_cache(module, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        ids = torch.tensor([tokens])
        logits = module.logits(Batch(ids, ids, torch.arange(len(tokens))[None], None, torch.zeros(1).long()))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


PATTERNS = [{}, {"sliding_window": 4}, {"block_sparse": BlockSparse(block=2, local_blocks=2, stride=4)}]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_experts", [0, 4])
def test_greedy_equals_uncached(pattern, num_experts):
    module = tiny.model(tiny.config(num_experts=num_experts, dropout=0.5, **pattern)).train()
    found = generate(module, PROMPTS, max_new_tokens=12, temperature=0)
    assert module.training
    module.eval()
    assert found == [greedy_without_cache(module, prompt, 12) for prompt in PROMPTS]


def test_sampling():
    module = tiny.model(tiny.config())
    batch = generate(module, PROMPTS, max_new_tokens=8, seed=3)
    assert batch == generate(module, PROMPTS, max_new_tokens=8, seed=3)
    assert batch != generate(module, PROMPTS, max_new_tokens=8, seed=4)
    assert batch[1] == generate(module, PROMPTS[1:2], max_new_tokens=8, seed=4)[0]
    greedy = generate(module, PROMPTS, max_new_tokens=8, temperature=0)
    assert generate(module, PROMPTS, max_new_tokens=8, top_k=1) == greedy
    assert generate(module, PROMPTS, max_new_tokens=8, top_p=1e-6) == greedy


def test_stop_token():
    module = tiny.model(tiny.config())
    greedy = generate(module, PROMPTS, max_new_tokens=8, temperature=0)
    stop = greedy[0][3]
    stopped = generate(module, PROMPTS, max_new_tokens=8, temperature=0, stop_token=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in greedy]
