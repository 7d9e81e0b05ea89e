"""Chunked cross-entropy equals the plain one: values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from models.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [7, 64, 100, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_equals_plain(chunk, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (100,), generator=generator)
    labels[::7] = -100
    plain = F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    ours = chunked_cross_entropy(hidden, weight, labels, chunk)
    assert ours.tokens == (labels != -100).sum()
    assert ours.loss_sum.dtype == torch.float32
    torch.testing.assert_close(ours.loss_sum, plain, rtol=tolerance, atol=0)
    scale = 0.37
    expected = torch.autograd.grad(plain * scale, (hidden, weight))
    found = torch.autograd.grad(ours.loss_sum * scale, (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a - b).float().norm() <= tolerance * b.float().norm()


def test_without_gradient_and_without_labels():
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    labels = torch.randint(0, 6, (10,))
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, 3).loss_sum
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), labels, reduction="sum").detach())
    nothing = chunked_cross_entropy(hidden, weight, torch.full((10,), -100), 3)
    assert nothing.loss_sum == 0
    assert nothing.tokens == 0
    assert all(not g.any() for g in torch.autograd.grad(nothing.loss_sum, (hidden, weight)))
