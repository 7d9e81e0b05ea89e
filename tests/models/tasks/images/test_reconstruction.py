"""Losses of autoencoders: against torch's distributions, exact Jacobians and the formulas of their papers."""

import math

import pytest
import torch
from torch import distributions as dist

from configs import from_dict
from configs.sections.families.generative import AutoencoderConfig
from models.batch import ImageBatch, RowBatch
from models.families import build
from models.init import fill
from models.tasks.samples import ImageGrid, Table
from models.tasks.table import task_of

CONV = {"network": "conv", "hidden": [4, 8], "channels": 1, "latents": 3}


def learner(kind=None, **model):
    data = {"path": "x.parquet", "kind": kind}
    config = from_dict({"model": {"family": "autoencoder", "channels": 1, "activation": "tanh", **model}, "data": data})
    net = build(config.model)
    fill(net, 0)
    return task_of(config), net


def images(count=6) -> ImageBatch:
    """Of which the last is padding."""
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = torch.arange(count)
    ids[-1] = -1
    return ImageBatch(pixels, torch.zeros(count, dtype=torch.int64), ids)


def measured(task, net, batch):
    sums = task.loss({"model": net}, batch, "model")
    return sums, task.metrics({name: value.tolist() for name, value in sums.extra.items()}, int(sums.weight))


@pytest.mark.parametrize("network", [{}, CONV], ids=["mlp", "conv"])
@pytest.mark.parametrize("bottleneck", ["plain", "vae", "vq"])
def test_the_loss_is_a_sum_over_real_examples(network, bottleneck):
    task, net = learner(bottleneck=bottleneck, **network)
    batch = images()
    whole, _ = measured(task, net, batch)
    parts = [measured(task, net, ImageBatch(*(x[[i]] for x in vars(batch).values())))[0] for i in range(6)]
    assert whole.weight == 5
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part in parts), rel=1e-6)
    assert parts[-1].loss == 0
    assert net(batch.inputs)[0].shape == batch.inputs.shape


