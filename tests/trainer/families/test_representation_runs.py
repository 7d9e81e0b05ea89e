"""Networks taught by their own average, images with texts, and series: the same in any topology, through any kill."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from faults import kill_at_step, trained
from plugin_runs import assert_same_weights, numbers, state
from support import train_in_process
from teams import in_team

from configs import load
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run

pytestmark = pytest.mark.slow
STEPS = 6
RUNS = {
    "digits-byol": ("optim.ema_decay=0.9", "train.global_batch=32"),
    "glyphs": ("model.text.dropout=0.1", "train.global_batch=32"),
    "pendulums": ("model.given=random",),
}


def make(name: str, root: Path, *overrides: str) -> Path:
    """Six steps of four micro-batches, of which the last has padding, unless BatchNorm would see it."""
    keys = [
        f"run.root={root}", f"train.steps={STEPS}", "train.global_batch=30", "train.micro_batch=8",
        "checkpoint.every=1", "train.eval_every=3", "train.eval_sequences=20", "optim.name=sgd",
        "optim.lr=0.02", "optim.warmup=0", "tracking.enabled=false",
    ]  # fmt: skip
    return prepare_run(load(name, [*keys, *RUNS[name], *overrides]))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Callable[[str], Path]:
    """A run that was never stopped, in one process."""

    @cache
    def run(name: str) -> Path:
        run_dir = make(name, tmp_path_factory.mktemp("clean"))
        assert train_in_process(run_dir) == 0
        return run_dir

    return run


@pytest.mark.parametrize(
    ("zero", "name"), [(zero, name) for zero in range(4) for name in RUNS if (zero, name) != (3, "pendulums")]
)
def test_two_processes_train_as_one_does(tmp_path, clean, name, zero):
    run_dir = make(name, tmp_path, "parallel.dp=2", f"parallel.zero_stage={zero}")
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean(name))
    assert len(mine) > 2 * STEPS
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5, abs=1e-6)
    assert_same_weights(run_dir, clean(name))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, name):
    run_dir = make(name, tmp_path, "checkpoint.background=false")
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean(name))
    assert numbers(run_dir) == numbers(clean(name))


@pytest.mark.parametrize("zero", range(4))
def test_negatives_of_the_global_batch_are_those_of_one_process(tmp_path, zero):
    keys = ["train.negatives=global_batch", "train.global_batch=31", "model.convnet.norm=layer"]
    one = make("glyphs", tmp_path / "one", *keys, "train.micro_batch=31")
    assert train_in_process(one) == 0
    two = make(
        "glyphs", tmp_path / "two", *keys, "train.micro_batch=16", "parallel.dp=2", f"parallel.zero_stage={zero}"
    )
    assert in_team(2, trained, two) == ["FINISHED", "FINISHED"]
    losses = [[entry[2] for entry in numbers(each) if entry[1] in ("loss", "grad_norm")] for each in (two, one)]
    assert len(losses[0]) == 2 * STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_weights(two, one)
