"""Masked language modelling (BERT, arXiv:1810.04805): tokens that were hidden, predicted from those on both sides."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.sections.pairs import TASK_ENDS
from models.batch import Batch
from models.loss import IGNORE
from models.noise import dropout_keys_of, uniform

from .samples import Text
from .task import Modules, Nets, Sums, Task, Value

MASKED, RANDOM = 0.8, 0.1
"""Of the chosen tokens, the share that is masked, and the share that is replaced by a random token; the others are left
as they are (section 3.1)."""


def most_chosen(rate: float, length: int) -> int:
    """Tokens that are chosen of a sequence whose every token may be."""
    return max(1, round(rate * length))


def masked(batch: Batch, rate: float, vocabulary: int, end: int, seed: int, use: str) -> Batch:
    """The batch with some tokens hidden, which are its labels: a function of (seed, example, use).

    Args:
        rate: share of a sequence's tokens that are chosen, at least one; end-of-text and padding never are.
        vocabulary: the number of tokens; the mask's id is the next.
        end: id of the end-of-text token, which also pads.
    """
    tokens, length = batch.input_ids, batch.input_ids.shape[1]
    lots, what, which = (
        uniform(seed, batch.example_ids, f"{use}/{name}", (length,)) for name in ("choice", "what", "which")
    )
    free = tokens != end
    # In float64, as `most_chosen`: in fp32 some products would round to one more.
    count = (rate * free.sum(1, keepdim=True).double()).round().clamp(min=1)
    rank = lots.masked_fill(~free, 2.0).argsort(dim=1, stable=True).argsort(1)
    chosen = free & (rank < count)
    other = (which.double() * vocabulary).long()
    hidden = torch.where(what < MASKED, vocabulary, torch.where(what < MASKED + RANDOM, other, tokens))
    return replace(batch, input_ids=hidden.where(chosen, tokens), labels=tokens.where(chosen, IGNORE))


class MaskedLanguageModelling(Task):
    """The hidden tokens, by cross-entropy in nats. Its reader hides them (`masked`), so that a batch knows its weight.
    A network is called with a batch, dropout's keys and the places whose logits it gives. Recorded besides: `accuracy`
    and `perplexity`."""

    takes, gives = TASK_ENDS["masked_language_modelling"]
    reads = "masked tokens"
    example = "sequences"

    @property
    def _most(self) -> int:
        return most_chosen(self.config.train.mask_rate, self.config.train.seq_len)

    @property
    def counts(self) -> tuple[int, str]:
        return self._most, "masked_tokens"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Tokens found, and the sum of the losses."""
        return {"right": (), "nats": ()}

    def loss(self, nets: Nets, batch: Batch, phase: str) -> Sums:
        return self._compared(nets, batch, dropout_keys_of(self.config.run.seed, batch.example_ids))

    def evaluate(self, nets: Nets, batch: Batch) -> Sums:
        return self._compared(nets, batch, None)

    def _compared(self, nets: Nets, batch: Batch, keys: Tensor | None) -> Sums:
        logits_BKV, labels_BK = self._predicted(nets, batch, keys)
        nats = F.cross_entropy(logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (logits_BKV.argmax(-1) == labels_BK).sum()
        return Sums(nats, (batch.labels != IGNORE).sum(), {"right": right, "nats": nats})

    def _predicted(self, nets: Nets, batch: Batch, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """(fp32 [B, K, V], labels [B, K]): K is that of every batch, so that shapes are known in advance."""
        places_BK = (batch.labels == IGNORE).int().argsort(dim=1, stable=True)[:, : self._most]
        return nets["model"](batch, keys, places_BK).float(), batch.labels.gather(1, places_BK)

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        nats, right = (extra[name] / max(weight, 1) for name in ("nats", "right"))
        return {"accuracy": right, "perplexity": math.exp(min(nats, 700.0))}

    def samples(self, nets: Modules, batch: Any) -> Text:
        """Held-out texts with hidden tokens in brackets: as found, and after a bar as they are, where that differs.

        Args:
            batch: see `trainer.data.read.masked.MaskedTexts`.
        """
        logits_BKV, labels_BK = self._predicted(nets, batch.batch, None)
        found_BT = torch.full_like(batch.batch.labels, IGNORE)
        rows, columns = (batch.batch.labels != IGNORE).nonzero(as_tuple=True)
        found_BT[rows, columns] = logits_BKV.argmax(-1)[labels_BK != IGNORE]
        return Text(("\n" + "-" * 80 + "\n").join(batch.texts(found_BT)) + "\n")
