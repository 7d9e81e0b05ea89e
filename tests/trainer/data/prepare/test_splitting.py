"""What is held out: by the hash of a document, and of few documents always something, where there is enough."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.sections.data import PrepareConfig
from trainer.data.prepare.prepare import prepare, summary
from trainer.data.prepare.splitting import MIN_TAIL, Splitting, number_of, split_of_few

quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)
SHARE = 0.05


def split(documents: list[bytes], rule: Splitting) -> dict[str, list[bytes]]:
    parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
    for document in documents:
        for name, part in rule(document):
            parts[name].append(part)
    return parts


@quick
@given(st.lists(st.text(max_size=2000).map(str.encode), min_size=1, max_size=6), st.integers(0, 3))
def test_few_documents_are_split_without_loss(documents, seed):
    rule = split_of_few(documents, SHARE, seed)
    parts = split(documents, rule)
    for document in documents:
        assert b"".join(part for _, part in rule(document)) == document
        for _, part in rule(document):
            part.decode()
    total, held_out = sum(map(len, documents)), sum(map(len, parts["held_out"]))
    assert held_out <= total / 2
    assert not set(parts["train"]) & set(parts["held_out"])
    if max(map(len, documents)) >= 4 * MIN_TAIL:
        assert held_out >= MIN_TAIL


def test_one_of_several_documents_is_held_out_whole():
    documents = [b"document %d " % number * 50 for number in range(8)]
    rule = split_of_few(documents, SHARE, 0)
    assert len(split(documents, rule)["held_out"]) == 1
    assert split_of_few(documents, SHARE, 1) != rule
    repeated = split(documents * 3, rule)
    assert len(repeated["held_out"]) == 3
    assert not set(repeated["train"]) & set(repeated["held_out"])


def test_the_end_of_one_document_is_held_out_from_a_line_on():
    document = "".join(f"line {number}\n" for number in range(1000)).encode()
    [(_, before), (_, after)] = split_of_few([document], SHARE, 0)(document)
    assert before.endswith(b"\n")
    assert before + after == document
    assert len(after) == pytest.approx(SHARE * len(document), rel=0.05)


def test_a_small_document_beside_a_large_one_is_not_all_of_the_evaluation():
    documents = [b"large " * 10_000, b"small " * 30]
    assert sum(map(len, split(documents, split_of_few(documents, SHARE, 0))["held_out"])) > 2000


def unlucky(count: int, held_out: bool) -> list[str]:
    """Texts whose hashes fall on one side."""
    texts = (f"document {number} " * 100 for number in range(10_000))
    return [text for text in texts if (number_of(text.encode(), 0) < SHARE * 2**64) == held_out][:count]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_preparation_of_few_documents_has_both_splits(tmp_path: Path, count: int, held_out: bool, tokenizer: str):
    texts = unlucky(count, held_out)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(tokenizer=tokenizer, vocab_size=300, held_out=SHARE)
    made = prepare([tmp_path / "x.jsonl"], tmp_path / "out", config, workers=1, progress=False)
    assert all(made.splits[split].documents for split in made.splits)
    assert sum(made.splits[split].bytes for split in made.splits) == sum(map(len, texts))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.jsonl"]


@pytest.mark.parametrize("held_out", [0.0, SHARE])
def test_nothing_is_held_out_of_too_little_text_and_that_is_said(tmp_path: Path, held_out: float):
    (tmp_path / "x.txt").write_text("a few words")
    config = PrepareConfig(tokenizer="bytes", held_out=held_out)
    made = prepare([tmp_path / "x.txt"], tmp_path / "out", config, workers=1, progress=False)
    assert (made.splits["train"].documents, made.splits["held_out"].documents) == (1, 0)
    assert "no evaluation" in summary(made)
