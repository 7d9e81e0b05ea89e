"""Images and texts compared: CLIP's loss, texts of any padding, retrieval, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from configs import ConfigError, from_dict
from models.batch import CaptionBatch
from models.families import build
from models.init import fill
from models.tasks.images.image_text import compared, number_of, retrieved, text_of, zero_shot
from models.tasks.table import task_of

TEXT = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}
IMAGES = {
    "convnet": {"channels": 1, "stages": [{"width": 4}], "hidden": [], "outputs": 6},
    "vit": {"channels": 1, "image_size": 8, "patch_size": 4, "num_layers": 1, "hidden_size": 16, "num_heads": 2,
            "outputs": 6},
}  # fmt: skip
SAID = ("one", "two and more", "three", "one", "")


def task(kind="vit", norm="none", **train):
    image = IMAGES[kind] | ({"norm": norm} if kind == "convnet" else {})
    model = {"family": "dual_encoder", kind: image, "text": TEXT, "text_length": 12}
    return task_of(from_dict({"model": model, "train": train, "data": {"path": "x.parquet"}}))


def batch(length=12, said=SAID) -> CaptionBatch:
    """The last pair is padding."""
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = [[each + 1 for each in text.encode()] for text in said]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return CaptionBatch(pixels, torch.tensor([0, 1, 1, 0, -1]), torch.tensor([7, 8, 9, 10, -1]), ids)


def network(learned):
    module = build(learned.config.model)
    fill(module, 0)
    return module


@pytest.mark.parametrize("kind", IMAGES)
def test_the_loss_is_clips(kind):
    """By the pseudocode of the paper's figure 3, where no two texts are the same."""
    learned, pairs = task(kind), batch(said=("one", "two and more", "three", "four", ""))
    module = network(learned)
    image, text = module(pairs)[:, :4]
    assert torch.allclose(image.norm(dim=1), torch.full((4,), 1 / 0.07), rtol=1e-5)
    sums = learned.loss({"model": module}, pairs, "model")
    assert sums.weight == 4
    logits, labels = image @ text.T, torch.arange(4)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert sums.loss.item() / 4 == pytest.approx(wanted.item(), rel=1e-5)
    sums.loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())


def test_a_pair_with_the_same_text_is_not_told_apart():
    learned, pairs = task(), batch()
    module = network(learned)
    image, text = module(pairs)[:, :4]
    cosines, total = image @ text.T, 0.0
    for i in range(4):
        others = [k for k in range(4) if k == i or SAID[k] != SAID[i]]
        for row in (cosines[i, others], cosines[others, i]):
            total += F.cross_entropy(row[None], torch.tensor([others.index(i)])).item() / 2
    assert learned.loss({"model": module}, pairs, "model").loss.item() == pytest.approx(total, rel=1e-5)


def test_padding_of_a_text_changes_nothing():
    module = network(task()).text.eval()
    assert torch.allclose(module(batch().text_ids[:4]), module(batch(14).text_ids[:4, :12]), atol=1e-6)
    short = batch().text_ids[[0, 2]][:, :5]
    assert torch.allclose(module(short), module(batch().text_ids[[0, 2]]), atol=1e-6)
    assert number_of(short).tolist() == number_of(batch().text_ids[[0, 2]]).tolist()
    assert len(set(number_of(batch().text_ids).tolist())) == 4
    assert [text_of(row) for row in batch().text_ids.tolist()] == list(SAID)


def test_retrieval_counts_what_is_nearest():
    images = F.normalize(torch.tensor([[1, 0.1], [0.1, 1], [1, -0.1], [-1, 0]], dtype=torch.float64))
    texts = F.normalize(torch.tensor([[1, 0.0], [0, 1], [1, 0.0], [0.5, 0.5]], dtype=torch.float64))
    found = retrieved(images, texts, torch.tensor([5, 6, 5, 7]))
    assert found == {"image_recall": 0.75, "text_recall": 0.75}
    # Label 1's texts point to the upper right: the last image, to the left, is nearer to them than to label 0's.
    assert zero_shot(images, texts, torch.tensor([0, 1, 0, 1])) == 1
    assert zero_shot(images, texts, torch.tensor([0, 1, 1, 1])) == 0.75
    # A label that does not occur is none that an image could have.
    assert zero_shot(images[:2], -texts[:2], torch.tensor([1, 2**40])) == zero_shot(
        images[:2], -texts[:2], torch.tensor([0, 1])
    )
    assert zero_shot(images[3:], texts[:1], torch.tensor([1])) == 1


def test_evaluations_gather_the_pairs_of_all_parts():
    learned, pairs = task(), batch()
    pairs.example_ids[:4] = torch.arange(4)
    module, total = network(learned).eval(), 0
    whole = learned.evaluate({"model": module}, pairs).extra
    for part in (slice(0, 2), slice(2, 5)):
        cut = CaptionBatch(*(each[part] for each in (pairs.images, pairs.labels, pairs.example_ids, pairs.text_ids)))
        total = total + learned.evaluate({"model": module}, cut).extra["pairs"]
    assert torch.allclose(total, whole["pairs"], atol=1e-6)
    found = learned.metrics({name: value.tolist() for name, value in whole.items()}, 4)
    assert found.keys() == {"matched", "image_recall", "text_recall", "zero_shot_accuracy"}


@pytest.mark.parametrize("model", [{}, IMAGES])
def test_one_network_on_images_is_needed(model):
    with pytest.raises(ConfigError, match=r"needs either model\.vit or model\.convnet, the network on images"):
        from_dict({"model": {"family": "dual_encoder", **model}, "data": {"path": "x.parquet"}})


def test_parts_with_all_negatives_add_up_to_the_whole():
    """Two processes in one: each is told what the other has."""
    learned, pairs = task(negatives="global_batch", global_batch=5), batch()
    module = network(learned)
    whole = learned.loss({"model": module}, pairs, "model")
    whole.loss.backward()
    wanted = [weight.grad.clone() for weight in module.parameters()]
    module.zero_grad()
    fields = (pairs.images, pairs.labels, pairs.example_ids, pairs.text_ids)
    parts, total = [CaptionBatch(*(each[part] for each in fields)) for part in (slice(0, 3), slice(3, 5))], 0
    both = [module(part) for part in parts]
    for number, part in enumerate(parts):

        def everyones(own, number=number):
            known = (pairs.text_ids, pairs.example_ids, *torch.cat(both, 1).unbind())
            [found] = [each for each in known if each.shape[1:] == own.shape[1:] and each.dtype == own.dtype
                       and torch.equal(each[3 * number :][: len(own)], own)]  # fmt: skip
            return found, 3 * number

        total = total + compared(both[number], part, everyones).loss
    total.backward()
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    for weight, found in zip(module.parameters(), wanted, strict=True):
        assert torch.allclose(weight.grad, found, atol=1e-5)


def test_negatives_of_the_global_batch_need_one_micro_batch_per_process():
    with pytest.raises(ConfigError, match=r"per process and step: set train\.micro_batch=8, or"):
        task(negatives="global_batch", global_batch=8, micro_batch=4)
    with pytest.raises(ConfigError, match=r"set model\.convnet\.norm to layer or none"):
        task("convnet", negatives="global_batch", global_batch=4, norm="batch")


def test_one_pair_alone_is_refused():
    with pytest.raises(ConfigError, match=r"train\.micro_batch=1: an image needs others"):
        task(micro_batch=1)
