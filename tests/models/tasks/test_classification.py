"""Losses and metrics of classification and regression: torch's and scikit-learn's, whatever the split of a batch."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.nn import functional as F

from configs import ConfigError, from_dict
from configs.sections.pairs import check_pair
from models.batch import ImageBatch, RowBatch
from models.tasks.samples import Table
from models.tasks.table import reads, task_of

CLASSES = 5


def task(name="classification", outputs=CLASSES, **sections):
    return task_of(from_dict({"model": {"family": "mlp", "outputs": outputs}, "task": name, **sections}))


def classified(count=40) -> tuple[torch.Tensor, RowBatch]:
    """Logits, and rows of which the last is padding and class 4 has none."""
    draw = torch.Generator().manual_seed(0)
    labels, ids = torch.randint(0, CLASSES - 1, (count,), generator=draw), torch.arange(count)
    labels[-1] = ids[-1] = -1
    logits = torch.randn(count, CLASSES, generator=draw) + 2 * F.one_hot(labels.clamp(min=0), CLASSES)
    return logits, RowBatch(torch.zeros(count, 3), labels, ids)


def measured(learned, found, batch, parts, phase="evaluate"):
    """Loss, weight and metrics of a batch cut into parts; the network gives what it should have found."""
    total, weight, extra = 0.0, 0, {name: np.zeros(shape) for name, shape in learned.extra.items()}
    for part in np.array_split(np.arange(len(batch.labels)), parts):
        cut = RowBatch(batch.inputs[part], batch.labels[part], batch.example_ids[part], batch.scale)
        nets = {"model": lambda inputs, keys=None, part=part: found[part]}
        sums = learned.evaluate(nets, cut) if phase == "evaluate" else learned.loss(nets, cut, "model")
        total, weight = total + float(sums.loss), weight + int(sums.weight)
        extra = {name: extra[name] + value.numpy() for name, value in sums.extra.items()}
    return total, weight, learned.metrics({name: value.tolist() for name, value in extra.items()}, weight)


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_metrics_of_classes_are_those_of_the_whole_batch(parts):
    logits, batch = classified()
    total, weight, found = measured(task(), logits, batch, parts)
    truth, guess = batch.labels[:-1], logits[:-1].argmax(1)
    assert weight == 39
    assert total == pytest.approx(F.cross_entropy(logits[:-1], truth, reduction="sum").item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, guess, average="macro"))
    assert 0.3 < found["macro_f1"] < 0.99


def test_smoothing_and_weights_are_of_training_alone():
    logits, batch = classified()
    weights = [1.0, 2.0, 0.5, 4.0, 0.0]
    learned = task(train={"label_smoothing": 0.2, "class_weights": weights})
    smoothed = F.cross_entropy(logits[:-1], batch.labels[:-1], reduction="none", label_smoothing=0.2)
    trained, weight, _ = measured(learned, logits, batch, 2, "model")
    assert trained == pytest.approx((smoothed * torch.tensor(weights)[batch.labels[:-1]]).sum().item(), rel=1e-5)
    assert weight == 39
    assert measured(learned, logits, batch, 2)[0] == measured(task(), logits, batch, 2)[0] != trained


@pytest.mark.parametrize("parts", [1, 7])
def test_metrics_of_numbers_are_those_of_the_whole_batch(parts):
    draw, scale = torch.Generator().manual_seed(1), torch.tensor([[50.0, -3.0], [10.0, 0.5]])
    labels, ids = torch.randn(30, 2, generator=draw), torch.arange(30)
    found = labels + 0.5 * torch.randn(30, 2, generator=draw)
    labels[-1], ids[-1] = 0, -1
    batch = RowBatch(torch.zeros(30, 3), labels, ids, scale)
    total, weight, told = measured(task("regression", 2), found, batch, parts)
    assert weight == 29
    assert total / weight == pytest.approx(metrics.mean_squared_error(labels[:-1], found[:-1]))
    assert told["r2"] == pytest.approx(metrics.r2_score(labels[:-1], found[:-1]), rel=1e-6)
    own = [(part[:-1] * scale[1] + scale[0]).numpy() for part in (labels, found)]
    assert told["rmse"] == pytest.approx(metrics.mean_squared_error(*own) ** 0.5, rel=1e-6)


def test_a_sample_of_numbers_is_in_their_own_units():
    batch = RowBatch(torch.zeros(2, 3), torch.tensor([[1.0], [-1.0]]), torch.arange(2), torch.tensor([[50.0], [10.0]]))
    drawn = task("regression", 1).samples({"model": lambda inputs: torch.zeros(2, 1)}, batch)
    assert drawn == Table(["example", "label label", "found label"], [(0, 60.0, 50.0), (1, 40.0, 50.0)])


def test_images_reach_a_network_as_numbers_about_zero():
    batch = ImageBatch(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.zeros(2), torch.arange(2))
    assert batch.inputs.flatten().tolist() == [-1, 1]


def test_the_kind_of_examples_is_the_familys_or_asked_for():
    def config(**keys):
        return from_dict({"model": {"family": "mlp"}, "data": {"path": "x.parquet"}, **keys})

    assert reads(config()) == "rows"
    assert reads(config(data={"kind": "images", "path": "x.parquet"})) == "images"
    with pytest.raises(ConfigError, match=r"data\.kind=images: .* learns from rows: set data\.kind=rows"):
        reads(config(task="regression", data={"kind": "images", "path": "x.parquet"}))
    with pytest.raises(ConfigError, match=r"from tokens to loss of tokens, .* goes from rows or images to classes or"):
        check_pair(config(task="language_modelling"))