def test_a_vae_is_its_bound():
    """Reconstruction of a sample that the example alone determines, and torch's own divergence."""
    task, net = learner(bottleneck="vae", beta=0.3, latents=3)
    batch = images()
    sums, found = measured(task, net, batch)
    made, mean, log_variance = net(batch.inputs, task._noise(batch, "posterior"))
    posterior = dist.Normal(mean, (log_variance / 2).exp())
    kl = dist.kl_divergence(posterior, dist.Normal(0, 1)).sum(1)[:5]
    error = -dist.Normal(made, 1).log_prob(batch.inputs).sum((1, 2, 3))[:5] - 32 * math.log(2 * math.pi)
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found["reconstruction"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert sums.loss.item() == pytest.approx((error + 0.3 * kl).sum().item(), rel=1e-5)
    assert found["mse"] == pytest.approx(2 * error.mean().item() / 64, rel=1e-5)
    assert not torch.equal(made, net(batch.inputs)[0])


def test_gradients_pass_straight_through_a_codebook():
    """arXiv:1711.00937, equation 3: the reconstruction trains the decoder and, as if it had given the codes, the
    encoder; the codes follow the encoder alone."""
    task, net = learner(bottleneck="vq", codes=5, commitment=0.5, **CONV)
    batch = images()
    sums, found = measured(task, net, batch)
    sums.loss.backward()
    codes, encoded = net.bottleneck.weight, net.encoder(batch.inputs).movedim(1, -1)
    distances = (encoded[..., None, :] - codes).square().sum(-1)
    near, numbers = distances.min(-1)
    assert found["codebook"] == pytest.approx(near.sum((1, 2))[:5].mean().item(), rel=1e-4)
    used = torch.bincount(numbers[:5].flatten(), minlength=5).double()
    assert sums.extra["used"].tolist() == used.tolist()
    assert found["perplexity"] == pytest.approx(dist.Categorical(used / used.sum()).entropy().exp().item(), rel=1e-6)
    assert found["codes_used"] == (used > 0).double().mean().item()

    wanted = [2 * (codes[code] - encoded[:5][numbers[:5] == code]).sum(0) for code in range(5)]
    assert torch.allclose(codes.grad, torch.stack(wanted), rtol=1e-4, atol=1e-5)

    taken = encoded.detach().requires_grad_()
    grid = taken + (codes[numbers] - taken).detach()
    made = net.decoder(grid.movedim(-1, 1))
    loss = (made - batch.inputs)[:5].square().sum() / 2 + 0.5 * (taken - codes[numbers].detach())[:5].square().sum()
    [to_encoder] = torch.autograd.grad(loss, taken)
    net.zero_grad()
    encoded.backward(to_encoder)
    again = [parameter.grad.clone() for parameter in net.encoder.parameters()]
    net.zero_grad()
    measured(task, net, batch)[0].loss.backward()
    for mine, its in zip(net.encoder.parameters(), again, strict=True):
        assert torch.allclose(mine.grad, its, rtol=1e-4, atol=1e-5)


def test_a_contractive_penalty_is_the_jacobian_of_the_latents():
    """In the mean over many random projections; its gradient reaches the encoder."""
    task, net = learner(contractive=0.7, latents=3, hidden=[5])
    one = images(2)
    count = 4000
    pixels = one.images[:1].expand(count, -1, -1, -1)
    batch = ImageBatch(pixels, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    sums, found = measured(task, net, batch)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[1], batch.inputs[:1])
    assert found["contractive"] == pytest.approx(jacobian.square().sum().item(), rel=0.05)
    assert sums.loss.item() == pytest.approx(
        (sums.extra["reconstruction"] + 0.7 * sums.extra["contractive"]).item(), rel=1e-6
    )
    before = [parameter.grad for parameter in net.encoder.parameters()]
    sums.extra["contractive"].backward()
    assert before == [None] * 4
    assert all(parameter.grad.abs().max() > 0 for parameter in net.encoder.parameters() if parameter.dim() == 2)
    with torch.no_grad():
        held_out = task.evaluate({"model": net}, one)
    assert "contractive" not in task.metrics({name: float(value) for name, value in held_out.extra.items()}, 1)


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_sparsity(kind):
    task, net = learner(sparsity=kind, sparsity_weight=0.2, sparsity_target=0.1, latents=3)
    batch = images()
    sums, found = measured(task, net, batch)
    latents = net.encoder(batch.inputs)[:5]
    if kind == "l1":
        assert found["l1"] == pytest.approx(latents.abs().sum(1).mean().item(), rel=1e-5)
        return
    mean = latents.sigmoid().mean(0)
    wanted = dist.kl_divergence(dist.Bernoulli(torch.full_like(mean, 0.1)), dist.Bernoulli(mean)).sum().item()
    assert sums.loss.item() == pytest.approx(5 * (found["reconstruction"] + 0.2 * wanted), rel=1e-5)
    assert found["sparsity"] == pytest.approx(wanted, rel=1e-5)
    padding = ImageBatch(batch.images, batch.labels, torch.full((6,), -1))
    assert measured(task, net, padding)[0].loss == 0


def test_what_is_reconstructed_has_no_noise():
    task, net = learner(input_noise=0.5)
    batch = images(500)
    noise = (task.corrupted(batch) - batch.inputs) / 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    _, found = measured(task, net, batch)
    error = (net(task.corrupted(batch))[0] - batch.inputs)[:-1].square().mean().item()
    assert found["mse"] == pytest.approx(error, rel=1e-5)


def test_rows_are_reconstructed_too():
    task, net = learner(inputs=4, hidden=[5], latents=2)
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    batch = RowBatch(inputs, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert task.counts == (1, "rows")
    shown = task.samples({"model": net}, batch)
    assert isinstance(shown, Table)
    assert [row[1] for row in shown.rows] == pytest.approx((net(inputs)[0] - inputs).square().mean(1).tolist())


def test_a_vae_shows_what_it_makes_of_the_prior():
    task, net = learner(bottleneck="vae", **CONV)
    batch = images()
    shown = task.samples({"model": net}, batch)
    assert isinstance(shown, ImageGrid)
    originals, made, generated = shown.images_NCHW.view(3, 6, 1, 8, 8)
    assert torch.allclose(originals, batch.images / 255, atol=1e-6)
    assert torch.equal(made, (net(batch.inputs)[0] + 1) / 2)
    latents = task._noise(batch, "prior")
    assert torch.equal(generated, (net.decoder(latents) + 1) / 2)


WRONG = {
    "no square": ({"network": "conv", "inputs": 60, "channels": 1}, r"model\.inputs \(60\) is not .* times a square"),
    "too many stages": ({**CONV, "hidden": [4, 4, 4, 4]}, r"model\.hidden has 4 stages, .* but 8 pixels cannot be"),
    "no stage": ({**CONV, "hidden": []}, r"model\.hidden is empty"),
    "sparse codes": ({"bottleneck": "vq", "sparsity": "l1"}, r"model\.sparsity is for model\.bottleneck=plain, not vq"),
    "contracted codes": ({"bottleneck": "vae", "contractive": 1.0}, r"model\.contractive is for model\.bottleneck="),
}


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**keys)
