"""The reader that hides tokens: of training sequences others each time, of held-out ones the same in every run."""

from pathlib import Path

import pytest
import torch

from configs import from_dict
from models.loss import IGNORE
from trainer.data.kinds import KINDS
from trainer.data.read.masked import MaskedReader, MaskedTexts


@pytest.fixture
def read(prepared: Path):
    def opened(split="train", seed=0, **train) -> MaskedReader:
        tree = {"data": {"path": str(prepared)}, "run": {"seed": seed}, "train": {"seq_len": 64, **train}}
        return KINDS["masked tokens"].open(from_dict(tree), split)

    return opened


def test_training_sequences_hide_other_tokens_in_another_epoch(read):
    reader = read()
    once = reader.examples(range(len(reader)))
    again = reader.examples([*range(len(reader), 2 * len(reader)), -1])

    def by_text(batch) -> dict[bytes, list[int]]:
        whole = batch.labels.where(batch.labels != IGNORE, batch.input_ids)
        return {text.numpy().tobytes(): chosen.nonzero()[:, 0].tolist() for text, chosen in zip(
            whole, batch.labels != IGNORE, strict=True,
        )}  # fmt: skip

    mine, other = by_text(once), by_text(again)
    both = mine.keys() & other.keys()
    assert len(both) > 5
    assert sum(mine[text] == other[text] for text in both) < 0.2 * len(both)
    assert again.labels[-1].tolist() == [IGNORE] * 64
    assert again.weight() == sum(map(len, other.values()))
    assert once.document_ids is not None
    # Hidden by the mask's id, which is the next after the tokenizer's.
    assert once.input_ids.max() == reader.dataset.vocab_size


def test_held_out_sequences_hide_the_same_in_every_run(read):
    one, other = (read("held_out", seed).examples([0, 1]) for seed in (0, 1))
    assert torch.equal(one.input_ids, other.input_ids)
    assert not torch.equal(read(seed=0).examples([0]).input_ids, read(seed=1).examples([0]).input_ids)
    assert one.weight() < read("held_out", mask_rate=0.5).examples([0, 1]).weight()


def test_texts_show_what_was_found_and_what_is_there(read):
    batch = read("held_out").examples([0])
    found = batch.labels.clone()
    places = (batch.labels[0] != IGNORE).nonzero()[:, 0]
    found[0, places[0]] = 7
    [text] = MaskedTexts(batch, lambda tokens: "".join(f"<{token}>" for token in tokens)).texts(found)
    first, *others = [f"[<{token}>]" for token in batch.labels[0, places].tolist()]
    assert f"[<7>|{first[1:]}" in text
    assert all(other in text for other in others)
    shown = text.replace("<7>|", "").replace("[", "").replace("]", "")
    assert shown == "".join(
        f"<{token}>" for token in batch.labels.where(batch.labels != IGNORE, batch.input_ids)[0].tolist()
    )
