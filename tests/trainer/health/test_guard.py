"""When a loss counts as a spike."""

import math

import pytest

from configs.sections.train import SpikeConfig
from trainer.health.spikes import spike

WINDOW = [2.0, 4.0] * 4  # mean 3, deviation 1


@pytest.fixture
def config():
    return SpikeConfig(window=8, deviations=6.0)


@pytest.mark.parametrize(("loss", "deviations"), [(9.5, 6.5), (103.0, 100.0), (9.0, None), (3.0, None), (-90.0, None)])
def test_deviations_over_the_mean(config, loss, deviations):
    """Mean 3, deviation 1: 9 is exactly six deviations and no spike yet; a fall never is one."""
    assert spike(loss, WINDOW, config) == (None if deviations is None else pytest.approx(deviations))


def test_no_verdict_before_the_window_is_full(config):
    assert spike(1e6, WINDOW[:-1], config) is None
    assert spike(1e6, WINDOW, config) is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_a_skipped_step_and_no_spike(config, loss):
    assert spike(loss, WINDOW, config) is None


def test_noise_on_a_flat_curve_is_no_spike(config):
    """The deviation counts as at least 1e-3 of the mean: 2.0 may rise to 2.012."""
    assert spike(2.011, [2.0] * 8, config) is None
    assert spike(2.014, [2.0] * 8, config) == pytest.approx(7.0)


def test_losses_of_0(config):
    """Steps without a trained token have loss 0."""
    assert spike(0.0, [0.0] * 8, config) is None
    assert spike(5.0, [0.0] * 8, config) > 1e6
