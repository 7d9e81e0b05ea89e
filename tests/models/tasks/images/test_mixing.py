"""Mixup and CutMix: partners, shares and boxes, and a loss that is torch's of soft labels."""

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from configs import ConfigError, from_dict, resolve
from models.batch import ImageBatch
from models.tasks.images.mixing import beta, mixed
from models.tasks.table import task_of

COUNT, CLASSES = 64, 5


def batch() -> ImageBatch:
    """Images of 8 x 8, of one grey each; the third and the last are padding."""
    labels, ids = torch.arange(COUNT) % CLASSES, torch.arange(COUNT)
    labels[[2, -1]] = ids[[2, -1]] = -1
    images = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return ImageBatch(images, labels, ids)


def config(task="classification", family="convnet", **train):
    model = {"family": family} | ({"outputs": CLASSES} if family in ("convnet", "mlp") else {})
    path = {"mlp": "bundled:wine"}.get(family, "bundled:digits")
    return from_dict({"model": model, "task": task, "train": {"micro_batch": 8} | train, "data": {"path": path}})


@pytest.mark.parametrize("ways", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 0.5}])
def test_examples_are_mixed_as_the_loss_says(ways):
    made, learned = batch(), task_of(config(label_smoothing=0.1, **ways))
    mix = mixed(made, learned.config.train, 0)
    partner = mix.partner.tolist()
    assert partner[:5] == [1, 3, 2, 4, 5]
    assert (partner[-2], partner[-1]) == (0, COUNT - 1)
    # Every pixel is the example's, the partner's, or the share of both.
    own, other = made.inputs, made.inputs[mix.partner]
    share = mix.share[:, None, None, None]
    cut = ((mix.inputs == own) | (mix.inputs == other)).flatten(1).all(1)
    assert torch.allclose(mix.inputs[~cut], (share * own + (1 - share) * other)[~cut], atol=1e-6)
    left = (mix.inputs == own).float().mean((1, 2, 3))
    real = made.example_ids >= 0
    assert torch.allclose(left[cut & real], mix.share[cut & real], atol=1e-6)
    assert (int((cut & real).sum()) > 10) == ("cutmix" in ways)
    assert bool((~cut).any()) == ("mixup" in ways)
    logits = torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(0))
    given = []
    sums = learned.loss({"model": lambda inputs, keys: (given.append(inputs), logits)[1]}, made, "model")
    assert torch.equal(given[0], mix.inputs)
    first, second = (F.one_hot(made.labels[at].clamp(min=0), CLASSES) for at in (torch.arange(COUNT), mix.partner))
    soft = (mix.share[:, None] * first + (1 - mix.share[:, None]) * second)[real]
    wanted = F.cross_entropy(logits[real], soft, reduction="sum", label_smoothing=0.1)
    assert float(sums.loss) == pytest.approx(float(wanted), rel=1e-5)
    assert int(sums.weight) == COUNT - 2
    held_out = learned.evaluate({"model": lambda inputs: logits}, made)
    assert float(held_out.loss) == pytest.approx(
        float(F.cross_entropy(logits[real], made.labels[real], reduction="sum"))
    )


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_shares_are_of_the_beta_distribution(alpha):
    found = beta(0, torch.arange(4000), "mixup", alpha).double().numpy()
    # Below fp32's resolution at 1 many shares are equal: compared in between.
    inside = found[(found > 1e-3) & (found < 1 - 1e-3)]
    of_all = stats.beta(alpha, alpha)
    low, high = of_all.cdf([1e-3, 1 - 1e-3])
    assert len(inside) / 4000 == pytest.approx(high - low, abs=0.03)
    assert stats.kstest(inside, lambda x: (of_all.cdf(x) - low) / (high - low)).pvalue > 0.01


REFUSED = [
    ({"task": "regression", "family": "mlp", "mixup": 1}, r"train\.mixup is for task=classification of rows or images"),
    ({"family": "mlp", "cutmix": 1.0}, r"train\.cutmix is for task=classification of images, not data\.kind=rows"),
    ({"mixup": 0.2, "micro_batch": 1}, r"train\.micro_batch=1 leaves nothing to mix with by train\.mixup: set it to 2"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_cannot_be_mixed_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config(**keys))
