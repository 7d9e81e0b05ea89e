"""`muster checkpoint`: which checkpoints there are, what is in one, and which file is damaged."""

import functools
import json

import pytest
import torch

from trainer.checkpoint import manifest, store
from trainer.checkpoint.store import Snapshot
from trainer.state import TrainState


@pytest.fixture
def muster(muster):
    """`muster checkpoint`."""
    return functools.partial(muster, "checkpoint")


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 2, 4 and 6, each written by two ranks."""
    folder = tmp_path / "first"
    for step in (2, 4, 6):
        path, shapes = manifest.folder(folder, step), {"weight": {"a": [2, 5]}, "exp_avg": {"a": [2, 5]}}
        for rank, (low, high) in enumerate(((0, 4), (4, 10))):
            tensors = {f"{key}/a@{low}": torch.arange(10.0)[low:high].clone() for key in shapes}
            store.write_shard(path, rank, "t", Snapshot(tensors, shapes, {"step": float(step)}))
        state = TrainState(step=step, cursor=8 * step, tokens=1000 * step)
        store.commit(path, 2, "t", state, {"parallel": {"dp": 2, "zero_stage": 1}}, 5)
    (folder / "config.yaml").write_text("run: {}")
    return folder


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_list_names_the_newest_that_can_be_resumed(muster, run_dir):
    shard = manifest.folder(run_dir, 6) / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    manifest.folder(run_dir, 8).mkdir()
    (run_dir / "checkpoints" / "step-00000010.refused").mkdir()
    code, out, _ = muster("list", str(run_dir))
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[:2] for line in lines[:3]] == [["step", "2"], ["step", "4"], ["step", "6"]]
    assert lines[1].endswith("newest resumable")
    assert str(shard) in lines[2]
    assert lines[3:] == ["set aside: step-00000010.refused", "unfinished: step-00000008"]
    found = json.loads(muster("list", str(run_dir), "--json")[1])
    assert found["newest_resumable"] == 4
    assert [(row["step"], row["files"], len(row["problems"])) for row in found["checkpoints"]] == [
        (2, 2, 0), (4, 2, 0), (6, 2, 1),
    ]  # fmt: skip


def test_show_tells_state_topology_and_sizes(muster, run_dir):
    code, out, _ = muster("show", "first", "--root", str(run_dir.parent))
    assert code == 0
    for line in (
        "written by 2 processes: dp=2 zero_stage=1", "cursor: 48", "tokens: 6,000", "step: 6", "loss_scale: None",
        "weight: 10 elements in 1 tensor", "exp_avg: 10 elements in 1 tensor",
    ):  # fmt: skip
        assert line in out.splitlines()
    found = json.loads(muster("show", str(run_dir), "--step", "2", "--json")[1])
    assert found["states"]["weight"]["shapes"] == {"a": [2, 5]}
    assert found["state"]["cursor"] == 16
    (manifest.folder(run_dir, 6) / "manifest.json").write_text("{")
    code, _, err = muster("show", str(run_dir))
    assert (code, "manifest.json" in err) == (2, True)


def test_verify_names_every_damaged_file(muster, run_dir):
    assert muster("verify", str(run_dir))[0] == 0
    damaged = [manifest.folder(run_dir, 2) / "rank-00000.safetensors", manifest.folder(run_dir, 4)]
    flip(damaged[0])
    flip(damaged[1] / "rank-00000.safetensors")
    (damaged[1] / "rank-00001.safetensors").unlink()
    code, out, _ = muster("verify", str(run_dir))
    assert code == 1
    assert out.count("damaged: ") == 3
    assert f"{damaged[0]} does not match the manifest's sha256" in out
    assert "rank-00001.safetensors is missing" in out
    assert "step-00000006: 2 files" in out
    assert muster("verify", str(run_dir), "--step", "6")[0] == 0
    code, out, _ = muster("verify", str(run_dir), "--step", "2", "--json")
    assert code == 1
    assert [len(row["problems"]) for row in json.loads(out)["checkpoints"]] == [1]


def test_mistakes_are_exit_code_2(muster, run_dir, tmp_path):
    for command in ("list", "show", "verify"):
        code, _, err = muster(command, "secnd", "--root", str(tmp_path))
        assert (code, "no run 'secnd'" in err) == (2, True)
    for command in ("show", "verify"):
        code, _, err = muster(command, "first", "--step", "5", "--root", str(tmp_path))
        assert code == 2
        assert "no checkpoint of step 5: its checkpoints are at steps 2, 4, 6" in err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("run: {}")
    assert muster("list", "empty", "--root", str(tmp_path))[:2] == (0, "empty has no checkpoints\n")
    assert muster("verify", "empty", "--root", str(tmp_path))[0] == 2
