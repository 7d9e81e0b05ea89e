"""What `data.path` stands for: prepared at first use, once, or an error that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import Config, ConfigError
from configs.data import DataConfig, PrepareConfig, Source
from configs.run import RunConfig
from trainer.data.default import ensure_prepared, stdlib_folder, vocabulary_size
from trainer.data.manifest import read_manifest

BYTES = PrepareConfig(tokenizer="bytes")


def config_of(root: Path, **data) -> Config:
    return Config(run=RunConfig(root=str(root)), data=DataConfig(**data))


def test_stdlib_is_prepared_once_by_processes_that_start_together(tmp_path: Path):
    code = (
        "import sys; from configs import from_dict; from trainer.data.default import ensure_prepared\n"
        "config = from_dict({'run': {'root': sys.argv[1]}, 'data': {'prepare': {'tokenizer': 'bytes'}}})\n"
        "print(ensure_prepared(config, workers=1, progress=False)[0].path)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=300)[0].strip() for process in processes}
    folder = stdlib_folder(tmp_path, BYTES)
    assert printed == {str(folder)}
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    manifest = read_manifest(folder)
    assert manifest.splits["train"].bytes > 5_000_000
    assert manifest.splits["held_out"].documents > 20

    data, notes = ensure_prepared(config_of(tmp_path, prepare=BYTES))
    assert data.path == str(folder)
    assert "prepared before" in notes[0]
    assert vocabulary_size(data) == 257
    mixed = (Source(path="stdlib", weight=2), Source(path=str(folder)))
    data, _ = ensure_prepared(config_of(tmp_path, path=mixed, prepare=BYTES))
    assert data.path == (Source(path=str(folder), weight=2), Source(path=str(folder)))


def test_other_settings_get_another_folder(tmp_path: Path):
    settings = [BYTES, PrepareConfig(), PrepareConfig(vocab_size=512), PrepareConfig(seed=1)]
    assert len({stdlib_folder(tmp_path, config) for config in settings}) == 4


def test_what_is_not_prepared_is_an_error_with_the_command(tmp_path: Path, raw: Path):
    for path in (str(tmp_path / "nowhere"), str(raw), str(raw / "000.txt")):
        with pytest.raises(ConfigError, match="muster data prepare"):
            ensure_prepared(config_of(tmp_path, path=path))
