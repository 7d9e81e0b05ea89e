"""Texts with labels: what is read of Parquet files, in which order, how it is encoded, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import ConfigError, from_dict
from configs.sections.data import DataConfig
from trainer.data.kinds import kind_of
from trainer.data.texts.reader import Texts
from trainer.run.counted import counts
from trainer.run.resolved import refuse_early, resolve_config

COUNT, END = 300, 256


def write(path, **columns):
    draw = np.random.default_rng(0)
    texts = [f"{number} " + "x" * int(draw.integers(1, 60)) for number in range(COUNT)]
    pq.write_table(pa.table({"text": texts, "label": [number % 3 for number in range(COUNT)]} | columns), path)
    return path


def config_of(path, **sections):
    tree = {
        "model": {"family": "encoder", "outputs": 3, "num_layers": 1, "hidden_size": 16, "num_heads": 2},
        "run": {"root": str(path.parent / "runs")},
        "data": {"path": str(path), "prepare": {"tokenizer": "bytes"}},
        "train": {"seq_len": 40, "precision": "fp32", "global_batch": 8},
    }
    return from_dict({key: tree.get(key, {}) | sections.get(key, {}) for key in tree | sections})


def opened(path, split="train", **sections):
    config, _ = resolve_config(config_of(path, **sections))
    return kind_of(config).open(config, split)


def test_a_text_is_a_function_of_seed_and_index(tmp_path):
    path = write(tmp_path / "x.parquet")
    one, again, other = (Texts(DataConfig(path=str(path)), 40, seed) for seed in (0, 0, 1))
    size = len(one)
    first, second = ([one.locate(i) for i in range(start, start + size)] for start in (0, size))
    assert (size, sorted(first), sorted(second)) == (285, list(range(size)), list(range(size)))
    assert first != second != [other.locate(i) for i in range(size, 2 * size)]
    assert [again.locate(i) for i in (400, 3)] == [one.locate(400), one.locate(3)]
    held_out = Texts(DataConfig(path=str(path)), 40, 0, "held_out")
    assert (len(held_out), {*one.texts()} & {*held_out.texts()}) == (15, set())
    lengths = [len(list(one.texts())[one.locate(i)]) for i in one.typical]
    assert lengths == pytest.approx([np.mean([len(each) for each in one.texts()])] * 2, abs=1)


def test_batches_are_padded_and_cut(tmp_path):
    texts = opened(write(tmp_path / "x.parquet", text=["ab", "c" * 100] * 150, label=[0, 2] * 150))
    assert texts.classes == 3
    a = next(i for i in range(99) if texts.labels[texts.locate(i)] == 0)
    b = next(i for i in range(99) if texts.labels[texts.locate(i)] == 2)
    batch = texts.examples([a, b, -1])
    assert batch.token_ids.tolist() == [[END, *b"ab", *[END] * 37], [END, *b"c" * 39], [END] * 40]
    assert batch.mask.sum(1).tolist() == [3, 40, 1]
    assert (batch.labels.tolist(), batch.weight(), batch.decode) == ([0, 2, -1], 2, None)


def test_a_tokenizer_with_tokens_around_a_text_keeps_them(tmp_path):
    from trainer.data.tokenizer.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    (tmp_path / "bert").mkdir()
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    path = write(tmp_path / "x.parquet", text=["ab" * 30] * COUNT)
    keys = {"data": {"path": str(path), "prepare": {"tokenizer": str(tmp_path / "bert")}}}
    batch = opened(path, **keys, train={"seq_len": 8}).examples([0])
    assert batch.token_ids.tolist() == [[257, *b"ababab", 258]]
    assert opened(path, **keys, train={"seq_len": 1}).examples([0]).token_ids.tolist() == [[257]]


def damaged() -> pa.Array:
    """Texts of which one is missing, two are empty and one is no UTF-8."""
    texts = [b"fine"] * COUNT
    texts[3], texts[5], texts[7], texts[9] = None, b"", b" \n", b"\xff\xfe"
    found = pa.array(texts)
    return pa.Array.from_buffers(pa.string(), COUNT, found.buffers(), found.null_count)


def test_what_is_not_whole_is_counted_and_left_out(tmp_path):
    labels = [None if number == 20 else -1 if number == 21 else number % 3 for number in range(COUNT)]
    path = write(tmp_path / "x.parquet", text=damaged(), label=labels)
    _, notes = resolve_config(config_of(path))
    why = "6 texts left out (1 damaged, 3 empty, 2 without a label): the first is row 3 of x.parquet"
    assert [note for note in notes if "left out" in note] == [why]
    texts = [opened(path, split) for split in ("train", "held_out")]
    assert sum(map(len, texts)) == COUNT - 6
    assert {text for each in texts for text in each.texts()} == {"fine"}
    assert min(int(each.labels.min()) for each in texts) == 0


def test_numbers_are_standardised(tmp_path):
    path = write(tmp_path / "x.parquet", label=[float(number) for number in range(COUNT)])
    keys = {"task": "regression", "model": {"outputs": 1}}
    tree = config_of(path, model={"outputs": 1}).model_copy(update={"task": "regression"})
    config, _ = resolve_config(tree)
    texts = kind_of(config).open(config, "train")
    assert (texts.classes, abs(float(texts.labels.mean()))) == (0, pytest.approx(0, abs=1e-6))
    assert texts.examples([0, -1]).labels[1].tolist() == [0.0]
    assert keys["task"] == config.task


@pytest.mark.slow
def test_held_out_files_and_a_tokenizer_of_the_texts(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "validation.parquet", text=["other"] * COUNT)
    config = config_of(tmp_path, data={"path": str(tmp_path), "prepare": {"tokenizer": "bpe", "vocab_size": 300}})
    refuse_early(config)
    resolved, _ = resolve_config(config)
    assert resolved.data.prepare.tokenizer.startswith(str(tmp_path.parent / "runs" / "data" / "texts-bpe-"))
    held_out = kind_of(resolved).open(resolved, "held_out")
    batch = held_out.examples([0])
    assert (len(held_out), batch.decode([batch.token_ids[0, 1:].tolist()])) == (COUNT, ["other"])
    assert kind_of(resolved).inputs(resolved.data)[0]["profile"] == {"texts": COUNT}
    assert counts(resolved)["flops_per_example"] > 0


@pytest.mark.parametrize(
    ("columns", "keys", "said"),
    [
        ({}, {"texts": {"text": "body"}}, r"has no column body \(it has text, label\): set data\.texts\.text"),
        ({"text": list(range(COUNT))}, {}, r"column text is int64, not text: set data\.texts\.text"),
        ({}, {"texts": {"labels": ["stars"]}}, r"should have exactly one column stars .*: set data\.texts\.labels"),
        ({"label": ["a"] * COUNT}, {}, r"column label is string, not numbers: set data\.texts\.labels, or number"),
        ({"label": [0.5] * COUNT}, {}, r"column label has 0\.5, but classes are whole numbers .*set task=regression"),
        ({"label": [7] * COUNT}, {}, r"model\.outputs is 3, but .* has labels up to 7: set model\.outputs=8"),
        ({"text": [" "] * COUNT}, {}, r"has no text to train on: 300 texts left out \(300 empty\)"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, {}, "has no text to train on"),
        ({}, {"texts": {"labels": ["label", "label"]}}, r"data\.texts\.labels has 2 columns, but task=classification"),
        ({}, {"prepare": {"tokenizer": "nowhere"}}, r"tokenizer 'nowhere': not `bytes`, `bpe` or an existing"),
    ],
)
def test_what_is_refused(tmp_path, columns, keys, said):
    path = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ConfigError, match=said):
        resolve_config(config_of(path, data={"path": str(path), "prepare": {"tokenizer": "bytes"}} | keys))
