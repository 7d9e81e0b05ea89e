"""A Git LFS pointer, which stands where a file was not fetched, is called so wherever a file is read."""

from pathlib import Path

import pytest
import tiny_models as tiny
from data_inputs import SMALL, detail, make_text, read

from configs import ConfigError, load
from configs.reading.lfs import POINTER, is_pointer
from configs.sections.data import DataConfig
from models.hf.folder import export_hf, import_hf
from models.scaling.table import read_table
from trainer.data.images.files import open_files
from trainer.data.prepare.prepare import prepare
from trainer.data.read.reader import Dataset
from trainer.data.tokenizer.tokenizer import byte_tokenizer
from trainer.data.tokenizer.tokenizer_files import beside, tokenizer_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"
TOLD = r"it is a Git LFS pointer, not the file itself: `git lfs pull` fetches it"


def test_only_a_whole_pointer_is_one():
    assert is_pointer(LFS)
    assert is_pointer(LFS.replace(b"oid", b"ext-0-case sha256:" + b"0" * 64 + b"\noid"))
    assert is_pointer(LFS.replace(b"\n", b"\r\n"))
    for text in (b"", LFS[:60], LFS + b"This is what a pointer looks like.\n", b"A pointer:\n" + LFS):
        assert not is_pointer(text)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.json.gz", "a.csv", "a.parquet", "a.txt.zst"])
def test_raw_text(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(LFS)
    assert read(tmp_path / name) == ([], [(name, "", "not fetched")])
    assert detail(tmp_path / name) == POINTER


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model.safetensors"]
)
def test_a_model(tmp_path: Path, name: str):
    config = tiny.config(num_experts=0)
    module = tiny.model(config)
    size = sum(4 * p.numel() for p in module.parameters())
    export_hf(module, config, tmp_path, shard_bytes=size * 2 // 3 if "model-" in name or "index" in name else size)
    assert (tmp_path / name).is_file()
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(ConfigError, match=rf"{name}.*{TOLD}"):
        import_hf(tmp_path)


def test_a_tokenizer_and_what_stands_beside_it(tmp_path: Path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(LFS)
    with pytest.raises(ConfigError, match=f"chat_template.jinja.*{TOLD}"):
        beside(tokenizer_file(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(ConfigError, match=TOLD):
        tokenizer_file(tmp_path)


@pytest.mark.parametrize("name", ["runs.csv", "runs.csv.gz", "runs.parquet"])
def test_a_table_of_runs(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(ConfigError, match=TOLD):
        read_table(tmp_path / name)


def test_a_config(tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(LFS)
    with pytest.raises(ConfigError, match=TOLD):
        load(tmp_path / "mine.yaml")


def test_images_and_prepared_data(tmp_path: Path):
    (tmp_path / "images.parquet").write_bytes(LFS)
    with pytest.raises(ConfigError, match=TOLD):
        open_files([tmp_path / "images.parquet"])
    (tmp_path / "x.txt").write_text(make_text(1, 2000))
    prepare([tmp_path / "x.txt"], tmp_path / "data", SMALL, workers=1, progress=False)
    for shard in (tmp_path / "data").rglob("*.parquet"):
        shard.write_bytes(LFS)
    with pytest.raises(ConfigError, match=TOLD):
        Dataset(DataConfig(path=str(tmp_path / "data")), 16, 0)
