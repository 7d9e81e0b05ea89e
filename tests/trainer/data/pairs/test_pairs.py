"""Pairs of texts: what is read of Parquet files, in which order, how it is encoded, and what is refused."""

from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import ConfigError, from_dict, resolve
from configs.sections.data import DataConfig, PairsConfig
from models.loss import IGNORE
from trainer.data import parquet_files
from trainer.data.kinds import kind_of
from trainer.data.pairs.dates import FIRST, dates, written
from trainer.data.pairs.prepared import ensure_pairs, open_pairs
from trainer.data.pairs.reader import Pairs, read_texts
from trainer.data.texts.encoded import BUCKET
from trainer.run.counted import counts
from trainer.run.resolved import refuse_early, resolve_config

COUNT = 300
END = 256


def write(path, **columns):
    draw = np.random.default_rng(0)
    source = [f"{number} " + "x" * int(draw.integers(1, 60)) for number in range(COUNT)]
    pq.write_table(pa.table({"source": source, "target": [text.upper() for text in source]} | columns), path)
    return path


def config_of(path, root, **sections):
    tree = {
        "model": {"family": "encoder_decoder"},
        "run": {"root": str(root)},
        "data": {"path": str(path), "prepare": {"tokenizer": "bytes"}},
        "train": {"seq_len": 64, "precision": "fp32", "global_batch": 8},
    }
    return from_dict(tree | {key: tree.get(key, {}) | keys for key, keys in sections.items()})


def opened(path, root, split="train", **sections):
    config = config_of(path, root, **sections)
    return open_pairs(config.model_copy(update={"data": ensure_pairs(config)[0]}), split)


def test_a_pair_is_a_function_of_seed_and_index(tmp_path):
    path = write(tmp_path / "x.parquet")
    one, again, other = (Pairs(DataConfig(path=str(path)), 64, seed) for seed in (0, 0, 1))
    size = len(one)
    assert size == 285  # 5% of 300 are held out
    first, second = ([one.locate(i) for i in range(start, start + size)] for start in (0, size))
    assert sorted(first) == sorted(second) == list(range(size))
    assert first != second != [other.locate(i) for i in range(size, 2 * size)]
    assert [again.locate(i) for i in (400, 3)] == [one.locate(400), one.locate(3)]
    held_out = Pairs(DataConfig(path=str(path)), 64, 0, "held_out")
    order = [held_out.locate(i) for i in range(15)]
    assert sorted(order) == list(range(15)) != order
    assert not {*map(str, one.source)} & {*map(str, held_out.source)}
    with pytest.raises(IndexError):
        held_out.locate(15)


def test_neighbours_have_nearly_the_same_length(tmp_path):
    pairs = Pairs(DataConfig(path=str(write(tmp_path / "x.parquet"))), 64, 0)
    lengths = [len(str(pairs.source[pairs.locate(i)])) for i in range(len(pairs))]
    whole = max(lengths) - min(lengths)
    spread = sorted(max(part) - min(part) for part in (lengths[n : n + BUCKET] for n in range(0, 256, BUCKET)))
    assert spread[0] < 0.3 * whole
    assert spread[-2] < 0.6 * whole  # one may be cut by the shorter bucket


def test_batches_are_padded_and_end(tmp_path):
    pairs = opened(write(tmp_path / "x.parquet", source=["ab", "cde"] * 150, target=["XYZ", "W"] * 150), tmp_path)
    a = next(i for i in range(99) if str(pairs.source[pairs.locate(i)]) == "ab")
    b = next(i for i in range(99) if str(pairs.source[pairs.locate(i)]) == "cde")
    batch = pairs.examples([a, b, -1])
    assert batch.source_ids.tolist() == [[*b"ab", END, END], [*b"cde", END], [END] * 4]
    assert batch.source_mask.tolist() == [[True] * 3 + [False], [True] * 4, [True] + [False] * 3]
    assert batch.labels.tolist() == [[*b"XYZ", END], [*b"W", END, IGNORE, IGNORE], [IGNORE] * 4]
    assert batch.input_ids.tolist() == [[END, *b"XYZ"], [END, *b"W", END, END], [END] * 4]
    assert (batch.weight(), batch.example_ids.tolist(), batch.decode) == (6, [a, b, -1], None)
    held_out = opened(tmp_path / "x.parquet", tmp_path, "held_out")
    assert held_out.examples([0]).decode([[*b"ab"], []]) == ["ab", ""]


def test_long_texts_are_cut_and_empty_ones_left_out(tmp_path):
    path = write(tmp_path / "x.parquet", source=["a" * 100, "", None] * 100, target=["b"] * 300)
    config = config_of(path, tmp_path)
    data, notes = ensure_pairs(config)
    kept, left_out = (int(note.removeprefix(f"data.path={path}: ").split()[0]) for note in notes[:2])
    assert (kept + left_out, 90 < kept <= 100) == (285, True)
    pairs = open_pairs(config.model_copy(update={"data": data}), "train")
    assert pairs.examples([0]).source_ids.tolist() == [[*b"a" * 63, END]]


