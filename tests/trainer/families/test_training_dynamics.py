"""Runs with what changes how a network is trained: the same in any topology, and through a kill."""

import signal
from pathlib import Path

import pytest
import torch
from faults import kill_at_step
from generative_runs import trained_in_turn
from plugin_runs import numbers, state
from support import train_in_process
from teams import in_team

from configs import from_dict
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run

STEPS = 6
NET = {"family": "convnet", "channels": 1, "stages": [{"width": 8, "pool": "max2"}, {"width": 16}]}
WAYS: dict[str, dict[str, dict]] = {
    "mixing": {
        "train": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1},
        "data": {"images": {"channels": 1, "crop": 1, "jitter": 0.3}},
    },
    "around a step": {
        "optim": {"lookahead_every": 2, "gradient_noise": 1e-3, "l1": 1e-3, "ema_decay": 0.9, "momentum": 0.5},
    },
    "sam": {"optim": {"sam": 0.05}},
    "lsuv": {"model": NET | {"init": "lsuv", "norm": "group", "spatial_dropout": 0.2}},
}
NOT_ZERO_3 = ("sam",)
"""Refused there."""


def make(way: str, root: Path, **sections) -> Path:
    """Six steps of three micro-batches: of two processes one has a fourth, all padding."""
    tree = {
        "run": {"name": way.replace(" ", "-"), "root": str(root)},
        "model": NET,
        "data": {"path": "bundled:digits", "images": {"channels": 1}},
        "train": {"steps": STEPS, "global_batch": 24, "micro_batch": 8, "precision": "fp32", "eval_sequences": 5},
        "optim": {"name": "sgd", "lr": 0.1},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }  # fmt: skip
    for more in (WAYS[way], sections):
        tree |= {name: tree.get(name, {}) | keys for name, keys in more.items()}
    return prepare_run(from_dict(tree))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, Path]:
    """A run of each that was never stopped, all in one process."""
    runs = {way: make(way, tmp_path_factory.mktemp("clean")) for way in WAYS}
    assert in_team(1, trained_in_turn, list(runs.values()), timeout_s=900) == [["FINISHED"] * len(runs)]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_two_processes_measure_what_one_does(tmp_path, clean, zero):
    ways = [way for way in WAYS if zero < 3 or way not in NOT_ZERO_3]
    made = [make(way, tmp_path, parallel={"dp": 2, "zero_stage": zero}) for way in ways]
    assert in_team(2, trained_in_turn, made, timeout_s=900) == [["FINISHED"] * len(made)] * 2
    for way, run_dir in zip(ways, made, strict=True):
        mine, one = numbers(run_dir), numbers(clean[way])
        assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
        assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5, abs=1e-6), way
        after, before = (Reader(folder(where, STEPS)) for where in (run_dir, clean[way]))
        for key in before.states:
            for name in before.manifest.shapes[key]:
                assert torch.allclose(after.read(key, name), before.read(key, name), atol=1e-5), (way, key, name)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, way):
    run_dir = make(way, tmp_path, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    found = state(run_dir)
    assert ("slow", "head.0.weight") in found or way != "around a step"
    assert found == state(clean[way])
    assert numbers(run_dir) == numbers(clean[way])
