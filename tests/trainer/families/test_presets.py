"""The presets on bundled data reach what they say, in any number of processes, through any number of lives."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from faults import kill_at_step, trained
from plugin_runs import numbers, state
from support import train_in_process
from teams import in_team

from configs import load
from configs.load import presets
from configs.sections.data import BUNDLED
from trainer.data.bundled import at_hand
from trainer.data.kinds import kind_of
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

SLOW = pytest.mark.slow
STATED = {preset.name: preset.held_out for preset in presets() if load(preset.name).data.path in BUNDLED}
METRICS = {"accuracy": "eval_accuracy", "R2": "eval_r2", "mse": "eval_mse", "coverage": "eval_coverage_ema"}
METRICS |= {"linear-probe accuracy": "eval_probe_accuracy", "loss": "eval_loss"}
METRICS |= {"hidden mse": "eval_mse_hidden"}
METRICS |= {"image recall": "eval_image_recall"}
KINDS = ("rows", "images", "graphs", "nodes", "texts", "captions", "series")
QUICK = ("xor", "wine", "diabetes", "nodes")
"""The others take a minute or more."""


def make(name: str, root: Path, *overrides: str) -> Path:
    return prepare_run(load(name, [f"run.root={root}", "tracking.enabled=false", *overrides]))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in sorted(STATED)])
def test_a_preset_reaches_what_it_states(tmp_path, name):
    metric, value = STATED[name].rsplit(" ", 1)
    run_dir = make(name, tmp_path)
    assert train_in_process(run_dir) == 0
    *_, last = [m for m in read_metrics(run_dir) if "eval_loss" in m]
    [held_out] = [last[key] for key in (f"eval_{kind}" for kind in KINDS) if key in last]
    assert held_out == len(kind_of(config := load(name, [f"run.root={tmp_path}"])).open(config, "held_out"))
    # Another processor rounds otherwise, which may change an example or two.
    assert last[METRICS[metric]] == pytest.approx(float(value), abs=max(0.01, 2.5 / held_out))


def test_every_bundled_preset_states_its_result():
    assert set(QUICK) <= STATED.keys()
    assert all(STATED.values())
    assert {load(name).data.path for name in STATED} == BUNDLED.keys()


RUNS = {
    "wine": (),
    "digits-convnet": ("train.steps=40", "checkpoint.every=20"),
    "nodes": ("optim.name=sgd",),
    "digits-simclr": ("train.steps=40", "checkpoint.every=20", "train.global_batch=64", "train.micro_batch=32"),
}
"""Whole, or its beginning."""
LATER = ("nodes", "digits-simclr")
EACH_RUN = pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n in LATER else ()) for n in RUNS])


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Callable[[str], Path]:
    """Each never stopped, in one process, trained when it is first asked for."""
    root = tmp_path_factory.mktemp("clean")

    @cache
    def trained_once(name: str) -> Path:
        run_dir = make(name, root, *RUNS[name])
        assert train_in_process(run_dir) == 0
        return run_dir

    return trained_once


STAGES = [(name, 0) for name in RUNS]
"""AdamW's rounding differs from stage to stage, and by step 40 shows beyond the sixth digit."""
STAGES += [("digits-simclr", zero) for zero in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), STAGES)
def test_two_processes_measure_what_one_does(tmp_path, clean, name, zero):
    run_dir = make(name, tmp_path, *RUNS[name], "parallel.dp=2", f"parallel.zero_stage={zero}")
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = (
        {(m["step"], key): m[key] for m in read_metrics(where) for key in ("loss", "eval_loss") if key in m}
        for where in (run_dir, clean(name))
    )
    assert len(mine) > 40
    if name == "digits-simclr" and zero:  # sums of gradients are rounded otherwise, which grows from step to step
        mine, one = ({key: value for key, value in each.items() if key[0] <= 15} for each in (mine, one))
    assert mine == pytest.approx(one, rel=0, abs=1e-6)


@pytest.mark.slow
@EACH_RUN
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, name):
    run_dir = make(name, tmp_path, *RUNS[name], "checkpoint.background=false")
    every, last = (load(run_dir / "config.yaml").checkpoint.every, load(run_dir / "config.yaml").train.steps)
    assert train_in_process(run_dir, kill_at_step, every + 7, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [every]
    assert state(run_dir, last) == state(clean(name), last)
    assert numbers(run_dir) == numbers(clean(name))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[SLOW] if name == "bundled:functions" else []) for name in BUNDLED]
)
def test_data_are_written_once(tmp_path, name):
    """Under run.root/data, and the same wherever they are written."""
    config = load("wine", [f"data.path={name}", f"run.root={tmp_path / 'one'}"])
    file = Path(at_hand(config).path)
    assert file.parent == tmp_path / "one" / "data"
    before = file.stat()
    assert at_hand(config).path == str(file)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other = at_hand(load("wine", [f"data.path={name}", f"run.root={tmp_path / 'other'}"]))
    assert Path(other.path).read_bytes() == file.read_bytes()
