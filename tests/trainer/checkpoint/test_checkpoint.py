"""Checkpoints: written by one topology, read by another, bit for bit; damage is refused."""

import errno
import threading
import time

import pytest
import torch
from engines import EngineRun, load_again, load_and_continue, save_and_continue
from support import resolved

from trainer.checkpoint import manifest, save, store
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.save import copied
from trainer.checkpoint.store import Reader, Snapshot
from trainer.engine.start import start_processes
from trainer.state import TrainState


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


def config(stage: int, dp: int, precision: str = "fp32", optim: str = "adamw"):
    return resolved(
        train={"micro_batch": 1, "global_batch": 4, "precision": precision},
        optim={"name": optim, "warmup": 2, "ema_decay": 0.4},
        parallel={"zero_stage": stage, "dp": dp},
    )


def states(path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {f"{key}/{name}": reader.read(key, name) for key in reader.states for name in reader.manifest.shapes[key]}


def run(pair, dp, function, *arguments):
    return pair(function, *arguments) if dp == 2 else [function(*arguments)]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("saved", "loaded", "precision"),
    [
        ((0, 1), (3, 2), "fp32"),
        ((3, 2), (0, 1), "bf16"),
        ((1, 2), (2, 1), "fp32"),
        ((2, 2), (1, 2), "bf16"),
        ((0, 2), (0, 2), "bf16"),
        ((3, 1), (3, 1), "fp32"),
    ],
)
def test_any_stage_and_size_to_any_other(pair, tmp_path, saved, loaded, precision):
    """Every state is bit-equal after the round trip; in the same topology, so is every later loss."""
    path, again = tmp_path / "step-00000003", tmp_path / "step-00000004"
    went_on = run(pair, saved[1], save_and_continue, config(*saved, precision), path, 3, 6, "a")
    results = run(pair, loaded[1], load_and_continue, config(*loaded, precision), path, 3, 6)
    for rank, (fragments, _) in enumerate(results):
        shapes = Reader(path).manifest.shapes
        store.write_shard(again, rank, "b", Snapshot(fragments, shapes, {}))
    store.commit(again, loaded[1], "b", TrainState(step=4), {}, 10)
    first, second = states(path), states(again)
    assert first.keys() == second.keys()
    assert any("exp_avg_sq" in name for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    outcomes = results[0][1]
    if saved == loaded:
        assert outcomes == went_on[0]
    else:
        tolerance = 1e-5 if precision == "fp32" else 2e-3
        assert [o[0] for o in outcomes] == pytest.approx([o[0] for o in went_on[0]], rel=tolerance)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_in_use_can_be_restored(pair, tmp_path, stage):
    """As after a loss spike."""
    for went_on, again in pair(load_again, config(stage, 2), tmp_path / "step-00000002", 2, 4):
        assert again == went_on


@pytest.mark.few(3)
@pytest.mark.parametrize("optim", ["sgd", "adagrad", "rmsprop", "lion", "adafactor", "muon"])
def test_every_optimizer_resumes_bit_exactly(tmp_path, optim):
    path = tmp_path / "step-00000003"
    went_on = save_and_continue(config(0, 1, optim=optim), path, 3, 6, "a")
    _, outcomes = load_and_continue(config(0, 1, optim=optim), path, 3, 6)
    assert outcomes == went_on


@pytest.mark.few(2)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_an_optimizer_step_waits_for_the_copy(tmp_path, monkeypatch, stage, precision):
    """Training continues while the other thread copies; here the copy starts only when the optimizer wants to step."""
    settings, stepping = config(stage, 1, precision), threading.Event()

    def late(views, buffers):
        assert stepping.wait(60)
        time.sleep(0.1)  # long enough for a step that does not wait
        return copied(views, buffers)

    monkeypatch.setattr(save, "copied", late)
    run = EngineRun(settings)
    run.steps(1, 2)
    before = {key: view.clone() for key, view in save.share(run.engine).tensors.items()}
    run.engine.optimizer.register_step_pre_hook(lambda *_: stepping.set())
    saver = save.Saver(tmp_path, settings.model_dump(mode="json"), None, background=True, timeout_s=60)
    saver.save([run.engine], TrainState(step=2), 1)
    run.steps(3, 4)
    saver.wait()
    written = states(manifest.folder(tmp_path, 2))
    assert len(written) == len(before)
    changed = dict(save.share(run.engine).tensors)
    for key, value in before.items():
        assert torch.equal(written[key.removesuffix("@0")], value), key
        assert not torch.equal(changed[key], value)


def test_a_failed_copy_does_not_block_training(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "copied", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    run = EngineRun(config(1, 1))
    saver = save.Saver(tmp_path, run.config.model_dump(mode="json"), None, background=True, timeout_s=60)
    saver.save([run.engine], TrainState(step=0), 1)
    run.steps(1, 1)
    saver.wait()
    assert manifest.committed(tmp_path) == []


def snapshot() -> Snapshot:
    weight = torch.arange(10.0)
    return Snapshot({"weight/a@0": weight[:4], "weight/a@4": weight[4:]}, {"weight": {"a": [2, 5]}}, {"step": 3.0})


def write(run_dir, step: int) -> store.Path:
    path = manifest.folder(run_dir, step)
    store.write_shard(path, 0, "t", snapshot())
    store.commit(path, 1, "t", TrainState(step=step), {}, 5)
    return path


def test_read_any_range_across_fragments(tmp_path):
    reader = Reader(write(tmp_path, 1))
    assert torch.equal(reader.read("weight", "a", 2, 5), torch.arange(2.0, 7.0))
    assert reader.weight("a").shape == (2, 5)
    with pytest.raises(CheckpointError, match="incomplete"):
        reader.read("weight", "a", 8, 5)
    with pytest.raises(CheckpointError, match="has no exp_avg of a"):
        reader.read("exp_avg", "a")


def test_only_a_manifest_makes_a_checkpoint(tmp_path):
    store.write_shard(manifest.folder(tmp_path, 1), 0, "t", snapshot())
    assert manifest.committed(tmp_path) == []
    write(tmp_path, 2)
    assert manifest.committed(tmp_path) == [2]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_named(tmp_path, damage):
    path = write(tmp_path, 1)
    shard = path / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-4])
    elif damage == "delete":
        shard.unlink()
    else:
        (path / "manifest.json").write_text("{")
    problems = store.verify(path)
    assert len(problems) == 1
    expected = {"flip": "sha256", "truncate": "bytes", "delete": "missing", "manifest": "manifest.json"}
    assert expected[damage] in problems[0]


