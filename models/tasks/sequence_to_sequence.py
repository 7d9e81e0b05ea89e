"""Sequence to sequence: the target that belongs to a source, by the cross-entropy of its tokens."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs import Config, ConfigError
from configs.sections.pairs import TASK_ENDS
from models.batch import PairBatch
from models.loss import IGNORE
from models.noise import dropout_keys_of
from models.sequence.search import search

from .samples import Table
from .task import Modules, Nets, Sums, Task, Value


class SequenceToSequence(Task):
    """Predicts each token of a target from the source and the tokens before it. Evaluations measure the loss without
    label smoothing, and write the targets themselves, unless train.sample_tokens is 0. Recorded besides: `accuracy` of
    tokens; of an evaluation `exact`, the share of targets that were found as they are, `bleu` and `chrf` (sacrebleu's,
    of 100)."""

    takes, gives = TASK_ENDS["sequence_to_sequence"]
    reads, example = "pairs", "pairs"

    @classmethod
    def kind(cls, config: Config) -> str:
        """`reads`. Raises ConfigError if sacrebleu is needed and not installed."""
        if config.train.sample_tokens and not find_spec("sacrebleu"):
            raise ConfigError(
                f"task={config.task} measures BLEU and chrF with sacrebleu, which is not installed: `pip install "
                "'muster-train[families]'`, or set train.sample_tokens=0"
            )
        return cls.reads

    @property
    def counts(self) -> tuple[int, str]:
        return 0, "tokens"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Target tokens that were found to be the likeliest."""
        return {"right": ()}

    def loss(self, nets: Nets, batch: PairBatch, phase: str) -> Sums:
        keys = dropout_keys_of(self.config.run.seed, batch.example_ids)
        return self._compared(nets[phase], batch, keys, self.config.train.label_smoothing)

    def evaluate(self, nets: Nets, batch: PairBatch) -> Sums:
        sums = self._compared(nets["model"], batch, None, 0.0)
        if not self.draws:
            return sums
        _, targets, found = self._found(nets["model"], batch)
        real = (batch.example_ids >= 0).tolist()
        pairs = [pair for pair, counts in zip(zip(found, targets, strict=True), real, strict=True) if counts]
        scores = {name: _summed(name, pairs) for name in ("bleu", "chrf")}
        scores["exact"] = torch.tensor([float(sum(f == t for f, t in pairs)), len(pairs)])
        return sums._replace(extra={**sums.extra, **{k: v.to(sums.loss.device) for k, v in scores.items()}})

    def _compared(self, net: Any, batch: PairBatch, keys: Tensor | None, smoothing: float) -> Sums:
        found = net(batch.source_ids, batch.source_mask, batch.input_ids, keys)
        found, penalty = found if isinstance(found, tuple) else (found, None)  # experts have a loss of their own
        logits, labels = found.float().flatten(0, 1), batch.labels.flatten()
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE, label_smoothing=smoothing)
        return Sums(loss, (labels != IGNORE).sum(), {"right": (logits.argmax(1) == labels).sum()}, penalty)

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        found = {"accuracy": extra["right"] / max(weight, 1)}
        if "exact" in extra:
            right, pairs = extra["exact"]
            found["exact"] = right / max(pairs, 1)
            found |= {name: _score(name, extra[name]) for name in ("bleu", "chrf")}
        return found

    @property
    def draws(self) -> bool:
        return self.config.train.sample_tokens > 0

    def samples(self, nets: Modules, batch: PairBatch) -> Table:
        rows = zip(batch.example_ids.tolist(), *self._found(nets["model"], batch), strict=True)
        return Table(["example", "source", "target", "found"], list(rows))

    def _found(self, net: Any, batch: PairBatch) -> tuple[list[str], list[str], list[str]]:
        """(sources, targets, targets that the network writes) of a held-out batch."""
        train, end = self.config.train, int(batch.input_ids[0, 0])
        # Under ZeRO-3 each step gathers weights from all processes, which therefore take equally many.
        found = search(
            getattr(net, "module", net), batch.source_ids, batch.source_mask, end,
            beams=train.sample_beams, most=train.sample_tokens, stops=self.config.parallel.zero_stage < 3,
        )  # fmt: skip
        pairs = zip(batch.source_ids.tolist(), batch.source_mask.sum(1).tolist(), strict=True)
        sources = [row[: length - 1] for row, length in pairs]
        targets = [[token for token in row if token != IGNORE][:-1] for row in batch.labels.tolist()]
        assert batch.decode is not None
        texts = batch.decode([*sources, *targets, *found])
        count = len(found)
        return texts[:count], texts[count : 2 * count], texts[2 * count :]


@cache
def _metric(name: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF  # an optional package

    return BLEU() if name == "bleu" else CHRF()


def _summed(name: str, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """The counts of n-grams that a corpus's score is computed from, summed over pairs (found, target)."""
    metric = _metric(name)
    # A pair that adds nothing to any count, so that there is always one.
    found, targets = zip(("", ""), *pairs, strict=True)
    counts = metric._extract_corpus_statistics(list(found), [list(targets)])
    return torch.tensor(counts, dtype=torch.float64).sum(0)


def _score(name: str, counts: Sequence[float]) -> float:
    return _metric(name)._aggregate_and_compute([[round(each) for each in counts]]).score