def test_hugging_faces_translations_and_held_out_files(tmp_path):
    kind = pa.struct([("en", pa.string()), ("de", pa.string())])
    for name, word in (("train", "house"), ("validation", "cat")):
        table = pa.table({"translation": pa.array([{"en": word, "de": "Haus"}] * 20, kind)})
        pq.write_table(table, tmp_path / f"{name}-0.parquet")
    keys = {"data": {"pairs": {"source": "de", "target": "en"}}}
    train, held_out = (opened(tmp_path, tmp_path / "runs", split, **keys) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (20, 20)
    assert (str(train.source[0]), str(train.target[0]), str(held_out.target[0])) == ("Haus", "house", "cat")


def test_a_tokenizer_is_made_once_and_sizes_the_model(tmp_path):
    path = write(tmp_path / "x.parquet")
    config = config_of(path, tmp_path, data={"path": str(path), "prepare": {"tokenizer": "bpe", "vocab_size": 300}})
    refuse_early(config)
    resolved, _ = resolve_config(config)
    assert 257 < resolved.model.vocab_size <= 320
    file = resolved.data.prepare.tokenizer
    again, _ = resolve_config(config)
    assert again == resolved
    held_out = kind_of(resolved).open(resolved, "held_out")
    batch = held_out.examples([0])
    assert batch.decode([batch.labels[0, :-1].tolist()]) == [str(held_out.target[held_out.locate(0)])]
    assert file.startswith(str(tmp_path / "data" / "pairs-bpe-"))
    [told] = kind_of(resolved).inputs(resolved.data)
    assert told["profile"] == {"pairs": COUNT}


def test_a_plan_counts_once_the_tokenizer_is_made(tmp_path):
    path = write(tmp_path / "pairs.parquet")
    for tokenizer in ("bytes", "bpe"):
        keys = {"prepare": {"tokenizer": tokenizer, "vocab_size": 300}}
        config = resolve(config_of(path, tmp_path, data=keys), vocab_size=300)[0]
        assert f"once data.prepare.tokenizer={tokenizer} is made" in counts(config)["flops_unknown"]
        data, _ = ensure_pairs(config)
        found = counts(config)
        assert found == counts(config.model_copy(update={"data": data}))
        assert found["flops_per_example"] > 0


@pytest.mark.parametrize(
    ("columns", "keys", "said"),
    [
        ({}, {"pairs": {"source": "en"}}, r"has no column en \(it has source, target\): set data\.pairs\.source"),
        ({"target": list(range(COUNT))}, {}, r"column target is int64, not text: set data\.pairs\.target"),
        ({"target": [""] * COUNT}, {}, r"has no pair to train on: 285 are without a source or a target"),
        ({}, {"prepare": {"tokenizer": "nowhere"}}, r"tokenizer 'nowhere': not `bytes`, `bpe` or an existing"),
        (
            {},
            {"path": [{"path": "a"}, {"path": "b"}]},
            r"data\.path has 2 sources, but pairs are read from",
        ),
    ],
)
def test_what_is_refused(tmp_path, columns, keys, said):
    path = write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ConfigError, match=said):
        ensure_pairs(config_of(path, tmp_path, data={"path": str(path), "prepare": {"tokenizer": "bytes"}} | keys))


def test_texts_that_are_not_utf_8_are_refused(tmp_path):
    bad = pa.array([b"\xff"] * COUNT)
    path = write(tmp_path / "x.parquet", target=pa.Array.from_buffers(pa.string(), COUNT, bad.buffers()))
    with pytest.raises(ConfigError, match=r"x\.parquet is not a Parquet file: .*Invalid UTF8"):
        read_texts([path], PairsConfig())


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array(["a"])] * 3
    pq.write_table(pa.Table.from_arrays(columns, names=["source", "target", "source"]), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"several columns source: rename all but one, or set data\.pairs\.source"):
        read_texts([tmp_path / "x.parquet"], PairsConfig())


def test_a_small_file_of_many_texts_is_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", target=["x" * 1000] * COUNT)
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 200 * COUNT)
    assert path.stat().st_size < 100 * COUNT
    with pytest.raises(ConfigError, match="the pairs take over 60,000 bytes of memory"):
        read_texts([path], PairsConfig())
    path = write(tmp_path / "x.parquet", target=pa.nulls(COUNT, pa.string()))
    monkeypatch.setattr(parquet_files, "MOST_BYTES", 15 * COUNT)
    with pytest.raises(ConfigError, match="the pairs take over 4,500 bytes of memory"):
        read_texts([path], PairsConfig())


def test_dates_in_words():
    ways = [written(date(2003, 10, 21), way) for way in range(8)]
    assert ways == [
        "21 October 2003",
        "October 21, 2003",
        "Tuesday, 21 Oct 2003",
        "Oct 21st, 2003",
        "Tuesday, the 21st of October 2003",
        "the twenty-first of October, two thousand and three",
        "October the twenty-first, two thousand and three",
        "Tuesday, October 21st two thousand and three",
    ]
    said = [written(date(year, 1, day), 6) for year, day in ((1900, 12), (1905, 20), (1999, 30), (2010, 3), (2000, 11))]
    assert [text.removeprefix("January the ") for text in said] == [
        "twelfth, nineteen hundred", "twentieth, nineteen oh-five", "thirtieth, nineteen ninety-nine",
        "third, twenty ten", "eleventh, two thousand",
    ]  # fmt: skip
    targets = dates()["target"].to_pylist()
    assert all(FIRST <= date.fromisoformat(text) <= date(2099, 12, 31) for text in targets)
    assert min(targets)[:3] == "190"
    assert max(targets)[:3] == "209"