def test_old_checkpoints_are_deleted_except_kept_ones(tmp_path):
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step)
    assert store.prune(tmp_path, keep=2, keep_every=4) == [2, 6]
    assert manifest.committed(tmp_path) == [4, 8, 10]


def test_a_failed_deletion_does_not_fail_the_new_checkpoint(tmp_path, monkeypatch):
    for step in (2, 4, 6, 8):
        manifest.folder(tmp_path, step).mkdir(parents=True)
        (manifest.folder(tmp_path, step) / manifest.MANIFEST).write_text("{}")
    remove = store.remove

    def busy(path):
        if path.name.endswith("2"):
            raise OSError(errno.EBUSY, "busy", str(path))
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(store, "remove", busy)
        assert store.prune(tmp_path, keep=2, keep_every=None) == [4]
    assert manifest.committed(tmp_path) == [2, 6, 8]
    assert store.prune(tmp_path, keep=2, keep_every=None) == [2]


def test_a_rank_that_cannot_write_is_named(tmp_path):
    path = manifest.folder(tmp_path, 1)
    path.mkdir(parents=True)
    (path / "rank-00000.safetensors").mkdir()  # a folder where the file should go
    with pytest.raises(OSError):
        store.write_shard(path, 0, "t", snapshot())


def test_manifest_cannot_name_a_file_outside_its_folder(tmp_path):
    path = write(tmp_path, 1)
    text = (path / "manifest.json").read_text().replace("rank-00000.safetensors", "../rank-00000.safetensors")
    (path / "manifest.json").write_text(text)
    assert "outside its folder" in store.verify(path)[0]
