"""Random numbers of examples: their distribution, and that each use has its own."""

import pytest
import torch
from scipy import stats

from models.noise import normal, uniform

IDS = torch.arange(2000)


@pytest.mark.parametrize(
    "use", ["z", "latents", "input noise", "a use with a long name, of over sixty-four letters in all"]
)
def test_they_are_normal(use):
    found = normal(0, IDS, use, (2, 5)).flatten().double()
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert found.mean().abs() < 0.03
    assert found.var().item() == pytest.approx(1, abs=0.05)


def test_uses_that_begin_alike_have_nothing_in_common():
    one, other = (uniform(3, IDS, f"timesteps of {name}", (5,)).flatten() for name in ("training", "samples"))
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.04


def test_they_belong_to_the_example():
    whole, some = normal(1, IDS, "latents", (3,)), normal(1, IDS[100:110], "latents", (3,))
    assert torch.equal(whole[100:110], some)
    assert not torch.equal(whole, normal(2, IDS, "latents", (3,)))
