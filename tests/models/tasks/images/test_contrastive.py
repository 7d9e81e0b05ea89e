"""Contrastive learning: SimCLR's loss, views that belong to the image, and representations compared with labels."""

import math

import numpy as np
import pytest
import torch
from image_views import FAMILIES, images, network
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from configs import ConfigError, from_dict
from configs.sections.train import ViewsConfig
from models.batch import ImageBatch
from models.tasks.images.probes import RIDGE, knn_accuracy, linear_accuracy
from models.tasks.images.views import view
from models.tasks.table import task_of


def task(family="convnet", **train):
    model = {"family": family} | FAMILIES[family]
    return task_of(from_dict({"task": "contrastive", "model": model, "train": train, "data": {"path": "x.parquet"}}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_simclrs(family):
    """Against the paper's algorithm 1, image by image."""
    learned, batch = task(family, temperature=0.3), images()
    module, how = network(learned), learned.config.train.views
    both = torch.cat([view(batch, how, 0, number) for number in (0, 1)])  # which BatchNorm sees together
    views = [each[:5] for each in F.normalize(module(both * 2 - 1)).detach().chunk(2)]  # without the padding
    z, total, matched = torch.cat(views), 0.0, 0
    for i in range(10):
        logits = {k: float(z[i] @ z[k]) / 0.3 for k in range(10) if k != i}
        twin = (i + 5) % 10
        total -= (logits[twin] - math.log(sum(math.exp(each) for each in logits.values()))) / 2
        matched += (max(logits, key=logits.__getitem__) == twin) / 2
    sums = learned.loss({"model": module}, batch, "model")
    assert (sums.loss.item(), sums.weight.item()) == (pytest.approx(total, rel=1e-5), 5)
    found = learned.metrics({name: value.tolist() for name, value in sums.extra.items()}, 5)
    assert found["matched"] == pytest.approx(matched / 5)
    assert found["alignment"] == pytest.approx((views[0] - views[1]).square().sum(1).mean().item(), rel=1e-4)
    apart = torch.pdist(views[0]).square()
    assert found["uniformity"] == pytest.approx((-2 * apart).exp().mean().log().item(), rel=1e-4)
    assert sums.loss.requires_grad


def test_a_view_belongs_to_the_image():
    batch, how = images(padding=0), ViewsConfig(flip=True, rotate=20)
    whole = view(batch, how, 0, 0)
    part = ImageBatch(batch.images[2:4], batch.labels[2:4], batch.example_ids[2:4])
    assert torch.equal(view(part, how, 0, 0), whole[2:4])
    for other in (view(batch, how, 0, 1), view(batch, how, 1, 0)):
        assert (other - whole).abs().mean((1, 2, 3)).min() > 0.05
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_what_is_asked_for_is_done_to_views():
    pixels = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    pixels[:, :, :, 8:] = 200  # right half
    pixels[:, 0] //= 2
    batch = ImageBatch(pixels, torch.zeros(400), torch.arange(400))
    plain = {"crop": 1, "flip": False, "rotate": 0, "jitter": 0}
    assert torch.allclose(view(batch, ViewsConfig(**plain), 0, 0), pixels / 255, atol=1e-6)
    flipped = view(batch, ViewsConfig(**plain | {"flip": True}), 0, 0)
    left = flipped[:, 1, 0, 0] > 0.5
    assert 0.4 < left.float().mean() < 0.6
    assert torch.allclose(flipped[left], pixels[left].flip(3) / 255, atol=1e-6)
    bright = view(batch, ViewsConfig(**plain | {"jitter": 0.3}), 0, 0)
    assert 0.1 < bright.mean((1, 2, 3)).std() / bright.mean() < 0.25
    assert (bright[:, 1] - bright[:, 0]).amax((1, 2)).std() > 0.02
    # Of a crop that shows a share s of the width, the edge is as likely anywhere in the middle of it.
    seen = view(batch, ViewsConfig(**plain | {"crop": 0.2}), 0, 0)[:, 1] > 0.3
    shares = seen.float().mean((1, 2))
    assert shares.min() == 0
    assert shares.max() == 1
    assert 0.45 < shares.mean() < 0.55
    turned = view(batch, ViewsConfig(**plain | {"rotate": 90}), 0, 0)[:, 1] > 0.3
    assert turned[:, 2, 8].float().mean() == pytest.approx(0.5, abs=0.1)  # above the centre: after a turn to the left
    assert turned[:, 8, 11].float().mean() > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluations_classify_what_goes_into_the_head(family):
    learned, batch = task(family), images(count=40)
    batch = ImageBatch(batch.images, batch.labels, batch.example_ids - 10)
    batch.example_ids[-1] = -1
    module = network(learned).eval()
    for parts in ([slice(0, 40)], [slice(0, 15), slice(15, 40)]):
        total = 0
        for part in parts:
            cut = ImageBatch(batch.images[part], batch.labels[part], batch.example_ids[part])
            total = total + learned.evaluate({"model": module}, cut).extra["representations"].double()
        x = batch.inputs[:-1]
        found = total[:39, :-1].float()
        if family == "convnet":
            assert torch.allclose(found, module.features(x, None), atol=1e-5)
        else:
            assert torch.allclose(module.head(found), module(x), atol=1e-5)
        assert total[:39, -1].tolist() == [label + 1 for label in batch.labels[:-1].tolist()]
        assert not total[39:].any()
    found = learned.metrics({"matched": 0, "alignment": 0, "potential": [0, 0], "representations": total.tolist()}, 39)
    assert found["knn_accuracy"] == knn_accuracy(total[:39, :-1], batch.labels[:-1])
    assert found["probe_accuracy"] == linear_accuracy(total[:39, :-1], batch.labels[:-1])


def test_probes_are_scikit_learns():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (120,), generator=draw)
    features = torch.randn(120, 5, generator=draw, dtype=torch.float64) + 1.2 * F.one_hot(labels, 5)
    halves = (slice(0, None, 2), slice(1, None, 2))
    scaled, right = torch.from_numpy(StandardScaler().fit_transform(features)) * (119 / 120) ** 0.5, 0
    for one, other in (halves, halves[::-1]):
        x = torch.cat([scaled, torch.ones(120, 1)], 1).numpy()
        fitted = RidgeClassifier(alpha=RIDGE, fit_intercept=False).fit(x[one], labels[one])
        right += (fitted.predict(x[other]) == labels[other].numpy()).sum()
    assert linear_accuracy(features, labels) == pytest.approx(right / 120, abs=0.02)
    unit = F.normalize(features).numpy()
    near = KNeighborsClassifier(20, weights=lambda apart: np.exp((1 - apart**2 / 2) / 0.07))
    hits = 0
    for i in range(120):
        rest = [k for k in range(120) if k != i]
        hits += int(near.fit(unit[rest], labels[rest]).predict(unit[i : i + 1])[0] == labels[i])
    assert knn_accuracy(features, labels) == pytest.approx(hits / 120)
    assert 0.4 < hits / 120 < 0.9


def test_one_image_alone_is_refused():
    with pytest.raises(ConfigError, match=r"train\.micro_batch=1: contrastive learning compares"):
        task(micro_batch=1)


def test_it_shows_views_side_by_side():
    learned, batch = task(), images()
    grid = learned.samples({}, batch).images_NCHW
    assert grid.shape == (12, 1, 12, 12)
    assert torch.equal(grid[2:4, 0], torch.stack([view(batch, learned.config.train.views, 0, n)[1, 0] for n in (0, 1)]))
