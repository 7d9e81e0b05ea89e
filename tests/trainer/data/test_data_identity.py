"""What a run reads is known by its content: its folder may move, other content under the same path is refused."""

import json
import re
import shutil

import pytest
from support import tiny, train_in_process

from configs import ConfigError
from configs.sections.data import PrepareConfig
from trainer.data.prepare.prepare import prepare
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run, read_config


def make(root, path, steps=2, **data):
    return prepare_run(
        tiny(
            run={"name": "run", "root": str(root)},
            data={"path": path} | data,
            train={"steps": steps},
            checkpoint={"every": 0},
        )
    )


def changes(run_dir):
    return [event["changed"] for event in read_events(run_dir) if event["event"] == "config_changed"]


def other_content(folder):
    raw = folder.parent / f"{folder.name}-raw"
    raw.mkdir()
    for number in range(24):
        (raw / f"{number}.txt").write_text(f"other text {number} " * 200)
    prepare([str(raw)], folder, PrepareConfig(tokenizer="bytes", held_out=0.2), workers=1, progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """A run that has read `data`, a copy of the prepared folder."""
    root = tmp_path_factory.mktemp("identity")
    shutil.copytree(tiny_data, root / "data")
    run_dir = make(root, str(root / "data"))
    assert train_in_process(run_dir) == 0
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of that run with its data beside it, under the root and path it was made with."""
    root = tmp_path / "root"
    shutil.copytree(trained.parent, root)
    config = root / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained.parent), str(root)))
    return root / "run"


def test_nothing_changed(run_dir):
    make(run_dir.parent, str(run_dir.parent / "data"))
    assert changes(run_dir) == []


def test_moved_folder_is_a_recorded_change_and_the_run_goes_on(run_dir):
    root = run_dir.parent
    (root / "data").rename(root / "elsewhere")
    make(root, str(root / "elsewhere"), steps=3)
    assert changes(run_dir) == [{"train.steps": [2, 3], "data.path": [str(root / "data"), str(root / "elsewhere")]}]
    assert read_config(run_dir).data.path == str(root / "elsewhere")
    assert train_in_process(run_dir) == 0


def test_other_content_under_the_same_path_is_refused(run_dir):
    root = run_dir.parent
    before = (run_dir / "config.yaml").read_text()
    shutil.rmtree(root / "data")
    other_content(root / "data")
    with pytest.raises(ConfigError, match=r"^run run exists with another config: data\.path was .*sha256 ") as error:
        make(root, str(root / "data"))
    told = str(error.value)
    assert str(root / "data") in told
    first, second = re.findall(r"\b[0-9a-f]{12}\b", told)
    assert first != second, "the message shows what differs"
    assert "--fork NEW" in told
    assert len(told.splitlines()) <= 3
    assert (run_dir / "config.yaml").read_text() == before, "a refusal changes nothing"
    assert changes(run_dir) == []


def test_other_content_elsewhere_is_refused(run_dir):
    other_content(run_dir.parent / "other")
    with pytest.raises(ConfigError, match=r"data\.path was "):
        make(run_dir.parent, str(run_dir.parent / "other"))


def test_one_changed_byte_of_the_manifest_is_other_content(run_dir):
    path = run_dir.parent / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data\.path was .*sha256 "):
        make(run_dir.parent, str(run_dir.parent / "data"))


def test_other_reading_of_the_same_data_is_refused(run_dir):
    with pytest.raises(ConfigError, match=r"data\.document_mask was True and is now False"):
        make(run_dir.parent, str(run_dir.parent / "data"), document_mask=False)


def mixture(root, *weights):
    return [{"path": str(root / name), "weight": weight} for name, weight in zip("ab", weights, strict=True)]


@pytest.fixture
def mixed(tmp_path, tiny_data):
    """A run over two sources, trained."""
    shutil.copytree(tiny_data, tmp_path / "a")
    other_content(tmp_path / "b")
    run_dir = make(tmp_path, mixture(tmp_path, 1, 2))
    assert train_in_process(run_dir) == 0
    return run_dir


def test_other_weights_of_the_same_sources_are_refused(mixed):
    """They are another order of the data, whatever the files hold."""
    make(mixed.parent, mixture(mixed.parent, 1, 2))
    with pytest.raises(ConfigError, match=r"data\.path was "):
        make(mixed.parent, mixture(mixed.parent, 2, 1))


def test_second_source_changed(mixed):
    """The message must show the source that differs."""
    path = mixed.parent / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data\.path was ") as error:
        make(mixed.parent, mixture(mixed.parent, 1, 2))
    told = str(error.value).splitlines()[0]
    assert str(mixed.parent / "b") in told
    assert str(mixed.parent / "a") not in told
