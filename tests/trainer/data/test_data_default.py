"""What `data.path` stands for: prepared at first use, once, or an error that says what to do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import Config, ConfigError
from configs.sections.data import DataConfig, PrepareConfig, Source
from configs.sections.run import RunConfig
from configs.sections.train import TrainConfig
from trainer.data.default import ensure_prepared, stdlib_folder, vocabulary_size
from trainer.data.manifest import read_manifest
from trainer.data.prepare.prepare import prepare
from trainer.data.read.reader import Dataset

BYTES = PrepareConfig(tokenizer="bytes")


def config_of(root: Path, **data) -> Config:
    return Config(run=RunConfig(root=str(root)), data=DataConfig(**data))


@pytest.mark.slow
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


def test_unprepared_data_are_an_error_with_the_command(tmp_path: Path, raw: Path):
    for path in (str(tmp_path / "nowhere"), str(raw), str(raw / "000.txt")):
        with pytest.raises(ConfigError, match="muster data prepare"):
            ensure_prepared(config_of(tmp_path, path=path))


def test_data_without_held_out_documents_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.txt").write_text("a few words " * 200)
    for name, share in {"none": 0.0, "some": 0.05}.items():
        prepare([tmp_path / "x.txt"], tmp_path / name, BYTES.model_copy(update={"held_out": share}), progress=False)
    [note] = ensure_prepared(config_of(tmp_path, path=str(tmp_path / "none")))[1]
    assert str(tmp_path / "none") in note
    assert "no evaluation" in note
    assert note in capsys.readouterr().err.replace("\n", "")
    mixed = (Source(path=str(tmp_path / "none")), Source(path=str(tmp_path / "some")))
    [note] = ensure_prepared(config_of(tmp_path, path=mixed))[1]
    assert "evaluation is on the other data only" in note
    data = DataConfig(path=mixed)
    held_out = Dataset(data, 16, 0, "held_out")
    assert {held_out.locate(index).source for index in range(len(held_out))} == {1}
    assert len(held_out) == len(Dataset(DataConfig(path=mixed[1].path), 16, 0, "held_out"))


def test_data_that_a_run_cannot_read_are_refused_before_it(tmp_path: Path, prepared: Path):
    with pytest.raises(ConfigError, match="row_group_tokens"):
        ensure_prepared(Config(data=DataConfig(path=str(prepared)), train=TrainConfig(seq_len=2000)))
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    (copy / read_manifest(copy).of("held_out")[0].file).unlink()
    with pytest.raises(ConfigError, match="is missing"):
        ensure_prepared(config_of(tmp_path, path=str(copy)))
