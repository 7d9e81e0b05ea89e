"""Sequence to sequence: the loss of target tokens, and scores that are sacrebleu's however a corpus is split."""

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from torch.nn import functional as F

from configs import ConfigError, from_dict
from models.batch import PairBatch
from models.tasks.sequence_to_sequence import _summed
from models.tasks.table import reads, task_of

END = 0
TARGETS = ["the cat sat on the mat", "a dog barks at the red door", "nothing at all", "it rained"]
FOUND = ["the cat is on the mat", "a dog barked at a red door", "", "it rained"]


def task(**train):
    return task_of(from_dict({"model": {"family": "encoder_decoder", "vocab_size": 8}, "train": train}))


class Fixed:
    """A network that gives the same logits at every place of a target, and writes 3, 4 and the end."""

    def __init__(self) -> None:
        self.logits_V = torch.arange(8.0) / 4

    def __call__(self, source, mask, target, keys):
        return self.logits_V.expand(*target.shape, 8)

    def begin(self, source, mask):
        return (torch.zeros(len(source), dtype=torch.long),)

    def step(self, tokens, state):
        written = torch.tensor([3, 4, END])[state[0].clamp(max=2)]
        return F.one_hot(written, 8) * 9.0, (state[0] + 1,)


def batch() -> PairBatch:
    labels = torch.tensor([[3, 4, END], [5, END, -100], [-100, -100, -100]])
    source = torch.tensor([[6, 7, END], [6, END, END], [END, END, END]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    inputs = torch.tensor([[END, 3, 4], [END, 5, END], [END, END, END]])
    decode = lambda rows: [" ".join(map(str, row)) for row in rows]  # noqa: E731
    return PairBatch(source, mask, inputs, labels, torch.tensor([4, 7, -1]), decode)


def test_the_loss_is_that_of_its_tokens():
    net, sums = Fixed(), task(label_smoothing=0.1).loss({"model": Fixed()}, batch(), "model")
    log_p = net.logits_V.log_softmax(0)
    expected = sum(-0.9 * log_p[token] - 0.1 * log_p.mean() for token in (3, 4, END, 5, END))
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.weight == 5 == batch().weight()


def test_an_evaluation_counts_what_was_found():
    tried = task(sample_tokens=5, label_smoothing=0.1)
    sums = tried.evaluate({"model": Fixed()}, batch())
    log_p = Fixed().logits_V.log_softmax(0)
    assert sums.loss.item() == pytest.approx(-sum(log_p[t] for t in (3, 4, END, 5, END)).item(), rel=1e-6)
    metrics = tried.metrics({name: value.tolist() for name, value in sums.extra.items()}, 5)
    assert (metrics["accuracy"], metrics["exact"]) == (0.0, 0.5)
    assert metrics["bleu"] == pytest.approx(BLEU().corpus_score(["3 4", "3 4"], [["3 4", "5"]]).score)
    table = tried.samples({"model": Fixed()}, batch())
    assert list(table.columns) == ["example", "source", "target", "found"]
    assert table.rows[:2] == [(4, "6 7", "3 4", "3 4"), (7, "6", "5", "3 4")]


@pytest.mark.parametrize("split", [4, 2, 1])
def test_scores_are_sacrebleus_however_the_corpus_is_split(split):
    pairs = list(zip(FOUND, TARGETS, strict=True))
    parts = [pairs[start : start + split] for start in range(0, 4, split)]
    extra = {name: sum(_summed(name, part) for part in parts).tolist() for name in ("bleu", "chrf")}
    metrics = task().metrics(extra | {"right": 0, "exact": [1, 4]}, 4)
    assert metrics["bleu"] == pytest.approx(BLEU().corpus_score(FOUND, [TARGETS]).score, abs=1e-9)
    assert metrics["chrf"] == pytest.approx(CHRF().corpus_score(FOUND, [TARGETS]).score, abs=1e-9)
    assert 10 < metrics["bleu"] < 90


def test_without_sacrebleu_a_run_says_so(monkeypatch):
    monkeypatch.setattr("models.tasks.sequence_to_sequence.find_spec", lambda name: None)
    config = from_dict({"model": {"family": "encoder_decoder"}, "data": {"path": "x.parquet"}})
    with pytest.raises(ConfigError, match=r"pip install 'muster-train\[families\]'`, or set train\.sample_tokens=0"):
        reads(config)
    assert reads(config.model_copy(update={"train": config.train.model_copy(update={"sample_tokens": 0})})) == "pairs"
