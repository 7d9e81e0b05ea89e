"""`muster export` and `eval` of a trained run: the options, the old spelling, progress."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import TINY_MODEL, tiny, train_in_process

from cluster.commands import trained as commands
from trainer.checkpoint.export import load_module
from trainer.run.folder import prepare_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_data):
    root = tmp_path_factory.mktemp("trained")
    sections = {"run": {"name": "one", "root": str(root)}, "data": {"path": str(tiny_data)}, "model": TINY_MODEL}
    found = prepare_run(tiny(train={"steps": 2, "eval_sequences": 4}, **sections))
    assert train_in_process(found) == 0
    return found


def export(muster, run_dir, *arguments):
    return muster("export", "one", "--root", str(run_dir.parent), *arguments)


def test_dtype_and_shards_are_as_asked(muster, run_dir, tmp_path):
    out = tmp_path / "out"
    code, said, err = export(muster, run_dir, "--out", str(out), "--dtype", "bfloat16", "--max-shard-size", "20kB")
    assert (code, err) == (0, "")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert f"in {len(files)} files" in said
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(index) == set(held)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    trained = load_module(run_dir)[0].state_dict()["model.embed_tokens.weight"]
    assert torch.equal(trained.bfloat16(), held["model.embed_tokens.weight"])


def test_the_old_spelling_works_and_is_said_to_be_old(muster, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, err = export(muster, run_dir, "--to", "hf")  # in the old spelling a format's name is a folder
    assert code == 0
    assert "write --out hf" in err
    assert "in 1 file\n" in said
    code, _, err = export(muster, run_dir, "--to", "hf", "--out", "new")
    assert (code, err) == (0, "")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "new"))
    assert all(torch.equal(old[name], new[name]) for name in old.keys() | new.keys())
    code, _, err = export(muster, run_dir, "--out", "new")
    assert (code, "--out new: the folder is not empty" in err) == (2, True)
    (tmp_path / "file").touch()
    assert "there is a file of that name" in export(muster, run_dir, "--out", "file")[2]
    for out, what in (("file/x", "cannot be created"), ("/proc/x", "cannot be created"), ("", "missing --out FOLDER")):
        code, _, err = export(muster, run_dir, "--out", out)
        assert (code, what in err, err.count("\n")) == (2, True, 1), err


def test_commands_that_need_data_name_the_folder_they_were_moved_from(muster, run_dir, tiny_data, tmp_path):
    copy = tmp_path / "one"
    shutil.copytree(run_dir, copy)
    moved = tmp_path / "data"
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(tiny_data), str(moved)))
    at = ("--root", str(tmp_path))
    for command, way in ((("eval", "one"), "--data FOLDER"), (("data", "show", "one", "--step", "1"), "put them back")):
        code, _, err = muster(*command, *at)
        assert (code, f"no longer in {moved}" in err, way in err, "data.path" in err) == (2, True, True, False), err
    code, out, _ = muster("eval", "one", *at, "--data", str(tiny_data), "--json")
    assert (code, json.loads(out)["data"]) == (0, [str(tiny_data)])


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("2GiB", 2**31), ("1.5kb", 1500), ("100", 100), ("1 KiB", 1024)]
)
def test_sizes(text, size):
    assert commands._bytes("--max-shard-size", text) == size


def test_eval_says_how_far_it_is(muster, run_dir, monkeypatch):
    code, out, err = muster("eval", "one", "--root", str(run_dir.parent), "--sequences", "20", "--json")
    assert (code, err) == (0, "")  # it took less than ten seconds
    monkeypatch.setattr(commands, "LINE_SECONDS", 0.0)
    code, again, err = muster("eval", "one", "--root", str(run_dir.parent), "--sequences", "20", "--json")
    assert json.loads(again) == json.loads(out)
    assert [line.partition(" batches")[0] for line in err.splitlines()] == ["1 of 3", "2 of 3"]
