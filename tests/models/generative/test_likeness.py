"""Frechet distance and coverage: SciPy's and the paper's formulas, and what they say of a collapsed generator."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from models.generative.likeness import metrics, nothing, shapes, sums


def images(count: int, seed: int, modes: int = 4) -> torch.Tensor:
    """Of some modes in turn, each a fixed picture, with noise."""
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randn(modes, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    return pictures[torch.arange(count) % modes] + 0.1 * torch.randn(count, 1, 8, 8, generator=draw)


def measured(real: torch.Tensor, made: torch.Tensor, part: int = 50) -> dict[str, float]:
    found = nothing(1, real.device)
    for first in range(0, len(real), part):
        cut = slice(first, first + part)
        counted = torch.ones(len(real[cut]), dtype=torch.bool)
        found = {name: found[name] + value for name, value in sums(real[cut], made[cut], counted).items()}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes(1)
    return metrics({name: value.tolist() for name, value in found.items()})


@pytest.mark.parametrize("part", [10, 200])
def test_the_distance_is_that_of_all_images(part):
    real, made = images(200, 0), 0.8 * images(200, 1) + 0.3
    small = [torch.nn.functional.avg_pool2d(x, 2).flatten(1).double().numpy() for x in (real, made)]
    (mean, other), (spread, its) = (
        [f(x) for x in small] for f in (lambda x: x.mean(0), lambda x: np.cov(x.T, bias=True))
    )
    wanted = ((mean - other) ** 2).sum() + np.trace(spread + its - 2 * sqrtm(spread @ its).real)
    assert measured(real, made, part)["frechet"] == pytest.approx(wanted, rel=1e-3)


def test_the_same_images_are_alike():
    found = measured(images(100, 0), images(100, 0))
    assert found == {"frechet": pytest.approx(0, abs=1e-6), "coverage": 1.0}


def test_coverage_is_the_papers():
    """arXiv:2002.09797, equation 9."""
    real, made = images(50, 0), images(50, 1)
    a, b = real.flatten(1).numpy(), made.flatten(1).numpy()
    radius = np.sort(np.linalg.norm(a[:, None] - a, axis=2), 1)[:, 5]
    wanted = (np.linalg.norm(a[:, None] - b, axis=2).min(1) <= radius).mean()
    assert measured(real, made)["coverage"] == pytest.approx(wanted)


def test_a_collapse_is_seen():
    real = images(100, 0)
    whole, collapsed = measured(real, images(100, 1)), measured(real, images(100, 1, modes=1))
    assert whole["coverage"] > 0.8
    assert collapsed["coverage"] < 0.3
    assert collapsed["frechet"] > 20 * whole["frechet"]


def test_padding_is_left_out():
    real, made = images(20, 0), images(20, 1)
    counted = torch.arange(20) < 13
    found, wanted = sums(real, made, counted), sums(real[:13], made[:13], counted[:13])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert metrics({name: value.tolist() for name, value in nothing(1, real.device).items()}) == {}
