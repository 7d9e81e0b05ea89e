"""Runs of autoencoders, GANs and diffusion models: the same in any number of processes, through any number of lives."""

import signal
from collections.abc import Callable
from pathlib import Path

import generative_runs as runs
import numpy as np
import pytest
import torch
from faults import kill_at_step
from generative_runs import EVERY, NOT_ZERO_3, RUNS, make, trained_in_turn
from PIL import Image
from plugin_runs import drawn, state
from support import train_in_process
from teams import in_team

from configs import ConfigError
from trainer.record.lines import read_events

SLOW = pytest.mark.slow
QUICK = ("vae", "unet", "gan")
"""One of each family."""
OTHERS = tuple(name for name in RUNS if name not in QUICK)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Callable[..., dict[str, Path]]:
    """Runs by their names, never stopped, in one process for those that are asked for together."""
    made: dict[str, Path] = {}

    def of(*names: str) -> dict[str, Path]:
        new = {name: make(name, tmp_path_factory.mktemp("clean")) for name in names if name not in made}
        if new:
            assert in_team(1, trained_in_turn, list(new.values())) == [["FINISHED"] * len(new)]
        made.update(new)
        return {name: made[name] for name in names}

    return of


TEAMS = [
    (QUICK, 1), (OTHERS, 1), (tuple(RUNS), 0), (tuple(RUNS), 2),
    (tuple(name for name in RUNS if name not in NOT_ZERO_3), 3),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("names", "zero"), TEAMS, ids=["quick-1", "others-1", "all-0", "all-2", "some-3"])
def test_two_processes_train_as_one_does(tmp_path, clean, names, zero):
    made = [make(name, tmp_path, "parallel.dp=2", f"parallel.zero_stage={zero}") for name in names]
    assert in_team(2, trained_in_turn, made) == [["FINISHED"] * len(made)] * 2
    for name, run_dir in zip(names, made, strict=True):
        one = clean(*names)[name]
        mine = runs.numbers(run_dir)
        assert len(mine) > 20
        assert mine == pytest.approx(runs.numbers(one), rel=1e-5, abs=1e-5), name
        found, wanted = runs.weights(run_dir), runs.weights(one)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-5) for key in wanted), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, name):
    run_dir = make(name, tmp_path, "checkpoint.background=false")
    assert train_in_process(run_dir, kill_at_step, EVERY + 2, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [EVERY]
    one = clean(name)[name]
    assert state(run_dir, runs.STEPS) == state(one, runs.STEPS)
    assert runs.numbers(run_dir) == runs.numbers(one)


@SLOW
@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_measures_nearly_what_fp32_does(tmp_path, clean, zero):
    names = [name for name in RUNS if name != "wgan"]  # whose loss is nearly 0
    made = [make(name, tmp_path, "train.precision=bf16", f"parallel.zero_stage={zero}") for name in names]
    assert in_team(1, trained_in_turn, made) == [["FINISHED"] * len(made)]
    for name, run_dir in zip(names, made, strict=True):
        mine, one = (runs.numbers(where)[2, "loss"] for where in (run_dir, clean(*RUNS)[name]))
        assert mine == pytest.approx(one, rel=0.03), name
        assert mine != one


SHOWN = {"vae": (3, 16), "unet": (4, 4), "gan": (4, 4)}
"""Rows and columns of images. Of a VAE: originals, what is made of them, and what it makes of its prior."""
MORE = {"vqvae": (2, 16), "denoising": (3, 16), "contractive": (2, 16), "dit": (4, 4), "style": (4, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("shown", [SHOWN, MORE])
def test_images_are_shown(clean, shown):
    for name, run_dir in clean(*shown).items():
        with Image.open(drawn(run_dir)) as image:
            assert np.asarray(image).shape == tuple(9 * count - 1 for count in shown[name]), name


@pytest.mark.slow
def test_samples_are_measured_in_evaluations_alone(clean):
    for name in ("unet", "gan"):
        found = runs.numbers(clean(*QUICK)[name])
        for key in ("eval_frechet", "eval_coverage", "eval_frechet_ema", "eval_coverage_ema"):
            assert (runs.STEPS, key) in found
        assert not any(key in ("frechet", "coverage") for _, key in found)


@SLOW
def test_a_critics_weights_are_clipped(clean):
    found = {name: weight.abs().max().item() for name, weight in runs.weights(clean("wgan")["wgan"]).items()}
    assert all(value <= 0.01 for name, value in found.items() if name.startswith("discriminator."))
    assert found["discriminator.head.weight"] == pytest.approx(0.01)
    assert max(found.values()) > 0.1


def test_another_size_of_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^model\.image_size is 16, but data\.path=.* has images of 8 x 8: set"):
        make("unet", tmp_path, "model.image_size=16")


def test_zero_3_is_refused_where_a_loss_depends_on_a_gradient(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.family=autoencoder as configured trains with ZeRO 0 to 2\. Nearest"):
        make("contractive", tmp_path, "parallel.zero_stage=3")
