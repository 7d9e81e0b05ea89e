"""The game's losses by their formulas, and the gradient penalty by its paper."""

import math

import pytest
import torch
from torch.nn import functional as F

from configs import from_dict
from configs.sections.families.generative import GanConfig
from models.batch import ImageBatch
from models.families import build
from models.init import fill
from models.tasks.images.adversarial import discriminator_loss, generator_loss
from models.tasks.table import task_of

SMALL = {"image_size": 8, "channels": 1, "latents": 4, "generator": [8, 4], "discriminator": [4, 8]}


def learner(**model):
    config = from_dict({"model": {"family": "gan", **SMALL, **model}, "data": {"path": "x.parquet"}})
    net = build(config.model)
    fill(net, 0)
    return task_of(config), {"generator": net.generator, "discriminator": net.discriminator}


def images(count=6) -> ImageBatch:
    """Of which the last is padding."""
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = torch.arange(count)
    ids[-1] = -1
    return ImageBatch(pixels, torch.where(ids < 0, -1, ids % 3), ids)


def test_losses_are_those_of_the_papers():
    real, made = torch.tensor([0.3, -2.0]), torch.tensor([1.5, -0.4])
    true, false = torch.ones(2), torch.zeros(2)
    game = F.binary_cross_entropy_with_logits(real, true, reduction="none")
    game = game + F.binary_cross_entropy_with_logits(made, false, reduction="none")
    for kind in ("minimax", "non_saturating"):
        assert torch.allclose(discriminator_loss(kind, real, made), game)
    assert torch.allclose(generator_loss("minimax", made), (1 - made.sigmoid()).log(), atol=1e-6)
    wanted = F.binary_cross_entropy_with_logits(made, true, reduction="none")
    assert torch.allclose(generator_loss("non_saturating", made), wanted)
    assert torch.allclose(discriminator_loss("wgan", real, made), made - real)
    assert discriminator_loss("hinge", real, made).tolist() == pytest.approx([0.7 + 2.5, 3.0 + 0.6])
    assert torch.equal(generator_loss("hinge", made), -made)


@pytest.mark.parametrize("norm", ["none", "layer", "spectral"])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_discriminators_loss_belongs_to_the_examples(norm, classes):
    task, nets = learner(discriminator_norm=norm, classes=classes)
    for net in nets.values():
        net.eval()  # its BatchNorm would mix them
    batch = images()
    whole = task.loss(nets, batch, "discriminator")
    parts = [task.loss(nets, ImageBatch(*(x[[i]] for x in vars(batch).values())), "discriminator") for i in range(6)]
    assert whole.weight == 5
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts), rel=1e-5)
    assert parts[-1].loss == 0


def test_styles_are_the_means_and_deviations_of_channels():
    """Equations 1 of arXiv:1812.04948, and that an image is of its own latents only."""
    _, nets = learner(generator_network="style", classes=3, mapping=2)
    generator, z, labels = nets["generator"], torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = []
    generator.styled[-1].register_forward_hook(lambda layer, given, out: found.append((*given, out)))
    made = generator(z, labels)
    assert made.shape == (5, 1, 8, 8)
    [(_, styles, out)] = found
    scale, shift = generator.styled[-1].style(styles).chunk(2, 1)
    assert torch.allclose(out.mean((2, 3)), shift, atol=1e-5)
    assert torch.allclose(out.std((2, 3), correction=0), (1 + scale).abs(), rtol=1e-2)
    parts = [generator(z[[i]], labels[[i]]) for i in range(5)]
    assert torch.allclose(made, torch.cat(parts), atol=1e-5)
    assert torch.allclose(made, generator(3 * z, labels), atol=1e-5)  # of latents the direction counts
    assert not torch.allclose(made[0], made[3], atol=1e-3)
    assert len(generator.mapping) == 4


