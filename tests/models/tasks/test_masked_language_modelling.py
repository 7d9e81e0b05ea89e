"""Hidden tokens: which, how many, the same in any split of a batch; and what is measured of the guesses."""

import math

import pytest
import torch
from torch.nn import functional as F

from configs import ConfigError, from_dict
from configs.sections.pairs import check_pair
from models.batch import Batch
from models.flops import counted_flops
from models.loss import IGNORE
from models.tasks.masked_language_modelling import masked, most_chosen
from models.tasks.table import reads, task_of

VOCABULARY, END, MASK = 50, 0, 50


def plain(rows=64, length=100, first=0) -> Batch:
    """Random tokens; the second row ends after 20 tokens, the third is all padding."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=draw)
    tokens[1, 20:] = tokens[2:3] = END
    ids = torch.arange(first, first + rows)
    ids[2:3] = -1
    return Batch(tokens, tokens, torch.arange(length).expand(rows, -1), None, ids)


def hidden(batch: Batch, rate=0.15, seed=0, use="mask") -> Batch:
    return masked(batch, rate, VOCABULARY, END, seed, use)


def test_of_every_sequence_a_fixed_share_is_hidden():
    batch = plain()
    found = hidden(batch)
    chosen = found.labels != IGNORE
    assert chosen.sum(1).tolist() == [15, 3, 0, *[15] * 61]
    assert not (chosen & (batch.input_ids == END)).any()
    assert torch.equal(found.labels[chosen], batch.input_ids[chosen])
    assert torch.equal(found.input_ids[~chosen], batch.input_ids[~chosen])
    assert found.weight() == 62 * 15 + 3
    whole = hidden(plain(2000, 50), 0.4)
    chosen = whole.labels != IGNORE
    seen, was = whole.input_ids[chosen], whole.labels[chosen]
    assert (seen == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (seen == was).float().mean().item() == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.01)
    assert seen.max() == MASK
    # Every place, and every token in place of another, is as likely as the others.
    assert (chosen.float().mean(0) - 0.4).abs().max() < 0.05
    others = seen[(seen != MASK) & (seen != was)]
    assert torch.bincount(others, minlength=VOCABULARY)[1:].float().std() < 0.2 * len(others) / VOCABULARY


@pytest.mark.parametrize(("rate", "length"), [(0.034, 1250), (0.045, 1300), (0.051, 2500), (0.15, 100)])
def test_no_more_are_hidden_than_a_task_predicts(rate, length):
    """The first three products are halves, just above which fp32 lies."""
    first = hidden(plain(3, length), rate).labels[0]
    assert int((first != IGNORE).sum()) == most_chosen(rate, length)


def test_they_are_a_function_of_seed_example_and_use():
    batch = plain()
    whole, parts = hidden(batch), []
    for first in range(0, 64, 16):
        rows = {name: each[first : first + 16] for name, each in batch.tensors().items()}
        parts.append(hidden(Batch(document_ids=None, **rows)))
    assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
    for other in (hidden(batch, seed=1), hidden(batch, use="held-out mask"), hidden(plain(first=64))):
        assert ((other.labels != IGNORE) == (whole.labels != IGNORE)).float().mean() < 0.9


def config(**train):
    model = {
        "family": "encoder",
        "vocab_size": 64,
        "max_positions": 100,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
    }
    return from_dict({"model": model, "train": {"seq_len": 100, **train}})


def test_loss_and_metrics_are_those_of_the_hidden_tokens_in_any_split():
    task, batch = task_of(config()), hidden(plain())
    logits = torch.randn(64, 100, 64, generator=torch.Generator().manual_seed(1))
    logits += 3 * F.one_hot(plain().input_ids, 64)
    chosen = batch.labels != IGNORE
    losses = F.cross_entropy(logits[chosen], batch.labels[chosen], reduction="none")
    for size in (64, 16, 1):
        total, weight, extra = 0.0, 0, {"right": 0.0, "nats": 0.0}
        for first in range(0, 64, size):
            rows = slice(first, first + size)
            cut = Batch(document_ids=None, **{name: each[rows] for name, each in batch.tensors().items()})
            nets = {
                "model": lambda _, keys, places, rows=rows: logits[rows].gather(1, places[..., None].expand(-1, -1, 64))
            }
            sums = task.evaluate(nets, cut)
            total, weight = total + sums.loss.item(), weight + int(sums.weight)
            assert int(sums.weight) == cut.weight()
            extra = {name: value + sums.extra[name].item() for name, value in extra.items()}
        found = task.metrics(extra, weight)
        assert (total, weight) == (pytest.approx(losses.sum().item(), rel=1e-5), 62 * 15 + 3)
        assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        right = (logits[chosen].argmax(1) == batch.labels[chosen]).float().mean().item()
        assert found["accuracy"] == pytest.approx(right)
        assert 0.2 < found["accuracy"] < 0.99


def test_flops_are_those_of_the_layers_and_of_the_head_at_hidden_tokens():
    own, (length, size, inner, places) = config(), (100, 32, 128, 15)
    layer = 4 * size * size + 2 * size * inner + 2 * length * size
    head = size * size + size * 64
    assert counted_flops(own, plain(2)) == 3 * 2 * (2 * length * layer + places * head)


def test_what_fits():
    assert reads(config()) == "masked tokens"
    assert task_of(config()).counts == (15, "masked_tokens")
    with pytest.raises(ConfigError, match=r"from tokens to logits of tokens, .* set task=language_modelling or"):
        check_pair(from_dict({"model": {"vocab_size": 64}, "task": "masked_language_modelling"}))
    with pytest.raises(ConfigError, match=r"train\.mask_rate"):
        config(mask_rate=1.0)
