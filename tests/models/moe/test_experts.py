"""Grouped experts equal a plain loop over experts: values and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.moe.experts import Routing, apply_experts, apply_padded, grouped_experts
from models.moe.router import within_capacity


def oracle(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    choice, weight, _ = routing
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, slot = torch.where(choice == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[expert]) * weight[token, slot, None].to(x.dtype)
        out = out.index_add(0, token, y)
    return out


def case(dtype: torch.dtype, tokens: int, num_experts: int, top_k: int):
    """Inputs whose experts 0 and 3 get no token."""
    generator = torch.Generator().manual_seed(tokens)
    make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x, gate_up, down = make(tokens, 32), make(num_experts, 48, 32) * 0.2, make(num_experts, 32, 24) * 0.2
    logits = make(tokens, num_experts)
    logits[:, [0, 3]] = -100.0
    weight, choice = logits.softmax(-1).topk(top_k, dim=-1)
    leaves = [t.to(dtype).requires_grad_() for t in (x, gate_up, down)] + [weight.requires_grad_()]
    return leaves, choice, make(tokens, 32).to(dtype)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grouped", [apply_experts, grouped_experts])
def test_equals_loop(grouped, dtype, tolerance, tokens, top_k):
    leaves, choice, dy = case(dtype, tokens, 8, top_k)
    x, gate_up, down, weight = leaves
    results = []
    for function in (oracle, grouped):
        y = function(x, gate_up, down, Routing(choice, weight))
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).float().norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_experts_without_tokens_have_zero_gradients(dtype):
    (x, gate_up, down, weight), choice, dy = case(dtype, 70, 8, 1)
    for kept, used in ((None, [6]), (torch.zeros_like(choice, dtype=torch.bool), [])):
        y = apply_experts(x, gate_up, down, Routing(torch.full_like(choice, 6), weight, kept))
        gradients = torch.autograd.grad(y, [gate_up, down], dy)
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert gradient.flatten(1).any(1).nonzero().flatten().tolist() == used


def test_each_token_is_independent_of_its_batch():
    leaves, choice, _ = case(torch.float32, 70, 8, 2)
    x, gate_up, down, weight = leaves
    whole = apply_experts(x, gate_up, down, Routing(choice, weight))
    part = apply_experts(x[20:40], gate_up, down, Routing(choice[20:40], weight[20:40]))
    torch.testing.assert_close(part, whole[20:40], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 9, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_dropped_assignments_are_left_out(dtype, tolerance, limit):
    leaves, choice, dy = case(dtype, 70, 8, 2)
    x, gate_up, down, weight = leaves
    kept = within_capacity(choice, 8, limit)
    assert torch.bincount(choice[kept], minlength=8).max() <= limit
    assert kept.all() == (limit == 1000)
    results = []
    for function in (oracle, apply_experts, grouped_experts, apply_padded):
        # What is not written by a grouped product must not matter: fill the allocator's next blocks with NaN.
        [torch.full((rows, width), torch.nan, dtype=dtype) for rows in (140, 416) for width in (24, 32, 48)]
        more = [min(limit, 70)] if function is apply_padded else []
        y = function(x, gate_up, down, Routing(choice, weight * kept, kept), *more)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for expected, *others in zip(*results, strict=True):
        for found in others:
            assert (found - expected).float().norm() <= tolerance * expected.float().norm()
