"""The reader: sequences are exact windows of the shards, wherever and in whatever order they are read."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_inputs import SMALL, make_text

from configs import ConfigError
from configs.sections.data import DataConfig, Source
from trainer.data.manifest import MANIFEST, read_manifest
from trainer.data.prepare.prepare import prepare
from trainer.data.read.reader import Dataset, load_tokenizer
from trainer.data.read.shards import DataError
from trainer.data.tokenizer.tokenizer import byte_tokenizer

EOS = 256


def group_tokens(dataset: Dataset, index: int) -> np.ndarray:
    place = dataset.locate(index)
    return pq.ParquetFile(place.file).read_row_group(place.row_group)["tokens"].to_numpy().astype(np.int64)


def column_chunk(path: Path, group: int) -> tuple[int, int]:
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    return column.data_page_offset, column.total_compressed_size


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.mark.parametrize("seq_len", [16, 100, 333, 999, 1000])
def test_every_token_is_an_input_and_a_label_once_an_epoch(prepared: Path, seq_len: int):
    dataset = Dataset(DataConfig(path=str(prepared), document_mask=False), seq_len, seed=3)
    for epoch in range(2):
        inputs: dict[int, list[tuple[int, np.ndarray]]] = {}
        for index in range(epoch * len(dataset), (epoch + 1) * len(dataset)):
            place, sequence = dataset.locate(index), dataset.sequence(index)
            used = sequence["labels"] != -100
            assert place.epoch == epoch
            assert used[: used.sum()].all()
            assert (sequence["position_ids"] == np.arange(seq_len)).all()
            inputs.setdefault(place.row_group, []).append(
                (place.window, np.stack([sequence["input_ids"][used], sequence["labels"][used]]))
            )
        shard = pq.ParquetFile(dataset.locate(0).file)
        assert sorted(inputs) == list(range(shard.num_row_groups))
        for group, windows in inputs.items():
            expected = shard.read_row_group(group)["tokens"].to_numpy()
            found = np.concatenate([pair for _, pair in sorted(windows, key=lambda item: item[0])], axis=1)
            assert (found[0] == expected[:-1]).all()
            assert (found[1] == expected[1:]).all()


def test_documents_are_kept_apart(prepared: Path):
    length = 128
    masked = Dataset(DataConfig(path=str(prepared)), length, seed=0)
    plain = Dataset(DataConfig(path=str(prepared), document_mask=False), length, seed=0)
    boundaries = 0
    for index in range(len(masked)):
        sequence, whole, window = masked.sequence(index), plain.sequence(index), masked.locate(index).window
        assert (sequence["input_ids"] == whole["input_ids"]).all()
        tokens = group_tokens(masked, index)[window * length : (window + 1) * length + 1].tolist()
        document = position = 0
        for t in range(length):  # the plain meaning, token by token
            is_token = t < len(tokens) - 1
            if t == len(tokens) - 1 and t > 0:  # the padding
                document, position = document + 1, 0
            assert sequence["document_ids"][t] == document
            assert sequence["position_ids"][t] == position
            expected = tokens[t + 1] if is_token and tokens[t] != EOS else -100
            assert sequence["labels"][t] == expected
            position += 1
            if is_token and tokens[t] == EOS and t + 1 < len(tokens) - 1:
                document, position = document + 1, 0
                boundaries += 1
        assert (np.diff(sequence["document_ids"]) >= 0).all()
    assert boundaries > 20


def test_order_depends_on_seed_and_index_only(prepared: Path):
    config = DataConfig(path=str(prepared))
    dataset = Dataset(config, 64, seed=0)
    expected = [dataset.sequence(index) for index in range(100)]
    for index in np.random.default_rng(0).permutation(100)[:40].tolist():
        again = Dataset(config, 64, seed=0) if index % 10 == 0 else dataset
        for name, value in again.sequence(index).items():
            assert (value == expected[index][name]).all()
    other = Dataset(config, 64, seed=1)
    assert sum((other.sequence(i)["input_ids"] == expected[i]["input_ids"]).all() for i in range(100)) < 5


def test_batch_stacks_sequences_and_pads(prepared: Path):
    dataset = Dataset(DataConfig(path=str(prepared)), 64, seed=0)
    batch = dataset.examples([5, 900, -1])
    assert batch.input_ids.shape == (3, 64)
    assert batch.sequence_ids.tolist() == [5, 900, -1]
    assert (batch.labels[2] == -100).all()
    assert (batch.labels[:2] != -100).any(dim=1).all()
    for row, index in enumerate([5, 900]):
        for name, value in dataset.sequence(index).items():
            assert (getattr(batch, name)[row].numpy() == value).all()
    assert Dataset(DataConfig(path=str(prepared), document_mask=False), 64, 0).examples([0]).document_ids is None


def test_held_out_is_disjoint_fixed_and_ends(prepared: Path, texts: dict[str, str]):
    config = DataConfig(path=str(prepared))
    found: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        dataset = Dataset(config, 1000, seed=0, split=split)
        with load_tokenizer(config) as tokenizer:
            words = [tokenizer.decode(dataset.sequence(i)["input_ids"].tolist()) for i in range(len(dataset))]
        found[split] = {name for name, text in texts.items() if any(text[:40] in window for window in words)}
    assert found["held_out"]
    assert not found["train"] & found["held_out"]
    one, two = (Dataset(config, 64, seed, "held_out") for seed in (0, 1))
    places = [one.locate(i) for i in range(len(one))]
    assert len({place[2:] for place in places}) == len(one)
    assert places == [two.locate(i) for i in range(len(two))]
    with pytest.raises(IndexError):
        one.sequence(len(one))


def test_mixture(prepared: Path, tmp_path: Path):
    (tmp_path / "x.txt").write_text("z" * 30_000)
    prepare([tmp_path / "x.txt"], tmp_path / "z", SMALL.model_copy(update={"held_out": 0.0}), progress=False)
    mixed = DataConfig(path=(Source(path=str(prepared), weight=3), Source(path=str(tmp_path / "z"), weight=1)))
    dataset = Dataset(mixed, 50, seed=0)
    sources = [dataset.locate(index).source for index in range(4000)]
    for start in range(0, 4000, 400):
        assert abs(Counter(sources[start : start + 400])[1] - 100) < 4
    for source, path in enumerate((prepared, tmp_path / "z")):
        size = len(Dataset(DataConfig(path=str(path)), 50, 0))
        places = [dataset.locate(i) for i in range(4000) if sources[i] == source]
        assert len(places) > 1.2 * size or source == 0
        assert len({place[2:] for place in places[:size]}) == min(size, len(places))  # an epoch of its own
        assert [place.epoch for place in places] == [i // size for i in range(len(places))]
    for index in range(50):
        text = set(dataset.sequence(index)["input_ids"].tolist()) - {EOS}
        assert (text == {ord("z")}) == (sources[index] == 1)
    held_out = Dataset(mixed, 50, seed=0, split="held_out")
    assert {held_out.locate(index).source for index in range(len(held_out))} == {0}
    with pytest.raises(ConfigError, match="no held-out documents"):
        Dataset(DataConfig(path=str(tmp_path / "z")), 50, seed=0, split="held_out")


def test_sources_must_share_a_tokenizer(prepared: Path, raw: Path, tmp_path: Path):
    config = SMALL.model_copy(update={"tokenizer": "bpe", "vocab_size": 300})
    prepare([raw], tmp_path / "bpe", config, workers=1, progress=False)
    with pytest.raises(ConfigError, match="different tokenizers"):
        Dataset(DataConfig(path=(Source(path=str(prepared)), Source(path=str(tmp_path / "bpe")))), 64, 0)


def test_no_flipped_bit_is_ever_trained_on(copy: Path):
    manifest = read_manifest(copy)
    path = copy / manifest.of("train")[0].file
    clean, (start, size) = path.read_bytes(), column_chunk(path, 2)
    config = DataConfig(path=str(copy))
    dataset = Dataset(config, 64, seed=0)
    index = next(i for i in range(len(dataset)) if dataset.locate(i).row_group == 2)
    expected = dataset.sequence(index)
    messages = []
    header, rest = range(start, start + 60), range(start + 60, start + size, 17)
    for position in [*header, *rest]:
        for bit in range(8) if position in header else (position % 8,):
            flip(path, position, bit)
            try:
                found = Dataset(config, 64, seed=0).sequence(index)
            except DataError as error:
                messages.append(str(error))
            else:
                assert all((found[name] == expected[name]).all() for name in expected), (position - start, bit)
            path.write_bytes(clean)
    assert all(f"{path}, row group 2:" in message and "data.on_bad_page=skip" in message for message in messages)
    assert len(messages) > 0.8 * (60 * 8 + len(rest))


def test_a_bad_page_is_skipped_and_counted(copy: Path, prepared: Path):
    path = copy / read_manifest(copy).of("train")[0].file
    start, size = column_chunk(path, 2)
    flip(path, start + size // 2)
    whole = Dataset(DataConfig(path=str(prepared)), 64, seed=0)
    dataset = Dataset(DataConfig(path=str(copy), on_bad_page="skip"), 64, seed=0)
    for index in range(len(dataset)):
        found, expected = dataset.sequence(index), whole.sequence(index)
        if dataset.locate(index).row_group == 2:
            assert (found["labels"] == -100).all()
        else:
            assert all((found[name] == expected[name]).all() for name in expected)
    assert dataset.bad_pages == [(str(path), 2)]


def test_a_file_cut_short_while_it_is_read_is_a_data_error(copy: Path):
    dataset = Dataset(DataConfig(path=str(copy)), 64, seed=0)
    path = dataset.locate(0).file
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=path.name):
        dataset.examples(range(len(dataset)))


def test_a_file_that_cannot_be_read_stops_the_run_even_where_bad_pages_are_skipped(copy: Path):
    dataset = Dataset(DataConfig(path=str(copy), on_bad_page="skip"), 64, seed=0)
    dataset.locate(0).file.unlink()
    with pytest.raises(DataError, match="No such file") as caught:
        dataset.sequence(0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def rewrite(copy: Path, group_size: int, rows: int | None = None) -> None:
    """Write the first training shard again, otherwise laid out, and put its new size into the manifest."""
    tree = json.loads((copy / MANIFEST).read_text())
    shard = next(shard for shard in tree["shards"] if shard["split"] == "train")
    table = pq.read_table(copy / shard["file"])
    pq.write_table(table[:rows] if rows else table, copy / shard["file"], row_group_size=group_size)
    shard["bytes"] = (copy / shard["file"]).stat().st_size
    (copy / MANIFEST).write_text(json.dumps(tree))


def test_shards_that_differ_from_the_manifest_are_refused(copy: Path):
    config = DataConfig(path=str(copy))
    path = copy / read_manifest(copy).of("train")[0].file
    clean, manifest = path.read_bytes(), (copy / MANIFEST).read_text()

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            Dataset(config, 64, 0)
        path.write_bytes(clean)
        (copy / MANIFEST).write_text(manifest)
        Dataset(config, 64, 0)

    path.unlink()
    refused("missing")
    path.write_bytes(clean[:-100])
    refused("bytes, but the manifest has")
    path.write_bytes(clean[:-4] + b"XXXX")
    refused("not a Parquet file")
    rewrite(copy, 1000, rows=3000)
    refused("3,000 rows, but the manifest has")
    rewrite(copy, 500)
    refused("row groups, but the manifest has")
    (copy / MANIFEST).write_text(manifest[:200])
    refused("damaged")
    (copy / MANIFEST).write_text(manifest.replace('"format": 1', '"format": 99', 1))
    refused("format 99")
    (copy / MANIFEST).unlink()
    refused("muster data prepare")


def test_unusable_data_are_refused(prepared: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="row_group_tokens=4096"):
        Dataset(DataConfig(path=str(prepared)), 1001, 0)
    with pytest.raises(ConfigError, match="does not exist"):
        Dataset(DataConfig(path=str(tmp_path / "nowhere")), 64, 0)
    with pytest.raises(ConfigError, match=r"data\.path"):
        Dataset(DataConfig(path=()), 64, 0)


@pytest.mark.few(3)
@pytest.mark.parametrize("characters", [1, 998, 999, 1000, 1001, 1998, 1999])
def test_edges_of_row_groups(tmp_path: Path, characters: int):
    text = make_text(0, 2000).encode("ascii", "ignore")[:characters].decode()
    (tmp_path / "x.txt").write_text(text)
    prepare([tmp_path / "x.txt"], tmp_path / "out", SMALL.model_copy(update={"held_out": 0.0}), progress=False)
    dataset = Dataset(DataConfig(path=str(tmp_path / "out"), document_mask=False), 100, 0)
    total = characters + 1  # with the end of text
    groups = [1000] * (total // 1000) + [total % 1000] * (total % 1000 > 0)
    labels = sum((dataset.sequence(i)["labels"] != -100).sum() for i in range(len(dataset)))
    assert labels == sum(size - 1 for size in groups)


def test_sources_must_end_their_documents_alike(raw: Path, tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    for name, end in {"a": "<|endoftext|>", "b": "</s>"}.items():
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        config = SMALL.model_copy(update={"tokenizer": str(tmp_path / name)})
        prepare([raw], tmp_path / f"out-{name}", config, workers=1, progress=False)
    path = tuple(Source(path=str(tmp_path / f"out-{name}")) for name in "ab")
    with pytest.raises(ConfigError, match=r"different end-of-text tokens \(<\|endoftext\|> and </s>\)"):
        Dataset(DataConfig(path=path), 50, seed=0)
