"""Self-distillation of images: BYOL's loss and its teacher."""

import copy

import pytest
import torch
from image_views import FAMILIES, images, network
from torch.nn import functional as F

from configs import ConfigError, from_dict, resolve
from models.tasks.images.self_distillation import TaughtImages
from models.tasks.table import task_of


def task(family="convnet", optim=None, **model):
    keys = {"family": family, "predictor": [7]} | FAMILIES[family] | model
    optim = {"ema_decay": 0.9} if optim is None else optim
    tree = {"task": "self_distillation", "model": keys, "optim": optim, "data": {"path": "x.parquet"}}
    return task_of(from_dict(tree))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_byols(family):
    """Against equation 2 of the paper, image by image."""
    learned, batch = task(family), images()
    online = network(learned)
    teacher = copy.deepcopy(online).eval()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 0.05
        given = learned.taught({"model": teacher}, batch)
    sums = learned.loss({"model": online}, given, "model")
    views, total = learned.both(batch), 0.0
    (_, q), (z, _) = online(views, learned.keys(batch), True).detach(), teacher.train()(views, None, True).detach()
    for i in range(5):
        for mine, other in ((i, i + 6), (i + 6, i)):
            one, two = q[mine] / q[mine].norm(), z[other] / z[other].norm()
            total += float((one - two).square().sum())
    assert (sums.loss.item(), sums.weight.item()) == (pytest.approx(total, rel=1e-5), 5)
    sums.loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in online.parameters())


def test_the_teacher_normalises_over_the_micro_batch_as_the_network_does():
    learned, batch = task("mlp", norm="batch"), images(padding=0)
    teacher = network(learned).eval()
    found = learned.taught({"model": teacher}, batch)
    assert isinstance(found, TaughtImages)
    assert torch.allclose(found.targets.mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(found.targets.std(0, correction=0), torch.ones(5), atol=0.1)
    assert not any(part.training for part in teacher.modules())


def test_a_network_that_sees_the_same_in_all_images_is_uniform_at_0():
    learned, batch = task(), images(padding=0)
    online = network(learned).eval()
    before = learned.evaluate({"model": online}, batch).extra
    with torch.no_grad():
        online.head[-1].weight.zero_()
        online.head[-1].bias.fill_(1.0)
    after = learned.evaluate({"model": online}, batch).extra
    found = [learned.metrics({k: v.tolist() for k, v in each.items()}, 6) for each in (before, after)]
    assert found[0]["uniformity"] < -1e-4
    assert found[1]["uniformity"] == pytest.approx(0, abs=1e-6)
    assert F.normalize(online(batch.inputs)).std(0).max() < 1e-6


def test_what_it_needs_is_named():
    with pytest.raises(ConfigError, match=r"needs a predictor: set model\.predictor=\[64\]"):
        task(predictor=None)
    with pytest.raises(ConfigError, match=r"set optim\.ema_decay=0\.99"):
        task(optim={})
    tree = {"task": "classification", "model": {"family": "mlp", "predictor": [4]}, "data": {"path": "x.parquet"}}
    with pytest.raises(ConfigError, match=r"model\.family=mlp goes from images to predictions: set task=self_disti"):
        resolve(from_dict(tree))
