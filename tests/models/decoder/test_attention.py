"""What a query sees: documents, windows, blocks; the ways to compute it, their work and memory; own backward passes."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs import BlockSparse
from models.decoder import attention
from models.decoder.attention import attend, visibility
from models.decoder.pattern import Pattern
from models.kernels import flex
from models.kernels.cpu_attention import CpuAttention

PATTERNS = {
    "full": Pattern(),
    "window 1": Pattern(1),
    "window 5": Pattern(5),
    "window 70": Pattern(70),
    "window 300": Pattern(300),
    "local blocks": Pattern(None, BlockSparse(block=8, local_blocks=3, global_blocks=0)),
    "first blocks": Pattern(None, BlockSparse(block=16, local_blocks=1, global_blocks=2)),
    "strided blocks": Pattern(None, BlockSparse(block=4, local_blocks=2, global_blocks=1, stride=5)),
    "odd blocks": Pattern(None, BlockSparse(block=11, local_blocks=2, global_blocks=1, stride=3)),
    "large blocks": Pattern(None, BlockSparse(block=40, local_blocks=1, global_blocks=1)),
    "stride 1": Pattern(None, BlockSparse(block=8, local_blocks=1, stride=1)),
}
ROWS, LENGTH = 2, 200
IDS = torch.stack([torch.arange(LENGTH) // 70, torch.arange(LENGTH) // 33])


def sees(pattern, query, key):
    """The rule as its papers put it, for two places in one document."""
    if pattern.window:
        return query - pattern.window < key <= query
    if pattern.sparse:
        mine, other = query // pattern.sparse.block, key // pattern.sparse.block
        kinds = {
            "local": mine - pattern.sparse.local_blocks < other,
            "global": other < pattern.sparse.global_blocks,
            "strided": pattern.sparse.stride and other in range(mine, -1, -pattern.sparse.stride),
        }
        return key <= query and any(kinds.values())
    return key <= query


def reference(pattern, ids):
    """[B or 1, 1, T, T] bool."""
    grid = torch.tensor([[sees(pattern, q, k) for k in range(LENGTH)] for q in range(LENGTH)])
    if ids is None:
        return grid[None, None]
    rows = []
    for row in ids:
        lengths = torch.unique_consecutive(row, return_counts=True)[1]
        rows.append(torch.block_diag(*(grid[:n, :n] for n in lengths)).bool())
    return torch.stack(rows)[:, None]


def inputs(rows, queries, keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries)
    shapes = ((rows, queries, 4, 8), (rows, keys, 2, 8), (rows, keys, 2, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain(q, k, v, seen):
    """Softmax attention in fp32 as a textbook writes it."""
    k, v = (t.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("btnd,bsnd->bnts", q.float(), k) / q.shape[-1] ** 0.5
    return torch.einsum("bnts,bsnd->btnd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.few(30)
@pytest.mark.parametrize("longest_mask", [0, 512], ids=["long", "mask"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_visibility(monkeypatch, longest_mask, name, documents, dtype, tolerance):
    monkeypatch.setattr(attention, "LONGEST_MASK", longest_mask)
    monkeypatch.setattr("models.decoder.pattern.TILE", 16)
    ids = IDS if documents else None
    leaves = inputs(ROWS, LENGTH, LENGTH, dtype)
    found = attend(*leaves, visibility(LENGTH, ids, PATTERNS[name], leaves[0]))
    expected = plain(*leaves, reference(PATTERNS[name], ids))
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(found.float(), expected)]
    pairs += zip(
        torch.autograd.grad(found, leaves, dy.to(dtype)), torch.autograd.grad(expected, leaves, dy), strict=True
    )
    for a, b in pairs:
        assert (a.float() - b.float()).norm() <= tolerance * max(1.0, b.float().norm())


@pytest.mark.parametrize("name", PATTERNS)
def test_keys_per_query(name):
    pattern, seen = PATTERNS[name], reference(PATTERNS[name], None)[0, 0]
    for length in (1, 7, 50, LENGTH):
        assert pattern.keys_per_query(length) == pytest.approx(seen[:length, :length].sum().item() / length)
        assert pattern.is_full(length) == bool(seen[:length, :length].equal(seen.new_ones(length, length).tril()))


@pytest.mark.few(8)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_flex_attention_sees_the_same(name, documents):
    """Its backward pass, and its kernels, want a GPU."""
    ids = IDS if documents else None
    places = attention.places(ids, LENGTH, torch.device("cpu"))
    q, k, v = (t.detach() for t in inputs(ROWS, LENGTH, LENGTH))
    found = flex.attend(q, k, v, flex.block_mask(places, ids, PATTERNS[name]))
    torch.testing.assert_close(found, plain(q, k, v, reference(PATTERNS[name], ids)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [Pattern(100), Pattern(None, BlockSparse(block=32, local_blocks=3))], ids=str)
def test_work_and_memory_grow_with_the_length(pattern):
    def cost(length: int) -> tuple[int, int]:
        kept: dict[int, int] = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaves = inputs(1, length, length)
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = attend(*leaves, visibility(length, None, pattern, leaves[0]))
            y.backward(torch.ones_like(y))
        return flops.get_total_flops(), sum(kept.values())

    (flops, kept), (more_flops, more_kept) = cost(1024), cost(4096)
    assert more_flops < 4.5 * flops
    assert more_kept == 4 * kept
    assert kept == 4 * sum(x.numel() for x in inputs(1, 1024, 1024)), "more than its inputs"


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
