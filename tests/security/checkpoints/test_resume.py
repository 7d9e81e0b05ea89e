"""What a resume does beside a refused checkpoint: in several processes, on a fork, and what the commands say of it."""

import shutil
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import EXTRA_PARAMETER, MODEL, SHARD, WEIGHT, Change, content, manifest, numbers, seal, text
from engines import EngineRun, resume_each, write_run
from support import resolved

from configs import ConfigError
from trainer.checkpoint import store
from trainer.checkpoint.manifest import committed, folder
from trainer.checkpoint.save import take_snapshot
from trainer.record.lines import Record
from trainer.state import TrainState


@pytest.mark.few(1)
@pytest.mark.parametrize("parallel", [{"dp": 2, "zero_stage": 3}, {"pp": 2, "zero_stage": 1}])
def test_processes_that_share_the_check_go_on_from_one_checkpoint(pair, tmp_path, parallel):
    """Also where only one of them has read what is wrong, or none has all of the model's names."""
    config = resolved(
        model=MODEL | {"num_layers": 2, "router_bias_rate": None}, parallel=parallel,
        train={"micro_batch": 1, "global_batch": 4, "precision": "fp32"},
    )  # fmt: skip
    pair(write_run, config, tmp_path / "run")
    second = "rank-00001.safetensors"

    def last_number(path: Path) -> None:
        (path / second).write_bytes((path / second).read_bytes()[:-4] + b"\xff\xff\xff\x7f")
        seal(path)

    changes: dict[str, Change] = {
        "whole": lambda path: None,
        "not finite": last_number,
        "gone": lambda path: (path / second).unlink(),
        "cut": content(lambda data: data[:-4]),
        "more": EXTRA_PARAMETER,
        "state": manifest("state", "starved", to=[[0]]),
    }
    run_dirs = [shutil.copytree(tmp_path / "run", tmp_path / name) for name in changes]
    for run_dir, change in zip(run_dirs, changes.values(), strict=True):
        change(folder(run_dir, 2))
    assert pair(resume_each, config, run_dirs) == [[2, 1, 1, 1, 1, 1]] * 2
    assert [committed(run_dir) for run_dir in run_dirs] == [[1, 2], *[[1]] * 5]


def test_a_step_that_is_not_finite_leaves_no_checkpoint_that_is_refused(run_dir, config):
    """The promise above rests on this: a step that would make such numbers is skipped."""
    run = EngineRun(config)
    run.steps(1, 1)
    before = take_snapshot(run.engine)
    for parameter in run.engine.module.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    run.steps(2, 3)
    after = take_snapshot(run.engine)
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)
    path = folder(run_dir, 3)
    store.write_shard(path, 0, "t", after)
    store.commit(path, 1, "t", TrainState(step=3), {}, 5)
    assert store.verify(path) == []


def test_folders_of_other_names_are_no_checkpoints(run_dir):
    for name in ("step-\u00b2", "step-3", "step-000000002", "step-", "step--1", f"step-{'9' * 5000}"[:200]):
        shutil.copytree(folder(run_dir, 2), run_dir / "checkpoints" / name)
    assert committed(run_dir) == [1, 2]


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.symlink_to("/"), Path.mkdir])
def test_what_stands_where_a_refused_one_goes_makes_room(run_dir, resumed, make):
    make(run_dir / "checkpoints" / "step-00000002.refused")
    (folder(run_dir, 2) / "manifest.json").write_text("{")
    assert resumed(run_dir) == 1
    assert (run_dir / "checkpoints" / "step-00000002.refused" / SHARD).is_file()


@pytest.mark.parametrize("origin", ["", "\0", "/nowhere", "\x1b]0;x\x07", "x" * 10_000, "/dev/stdin"])
def test_a_fork_from_what_is_no_checkpoint_is_refused(run_dir, resumed, origin):
    shutil.rmtree(run_dir / "checkpoints")
    Record(run_dir, 0).event("forked", checkpoint=origin)
    with pytest.raises(ConfigError, match=r"the checkpoint that this run was forked from cannot be used"):
        resumed(run_dir)


@pytest.mark.parametrize("change", [text("null"), manifest("state", "cursor", to=-1), numbers(WEIGHT, float("nan"))])
def test_commands_say_it_in_one_message(muster, run_dir, tmp_path, change):
    path = folder(run_dir, 2)
    change(path)
    at = ("--step", "2", "--root", str(run_dir.parent))
    content = change is not None and store.verify(path, digests=False) == []
    for command in ("show", "generate", "eval", "export"):
        options = {"generate": ["--prompt", "a"], "export": ["--to", str(tmp_path / "out")]}.get(command, [])
        words = ["checkpoint", command] if command == "show" else [command]
        code, out, err = muster(*words, "run", *options, *at)
        if command == "show" and content:
            assert code == 0  # it reads no numbers
        else:
            assert (code, err.count("\n") <= 3, "Traceback" in err) == (2, True, False), (command, err)
    code, out, _ = muster("checkpoint", "list", "run", "--root", str(run_dir.parent))
    assert (code, "damaged: " in out) == (0, not content)
    code, out, _ = muster("checkpoint", "verify", "run", "--root", str(run_dir.parent))
    assert (code, out.count("damaged: ")) == (1, 1)
