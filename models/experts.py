"""The experts' arithmetic: sort tokens by expert, two grouped matrix products, weighted sum back.

Shapes: S tokens, H hidden size, E experts, k experts per token, A = S * k assignments, P >= A slots (assignments sorted
by expert, on CPU with gaps), I width of an expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def apply_experts(x_SH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, choice_Sk: Tensor, weight_Sk: Tensor) -> Tensor:
    """sum_j weight[s, j] * expert[choice[s, j]](x[s]) with expert e = SwiGLU of gate_up[e], down[e]. Returns [S, H]."""
    if x_SH.device.type == "cpu":
        return _on_cpu(x_SH, gate_up_E2IH, down_EHI, choice_Sk, weight_Sk)
    places, counts_E = sort_by_expert(choice_Sk, gate_up_E2IH.shape[0], 1)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    x_PH = _Scatter.apply(x_SH, places)
    gate_PI, up_PI = grouped_mm(x_PH, gate_up_E2IH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    weight_P = weight_Sk.flatten().index_select(0, places.assignment_P).to(x_SH.dtype)
    hidden_PI = F.silu(gate_PI) * up_PI * weight_P[:, None]
    return _Combine.apply(grouped_mm(hidden_PI, down_EHI.transpose(1, 2), offs=ends_E), places)


class Places(NamedTuple):
    """Where tokens go: the token of each slot [P], the assignment of each slot [P] and the slots of each token [S, k].

    A slot that is only a gap holds token 0, and nobody's slot is there.
    """

    token_P: Tensor
    assignment_P: Tensor
    slot_Sk: Tensor


def sort_by_expert(choice_Sk: Tensor, num_experts: int, multiple: int) -> tuple[Places, Tensor]:
    """Slots in the order of experts, each expert's number of slots rounded up to a multiple. Also the numbers [E]."""
    top_k = choice_Sk.shape[1]
    expert_A = choice_Sk.flatten()
    assignment_P = expert_A.argsort(stable=True)
    slot_P = torch.arange(len(expert_A), device=expert_A.device)
    counts_E = torch.bincount(expert_A, minlength=num_experts)
    if multiple > 1:
        padded_E = (counts_E + multiple - 1) // multiple * multiple
        gaps_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
        slot_P += gaps_E.index_select(0, expert_A.index_select(0, assignment_P))
        spread_P = assignment_P.new_zeros(int(padded_E.sum()))
        spread_P[slot_P] = assignment_P
    else:
        padded_E, spread_P = counts_E, assignment_P
    slot_A = torch.empty_like(expert_A).index_copy_(0, assignment_P, slot_P)
    return Places(spread_P // top_k, spread_P, slot_A.view(-1, top_k)), padded_E


def _combine(y_PH: Tensor, places: Places) -> Tensor:
    """Sum of every token's slots; an embedding bag is the quickest gather and sum in one pass."""
    return F.embedding_bag(places.slot_Sk, y_PH, mode="sum")


class _Scatter(torch.autograd.Function):
    """Tokens to their slots; autograd's own backward pass would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.token_P)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        return _combine(dy, ctx.places), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return _combine(y, places)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        return dout.index_select(0, ctx.places.token_P), None


@torch.compiler.disable
def _on_cpu(x: Tensor, gate_up: Tensor, down: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
    return _CpuExperts.apply(x, gate_up, down, choice, weight)


class _CpuExperts(torch.autograd.Function):
    """The same by hand: fewer passes over memory than autograd makes, and bf16 products in few distinct shapes.

    oneDNN compiles a kernel for every new shape of a bf16 product, several milliseconds a layer at every step, as the
    experts' loads never repeat. So there every expert's slots are rounded up to a multiple of 32. A gap's weight is 0,
    which keeps it out of the output and of every gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        places, sizes = sort_by_expert(choice, gate_up.shape[0], 1 if x.dtype == torch.float32 else 32)
        sizes = sizes.tolist()
        weight_P = x.new_zeros(len(places.token_P), 1)
        weight_P[places.slot_Sk.flatten(), 0] = weight.flatten().to(x.dtype)
        x_PH = x.index_select(0, places.token_P)
        both_P2I = _grouped(x_PH, gate_up.transpose(1, 2), sizes)
        gate, up = both_P2I.chunk(2, dim=-1)
        hidden_PI = F.silu(gate).mul_(up).mul_(weight_P)
        ctx.save_for_backward(x_PH, both_P2I, weight_P, gate_up, down, *places)
        ctx.sizes = sizes
        return _combine(_grouped(hidden_PI, down.transpose(1, 2), sizes), places)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        x_PH, both_P2I, weight_P, gate_up, down, *places = ctx.saved_tensors
        places, sizes = Places(*places), ctx.sizes
        gate, up = both_P2I.chunk(2, dim=-1)
        dy_PH = dout.index_select(0, places.token_P)
        dhidden = _grouped(dy_PH, down, sizes)
        silu = F.silu(gate)
        hidden = silu * up
        dweight_P = torch.linalg.vecdot(dhidden, hidden).float()
        d_down = _grouped_outer(dy_PH, hidden.mul_(weight_P), sizes)
        dhidden.mul_(weight_P)
        dboth = torch.empty_like(both_P2I)
        dgate, dup = dboth.chunk(2, dim=-1)
        torch.mul(dhidden, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=dgate)
        d_gate_up = _grouped_outer(dboth, x_PH, sizes)
        dx = _combine(_grouped(dboth, gate_up, sizes), places)
        return dx, d_gate_up, d_down, None, dweight_P[places.slot_Sk]


def _grouped(x_PM: Tensor, w_EMN: Tensor, sizes: list[int]) -> Tensor:
    """Rows of each expert times its matrix: [P, N]."""
    out_PN = x_PM.new_empty(x_PM.shape[0], w_EMN.shape[2])
    for x, w, out in zip(x_PM.split(sizes), w_EMN.unbind(0), out_PN.split(sizes), strict=True):
        torch.mm(x, w, out=out)
    return out_PN


def _grouped_outer(x_PM: Tensor, y_PN: Tensor, sizes: list[int]) -> Tensor:
    """Sum over each expert's rows of the outer products of x and y: [E, M, N]."""
    out_EMN = x_PM.new_empty(len(sizes), x_PM.shape[1], y_PN.shape[1])
    for x, y, out in zip(x_PM.split(sizes), y_PN.split(sizes), out_EMN.unbind(0), strict=True):
        torch.mm(x.t(), y, out=out)
    return out_EMN
