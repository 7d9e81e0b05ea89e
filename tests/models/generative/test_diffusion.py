"""The networks of diffusion models against torch's own blocks, and their task."""

import pytest
import torch
from torch import nn

from configs import from_dict
from configs.sections.families.generative import DiffusionConfig
from models.batch import ImageBatch
from models.families import build
from models.generative.diffusion import AttentionBlock, DiTBlock, sinusoid
from models.init import fill
from models.tasks.table import task_of

SMALL = {"image_size": 8, "channels": 1, "classes": 3, "width": 16, "levels": [1, 2], "depth": 1}


def learner(stirred=True, **model):
    """`stirred`: what begins at 0 does not."""
    config = from_dict({"model": {"family": "diffusion", **SMALL, **model}, "data": {"path": "x.parquet"}})
    net = build(config.model)
    fill(net, 0)
    if stirred:
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return task_of(config), net


def images(count=6) -> ImageBatch:
    """Of which the last is padding."""
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = torch.arange(count)
    ids[-1] = -1
    return ImageBatch(pixels, torch.where(ids < 0, -1, ids % 3), ids)


def test_a_dit_block_is_torchs_where_the_condition_does_nothing():
    """Shifts and scales of 0 and gates of 1: a Transformer's block with norms before."""
    block = DiTBlock(16, 4)
    its = nn.TransformerEncoderLayer(
        16, 4, 64, 0.0, lambda x: nn.functional.gelu(x, approximate="tanh"), 1e-6, batch_first=True, norm_first=True
    )
    nn.init.zeros_(block.told[1].weight)
    with torch.no_grad():
        block.told[1].bias.copy_(torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(16))
        its.self_attn.in_proj_weight.copy_(block.qkv.weight)
        its.self_attn.in_proj_bias.copy_(block.qkv.bias)
        for mine, other in (
            (block.out, its.self_attn.out_proj),
            (block.mlp[0], its.linear1),
            (block.mlp[2], its.linear2),
        ):
            other.weight.copy_(mine.weight)
            other.bias.copy_(mine.bias)
    x = torch.randn(2, 9, 16)
    assert torch.allclose(block(x, torch.randn(2, 16)), its(x), atol=1e-5)


def test_attention_over_pixels_is_torchs():
    block, its = AttentionBlock(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(block.out.weight)
    with torch.no_grad():
        its.in_proj_weight.copy_(block.qkv.weight.flatten(1))
        its.in_proj_bias.copy_(block.qkv.bias)
        its.out_proj.weight.copy_(block.out.weight.flatten(1))
        its.out_proj.bias.copy_(block.out.bias)
    x = torch.randn(2, 16, 3, 3)
    pixels = block.norm(x).flatten(2).transpose(1, 2)
    wanted = x + its(pixels, pixels, pixels)[0].transpose(1, 2).view_as(x)
    assert torch.allclose(block(x, torch.zeros(2, 1)), wanted, atol=1e-5)


def test_places_are_told_by_cosines_and_sines():
    found = sinusoid(torch.tensor([0.0, 3.0]), 4)
    assert torch.allclose(found, torch.tensor([[1.0, 1, 0, 0], [-0.989992, 0.99955, 0.14112, 0.0299955]]), atol=1e-5)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_network_knows_time_and_class(network):
    _, net = learner(network=network)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.1]), torch.tensor([0, 0])
    found = net(x, t, labels)
    assert found.shape == x.shape
    assert not torch.allclose(found, net(x, t + 0.3, labels), atol=1e-4)
    assert not torch.allclose(found, net(x, t, labels + 3), atol=1e-4)
    assert torch.equal(learner(network=network, stirred=False)[1](x, t, labels), torch.zeros_like(x))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_the_loss_belongs_to_the_examples(prediction):
    task, net = learner(prediction=prediction)
    batch = images()
    whole = task.loss({"model": net}, batch, "model")
    parts = [task.loss({"model": net}, ImageBatch(*(x[[i]] for x in vars(batch).values())), "model") for i in range(6)]
    assert whole.weight == 5
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts), rel=1e-5)
    assert parts[-1].loss == 0


def test_an_untrained_network_loses_the_variance_of_the_noise():
    task, net = learner(stirred=False)
    batch = images(400)
    assert task.loss({"model": net}, batch, "model").loss.item() / 399 == pytest.approx(1, abs=0.03)


def test_labels_are_left_out_in_training_alone():
    task, _ = learner(label_dropout=0.5, measure_samples=False)
    told = []

    def net(x, t, labels):
        told.append(labels)
        return x

    batch = images(1000)
    task.loss({"model": net}, batch, "model")
    task.evaluate({"model": net}, batch)
    trained, evaluated = told
    assert (trained[:-1] == 3).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(evaluated[:-1], batch.labels[:-1])
    assert evaluated[-1] == 3


def test_guidance_goes_beyond_the_prediction_with_a_class():
    """From a network whose prediction is its label: without one 3, with one 0 to 2."""
    calls = []

    def net(x, t, labels):
        calls.append(labels)
        return labels.view(-1, 1, 1, 1).expand_as(x).float() / 10

    task, _ = learner(guidance=3.0, prediction="flow", sample_steps=1)
    batch = images()
    noise = task.made(lambda x, t, labels: torch.zeros_like(x), batch)
    found = noise - task.made(net, batch)
    assert torch.allclose(found[:5, 0, 0, 0], 0.3 + 3 * (batch.labels[:5] / 10 - 0.3), atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
def test_samples_are_of_the_example(sampler):
    task, net = learner(sampler=sampler, sample_steps=3, prediction="v")
    batch = images()
    whole = task.samples({"model": net}, batch).images_NCHW
    part = task.samples({"model": net}, ImageBatch(*(x[2:4] for x in vars(batch).values()))).images_NCHW
    assert whole.shape == (6, 1, 8, 8)
    assert torch.allclose(whole[2:4], part, atol=1e-4)
    assert not torch.allclose(whole[2], whole[3], atol=0.1)


WRONG = {
    "size": ({"image_size": 9}, r"model\.image_size \(9\) is not a multiple of 2, which model\.levels"),
    "patches": (
        {"network": "dit", "patch_size": 3},
        r"model\.image_size \(8\) is not a multiple of 3, which model\.patch_size",
    ),
    "heads": ({"heads": 3}, r"model\.heads \(3\) does not divide the 32 channels"),
    "guidance": ({"classes": None, "guidance": 2.0}, r"model\.guidance needs model\.classes"),
    "steps": ({"noise_steps": 10}, r"model\.sample_steps \(20\) exceeds model\.noise_steps \(10\)"),
    "width": ({"network": "dit", "width": 18, "heads": 1}, r"model\.width \(18\) is not a multiple of 4"),
}


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**SMALL | keys)
