"""Checkpoints, configs and data are read, never run: a pickle in place of any file is not loaded."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support import TINY_MODEL, resolved, tiny, train_in_process

from configs import ConfigError, load
from models.families import build
from trainer.checkpoint import store
from trainer.checkpoint.export import export, load_module
from trainer.checkpoint.init_from import check_source, load_weights
from trainer.data.read.reader import Dataset, load_tokenizer
from trainer.data.read.shards import DataError
from trainer.run.folder import prepare_run


class Payload:
    """Its pickle creates a file when loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "it-ran"


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_data):
    """A run in `run`, its export in `hf`, its data in `data`."""
    root = tmp_path_factory.mktemp("original")
    shutil.copytree(tiny_data, root / "data")
    config = tiny(
        run={"name": "run", "root": str(root)}, data={"path": str(root / "data")}, train={"steps": 2, "eval_every": 0}
    )
    assert train_in_process(prepare_run(config)) == 0
    export(root / "run", root / "hf")
    return root


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    for config in (tmp_path / "copy").glob("run/config.yaml"):
        config.write_text(config.read_text().replace(str(original), str(tmp_path / "copy")))
    return tmp_path / "copy"


def use_run(root: Path) -> None:
    _module, config, _ = load_module(root / "run")
    load_tokenizer(config.data).close()
    Dataset(config.data, config.train.seq_len, 0, split="train").sequence(0)


def warm_start(source: Path) -> None:
    config = resolved(model=TINY_MODEL, train={"init_from": str(source)})
    check_source(config)
    load_weights(build(config.model), config)


def use_run_as_start(root: Path) -> None:
    warm_start(root / "run")


def use_export(root: Path) -> None:
    warm_start(root / "hf")


FILES = {
    "config": ("run/config.yaml", use_run),
    "manifest": ("run/checkpoints/step-00000002/manifest.json", use_run),
    "shard": ("run/checkpoints/step-00000002/rank-00000.safetensors", use_run),
    "shard of a start": ("run/checkpoints/step-00000002/rank-00000.safetensors", use_run_as_start),
    "Hugging Face config": ("hf/config.json", use_export),
    "Hugging Face weights": ("hf/model.safetensors", use_export),
    "data manifest": ("data/manifest.json", use_run),
    "data": ("data/train-00000.parquet", use_run),
    "tokenizer": ("data/tokenizer.json", use_run),
}


def test_the_payload_works(mark):
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


@pytest.mark.few(9)
@pytest.mark.parametrize("saved", ["pickle", "torch"])
@pytest.mark.parametrize(("file", "use"), FILES.values(), ids=FILES.keys())
def test_a_pickle_in_place_of_a_file(copy, mark, file, use, saved):
    path = copy / file
    use(copy)  # works before the change
    if saved == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save(Payload(mark), path)
    as_if_written_so(path)
    with pytest.raises((ConfigError, DataError)) as caught:
        use(copy)
    assert path.name in str(caught.value) or file.partition("/")[0] in str(caught.value)
    assert not mark.exists()


def as_if_written_so(path: Path) -> None:
    """Update the file's size and digest in the manifest beside it, as a forger would."""
    beside = path.parent / "manifest.json"
    if beside == path or not beside.exists():
        return
    data = path.read_bytes()
    tree, facts = json.loads(beside.read_text()), {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if "files" in tree:
        tree["files"][path.name] |= facts
    elif path.name == "tokenizer.json":
        tree["tokenizer"]["sha256"] = facts["sha256"]
    else:
        [shard] = [shard for shard in tree["shards"] if shard["file"] == path.name]
        shard |= facts
    beside.write_text(json.dumps(tree))


def test_a_resumed_run_loads_no_pickle(copy, mark):
    shard = copy / FILES["shard"][0]
    torch.save(Payload(mark), shard)
    as_if_written_so(shard)
    prepare_run(load(copy / "run" / "config.yaml", ["train.steps=3"]))
    assert train_in_process(copy / "run") == 1
    assert not mark.exists()


def test_files_beside_the_weights_are_not_opened(copy, mark):
    for name in ("pytorch_model.bin", "training_args.bin", "modeling_mine.py", "model.pt"):
        torch.save(Payload(mark), copy / "hf" / name)
        torch.save(Payload(mark), copy / "run/checkpoints/step-00000002" / name)
    tree = json.loads((copy / "hf/config.json").read_text())
    tree["auto_map"] = {"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (copy / "hf/config.json").write_text(json.dumps(tree))
    use_export(copy)
    use_run(copy)
    assert not mark.exists()


TAGS = [
    "!!python/object/apply:os.system ['touch {mark}']",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]",
    "!!python/object/new:os.system ['touch {mark}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_python_tag_in_a_config(tmp_path, mark, tag):
    tag = tag.format(mark=mark)
    (tmp_path / "c.yaml").write_text(f"train:\n  steps: {tag}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml cannot be read as YAML: the tag .*python.* is not allowed"):
        load(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"train\.steps=.*: the value is not YAML"):
        load("quickstart", [f"train.steps={tag}"])
    assert not mark.exists()


def test_a_manifest_cannot_name_a_file_outside_its_folder(copy):
    data = copy / "data"
    shutil.move(data / "train-00000.parquet", copy / "train-00000.parquet")
    text = (data / "manifest.json").read_text()
    (data / "manifest.json").write_text(text.replace("train-00000.parquet", "../train-00000.parquet"))
    with pytest.raises(ConfigError, match=r"outside its folder"):
        use_run(copy)
    manifest = copy / "run/checkpoints/step-00000002/manifest.json"
    for elsewhere in ("../rank-00000.safetensors", "/rank-00000.safetensors", ".."):
        tree = json.loads(manifest.read_text())
        tree["files"] = {elsewhere: next(iter(tree["files"].values()))}
        manifest.write_text(json.dumps(tree))
        assert "outside its folder" in store.verify(manifest.parent)[0]


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", "/abs", "a\\b", "-x", "a\nb", ""])
def test_a_runs_name_is_a_single_path_component(tmp_path, name):
    (tmp_path / "c.yaml").write_text(json.dumps({"run": {"name": name}}))
    with pytest.raises(ConfigError, match=r"run\.name"):
        load(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["../up", "..", "/abs"])
def test_a_forks_name_is_a_single_path_component(copy, name):
    with pytest.raises(ConfigError, match=r"--fork .*run\.name"):
        prepare_run(load(copy / "run" / "config.yaml"), fork=name)


def test_an_index_cannot_name_files_outside_its_folder(copy, tmp_path):
    """Weights come from the folder's own files only."""
    shutil.move(copy / "hf/model.safetensors", copy / "model.safetensors")
    weights = {"lm_head.weight": "../model.safetensors", "model.norm.weight": str(copy / "model.safetensors")}
    (copy / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ConfigError, match="should be the plain name of a"):
        use_export(copy)
