"""What a query sees: documents, windows, the ways to compute them, and bf16's own backward pass."""

import pytest
import torch
from torch.nn import functional as F

from models import attention
from models.attention import attend, visibility
from models.cpu_attention import CpuAttention


def inputs(rows, queries, keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries)
    shapes = ((rows, queries, 4, 8), (rows, keys, 2, 8), (rows, keys, 2, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(q, k, v, seen):
    """Softmax attention in fp32 as a textbook writes it."""
    k, v = (t.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("btnd,bsnd->bnts", q.float(), k) / q.shape[-1] ** 0.5
    return torch.einsum("bnts,bsnd->btnd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("longest_mask", [0, 512], ids=["long", "mask"])
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_visibility(monkeypatch, longest_mask, window, documents, dtype, tolerance):
    monkeypatch.setattr(attention, "LONGEST_MASK", longest_mask)
    rows, length = 2, 200
    ids = torch.stack([torch.arange(length) // 70, torch.arange(length) // 33]) if documents else None
    place = torch.arange(length)
    seen = place[:, None] >= place
    if window:
        seen = seen & (place[:, None] - place < window)
    seen = seen.expand(rows, 1, length, length)
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    leaves = inputs(rows, length, length, dtype)
    found = attend(*leaves, visibility(length, ids, window, leaves[0]))
    expected = plain(*leaves, seen)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(found.float(), expected)]
    pairs += zip(
        torch.autograd.grad(found, leaves, dy.to(dtype)), torch.autograd.grad(expected, leaves, dy), strict=True
    )
    for a, b in pairs:
        assert (a.float() - b.float()).norm() <= tolerance * max(1.0, b.float().norm())


@pytest.mark.parametrize(("queries", "keys", "masked"), [(300, 300, False), (300, 300, True), (70, 200, True)])
def test_own_backward_equals_torch(queries, keys, masked):
    q, k, v = (t.transpose(1, 2) for t in inputs(2, queries, keys))
    mask = None
    if masked:
        mask = torch.zeros(2, 1, queries, keys)
        mask.masked_fill_(torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1), float("-inf"))
        mask[1, :, :, 0] = float("-inf")
        mask[1, :, 0, 0] = 0.0
    dy = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=True)
    ours = CpuAttention.apply(q, k, v, mask)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(torchs, (q, k, v), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
