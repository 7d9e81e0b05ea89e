"""Runs of autoencoders, GANs and diffusion models: the same in any number of processes, through any number of lives."""

import signal
from pathlib import Path

import generative_runs as runs
import numpy as np
import pytest
import torch
from faults import kill_at_step
from generative_runs import EVERY, RUNS, make, trained_in_turn
from PIL import Image
from plugin_runs import drawn, state
from support import train_in_process
from teams import in_team

from configs import ConfigError
from trainer.record.lines import read_events

SLOW = pytest.mark.slow
QUICK = ("vae",)
"""Those that a quick test kills; all of them are compared across processes."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, Path]:
    """Never stopped, in one process."""
    made = {name: make(name, tmp_path_factory.mktemp("clean")) for name in RUNS}
    assert in_team(1, trained_in_turn, list(made.values())) == [["FINISHED"] * len(made)]
    return made


@pytest.mark.parametrize("zero", [1, *(pytest.param(stage, marks=SLOW) for stage in (0, 2, 3))])
def test_two_processes_train_as_one_does(tmp_path, clean, zero):
    names = [name for name in RUNS if zero < 3 or name not in runs.NOT_ZERO_3]
    made = [make(name, tmp_path, "parallel.dp=2", f"parallel.zero_stage={zero}") for name in names]
    assert in_team(2, trained_in_turn, made) == [["FINISHED"] * len(made)] * 2
    for name, run_dir in zip(names, made, strict=True):
        mine, one = runs.numbers(run_dir), runs.numbers(clean[name])
        assert len(mine) > 20
        assert mine == pytest.approx(one, rel=1e-5, abs=1e-5), name
        found, wanted = runs.weights(run_dir), runs.weights(clean[name])
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-5) for key in wanted), name


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in RUNS])
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, name):
    run_dir = make(name, tmp_path, "checkpoint.background=false")
    assert train_in_process(run_dir, kill_at_step, EVERY + 2, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [EVERY]
    assert state(run_dir, runs.STEPS) == state(clean[name], runs.STEPS)
    assert runs.numbers(run_dir) == runs.numbers(clean[name])


def test_rows_of_images_are_shown(clean):
    """Originals, what is made of them, and for a VAE what it makes of its prior; 16 in each. Of a diffusion model and
    a generator, what they make: 16."""
    for name in ("unet", "dit", "gan"):
        with Image.open(drawn(clean[name])) as image:
            assert np.asarray(image).shape == (4 * 9 - 1, 4 * 9 - 1)
    for name, rows in {"vae": 3, "vqvae": 2, "denoising": 3, "contractive": 2}.items():
        with Image.open(drawn(clean[name])) as image:
            assert np.asarray(image).shape == (9 * rows - 1, 16 * 9 - 1), name


def test_samples_are_measured_in_evaluations_alone(clean):
    found = runs.numbers(clean["unet"])
    for key in ("eval_frechet", "eval_coverage", "eval_frechet_ema", "eval_coverage_ema"):
        assert (runs.STEPS, key) in found
    assert not any(key in ("frechet", "coverage") for _, key in found)
    assert not any("coverage" in key for _, key in runs.numbers(clean["dit"]))


def test_a_critics_weights_are_clipped(clean):
    found = {name: weight.abs().max().item() for name, weight in runs.weights(clean["wgan"]).items()}
    assert all(value <= 0.01 for name, value in found.items() if name.startswith("discriminator."))
    assert found["discriminator.head.weight"] == pytest.approx(0.01)
    assert max(found.values()) > 0.1


def test_another_size_of_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.image_size is 16, but data\.path=.* has images of 8 x 8: set"):
        make("unet", tmp_path, "model.image_size=16")


def test_zero_3_is_refused_where_a_loss_depends_on_a_gradient(tmp_path):
    with pytest.raises(ConfigError, match=r"^parallel\.zero_stage=3: the loss of model\.family=autoencoder depends"):
        make("contractive", tmp_path, "parallel.zero_stage=3")