@pytest.mark.parametrize("network", ["dcgan", "style"])
def test_each_phase_trains_its_network(network):
    task, nets = learner(generator_network=network)
    task.loss(nets, images(), "discriminator").loss.backward()
    assert all(parameter.grad is None for parameter in nets["generator"].parameters())
    assert all(parameter.grad is not None for parameter in nets["discriminator"].parameters())
    task.loss(nets, images(), "generator").loss.backward()
    assert all(parameter.grad is not None for parameter in nets["generator"].parameters())


def test_the_penalty_is_on_the_norm_of_each_gradient():
    """arXiv:1704.00028, algorithm 1: finite differences have the same norm, and the penalty trains the critic."""
    task, nets = learner(loss="wgan_gp", discriminator_norm="none")
    critic = nets["discriminator"].double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    logits, gradients = critic(x, None, True)
    assert torch.equal(logits, critic(x, None))
    moved = [(critic(x + 1e-6 * one.view(1, 1, 8, 8), None) - logits) / 1e-6 for one in torch.eye(64).double()]
    assert torch.allclose(torch.stack(moved, 1).detach(), gradients.flatten(1).double(), atol=1e-5)

    task, nets = learner(loss="wgan_gp", discriminator_norm="none", gradient_penalty=7.0)
    batch, critic = images(), nets["discriminator"]
    sums = task.loss(nets, batch, "discriminator")
    with torch.no_grad():
        bare = task.loss(nets, batch, "discriminator")
        made = nets["generator"](task._latents(batch, "discriminator"), None)
        steepness = task.loss(nets, batch, "discriminator").loss
    assert steepness == bare.loss
    with torch.enable_grad():
        found = task._steepness(nets, batch, made, None)
        assert sums.loss.item() == pytest.approx(bare.loss.item() + 7 * found[:5].sum().item(), rel=1e-4)
        found[:5].sum().backward()
    assert critic.layers[0].weight.grad.abs().max() > 0


def test_a_class_changes_what_is_made_and_how_it_is_judged():
    _, nets = learner(classes=3)
    latents, labels = torch.randn(2, 4), torch.tensor([0, 1])
    one, other = nets["generator"].eval()(latents, labels), nets["generator"](latents, labels + 1)
    assert one.shape == (2, 1, 8, 8)
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(nets["discriminator"](one, labels), nets["discriminator"](one, labels + 1), atol=1e-4)


def test_phases_have_their_own_rates_and_limits():
    task, _ = learner(loss="wgan", discriminator_norm="none", clip=0.02, generator_lr=1e-4, discriminator_steps=5)
    discriminator, generator = task.phases
    assert discriminator.optimizer == {"max_weight": 0.02, "ema_decay": None, "swa_from": None}
    assert (generator.optimizer, generator.every) == ({"lr": 1e-4}, 5)


def test_evaluations_show_a_collapse():
    task, nets = learner()
    batch = images(64)
    whole = task.evaluate({**nets, "generator": lambda latents, labels: batch.inputs.flip(0)}, batch)
    stuck = task.evaluate({**nets, "generator": lambda latents, labels: batch.inputs[:1].expand(64, -1, -1, -1)}, batch)
    found, lost = (
        task.metrics({name: value.tolist() for name, value in each.extra.items()}, 63) for each in (whole, stuck)
    )
    assert found["coverage"] > 0.95
    assert lost["coverage"] < 0.6
    assert lost["frechet"] > 5 * found["frechet"]
    assert math.isfinite(found["fooled"])


WRONG = {
    "size": (
        {"image_size": 6},
        r"model\.image_size \(6\) is not a multiple of 4, which the 2 stages of model\.generator",
    ),
    "style": (
        {"generator_network": "style", "image_size": 4},
        r"model\.generator_network=style begins with images of 1 x 1, .* fewer than the 2 stages of model\.generator",
    ),
    "mixed": ({"loss": "wgan_gp", "discriminator_norm": "batch"}, r"model\.discriminator_norm=batch mixes the images"),
    "bounded twice": ({"loss": "wgan"}, r"model\.discriminator_norm=spectral undoes model\.clip"),
}


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        GanConfig(**SMALL | keys)
