"""Noise schedules and samplers: DDPM's and DDIM's own formulas, and where exact solutions are known, those."""

import math

import pytest
import torch
from torch import Tensor

from configs.sections.families.generative import DiffusionConfig
from models.generative.paths import Guess, Path, signal_levels

KINDS = [("epsilon", "linear"), ("v", "linear"), ("v", "cosine"), ("flow", "linear")]


def path(prediction="epsilon", schedule="linear", **keys) -> Path:
    return Path(DiffusionConfig(prediction=prediction, schedule=schedule, **keys))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_levels_are_those_of_the_papers():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # arXiv:2006.11239
    linear = signal_levels("linear", 1000)
    assert torch.allclose(linear[1:], torch.cumprod(1 - betas, 0))
    cosine = signal_levels("cosine", 1000)  # arXiv:2102.09672, equation 17; its last steps are held at 0.999

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    assert [cosine[n].item() for n in (0, 10, 500, 900)] == pytest.approx(
        [f(n / 1000) / f(0) for n in (0, 10, 500, 900)]
    )
    assert 0 < cosine[-1] < 1e-5
    for levels in (linear, cosine):
        assert (levels.diff() < 0).all()


@pytest.mark.parametrize(("prediction", "schedule"), KINDS)
def test_a_right_prediction_gives_image_and_noise(prediction, schedule):
    at = path(prediction, schedule)
    truth, t = (
        Guess(drawn(5, 1, 2, 2).clamp(-1, 1), drawn(5, 1, 2, 2, seed=1)),
        torch.tensor([0.01, 0.2, 0.5, 0.8, 0.95]),
    )
    x = at.mixed(truth, t)
    for found, wanted in zip(at.guess(x, at.target(truth, t), t), truth, strict=True):
        assert torch.allclose(found, wanted, atol=2e-4)
    assert torch.equal(at.mixed(truth, torch.zeros(5)), truth.image)


def test_v_is_what_its_paper_says():
    """arXiv:2202.00512, appendix D."""
    at, t = path("v", "cosine"), torch.tensor([0.3])
    image, noise = drawn(1, 1, 2, 2), drawn(1, 1, 2, 2, seed=1)
    alpha, sigma = at.levels(t)
    assert torch.allclose(at.target(Guess(image, noise), t), alpha * noise - sigma * image)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(1))


def test_a_step_with_fresh_noise_is_ddpms():
    """arXiv:2006.11239, equations 6 and 7: mean and variance of the step before."""
    at, n, levels = path(), 300, signal_levels("linear", 1000)
    t, s = torch.tensor([n / 1000]), torch.tensor([(n - 1) / 1000])
    image, noise, fresh = drawn(1, 1, 2, 2).clamp(-1, 1), drawn(1, 1, 2, 2, seed=1), drawn(1, 1, 2, 2, seed=2)
    x = at.mixed(Guess(image, noise), t)
    bar, before = levels[n], levels[n - 1]
    beta = 1 - bar / before
    mean = before.sqrt() * beta / (1 - bar) * image + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
    deviation = ((1 - before) / (1 - bar) * beta).sqrt()
    found = at.step(x, Guess(image, noise), t, s, fresh)
    assert torch.allclose(found, (mean + deviation * fresh).float(), atol=1e-5)


def gaussian(at: Path, deviation: float):
    """The exact prediction for images that are normal, with this standard deviation."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = at.levels(t)
        variance = alpha**2 * deviation**2 + sigma**2
        return at.target(Guess(alpha * deviation**2 * x / variance, sigma * x / variance), t)

    return predict


@pytest.mark.parametrize(("prediction", "schedule"), KINDS)
def test_heun_is_of_second_order_and_ddim_of_first(prediction, schedule):
    """Of normal images the way back is known: x(t) keeps its place among the standard deviations."""
    noise, wanted = torch.linspace(-1.5, 1.5, 7).view(7, 1, 1, 1), 0.2
    errors = {}
    for sampler in ("ddim", "heun"):
        for steps in (10, 20):
            at = path(prediction, schedule, sampler=sampler, sample_steps=steps)
            found = at.sample(gaussian(at, wanted), noise, lambda step: torch.zeros(()))
            errors[sampler, steps] = (found - wanted * noise).abs().max().item()
    assert errors["heun", 20] < errors["ddim", 20] < errors["ddim", 10]
    assert errors["heun", 20] < errors["heun", 10]
    if (prediction, schedule) not in KINDS[:2]:  # whose last step begins at a sigma of 0.17
        assert errors["ddim", 20] < errors["ddim", 10] / 1.5
        assert errors["heun", 20] < min(errors["heun", 10] / 2, errors["ddim", 20] / 2, 0.03)


def test_ddpm_draws_from_the_distribution():
    at = path(sampler="ddpm", sample_steps=1000)
    found = at.sample(gaussian(at, 0.3), drawn(4000, 1, 1, 1), lambda step: drawn(4000, 1, 1, 1, seed=step + 1))
    assert found.std().item() == pytest.approx(0.3, rel=0.06)
    assert found.mean().item() == pytest.approx(0, abs=0.02)
