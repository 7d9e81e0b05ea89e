"""The experts' computation: sort tokens by expert, two grouped matrix products, weighted sum per token.

Shapes: S tokens, H hidden size, E experts, k experts per token, A = S * k assignments, P >= A slots (assignments sorted
by expert, on CPU with gaps), I width of an expert.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.uncompiled import uncompiled

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


class Routing(NamedTuple):
    """Attributes:
    choice: [S, k] int64, the experts of each token.
    weight: [S, k] fp32, what their outputs are multiplied by; 0 where the assignment is dropped.
    kept: [S, k] bool, false where it is, which is not computed; None: dropless.
    """

    choice: Tensor
    weight: Tensor
    kept: Tensor | None = None


def apply_experts(x_SH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, routing: Routing) -> Tensor:
    """sum_j weight[s, j] * expert[choice[s, j]](x[s]) with expert e = SwiGLU of gate_up[e], down[e]. Returns [S, H]."""
    if x_SH.device.type == "cpu":
        return _on_cpu(x_SH, gate_up_E2IH, down_EHI, routing)
    return _on_gpu(x_SH, gate_up_E2IH, down_EHI, routing)


def apply_padded(x_SH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, routing: Routing, capacity: int) -> Tensor:
    """`apply_experts` with `capacity` slots for every expert, empty ones zero: no shape depends on the routing.

    Args:
        routing: with `kept`, at most `capacity` assignments of each expert.
    """
    experts, hidden = gate_up_E2IH.shape[0], x_SH.shape[1]
    choice_Sk, weight_Sk, kept_Sk = routing
    assert kept_Sk is not None
    places, counts_E = sort_by_expert(_with_dropped(routing, experts), experts)
    expert_Sk, first_E = choice_Sk.where(kept_Sk, 0), counts_E.cumsum(0) - counts_E
    # The last row is a dummy: dropped assignments write to it and read from it.
    slot_Sk = (expert_Sk * capacity + places.slot_Sk - first_E[expert_Sk]).where(kept_Sk, experts * capacity)
    x_SkH = x_SH[:, None].expand(*slot_Sk.shape, hidden).flatten(0, 1)
    x_PH = x_SH.new_zeros(experts * capacity + 1, hidden).index_copy(0, slot_Sk.flatten(), x_SkH)
    x_ECH = x_PH[:-1].view(experts, capacity, hidden)
    gate_ECI, up_ECI = torch.bmm(x_ECH, gate_up_E2IH.transpose(1, 2)).chunk(2, dim=-1)
    y_ECH = torch.bmm(F.silu(gate_ECI) * up_ECI, down_EHI.transpose(1, 2))
    y_PH = torch.cat([y_ECH.flatten(0, 1), y_ECH.new_zeros(1, hidden)])
    return (y_PH[slot_Sk] * weight_Sk.to(x_SH.dtype)[..., None]).sum(1)


def grouped_experts(x_SH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, routing: Routing) -> Tensor:
    """`apply_experts` for accelerators: torch's grouped matrix products, without device synchronisation."""
    experts = gate_up_E2IH.shape[0]
    places, counts_E = sort_by_expert(_with_dropped(routing, experts), experts)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    dropped_P1 = None
    if routing.kept is not None:
        dropped_P1 = (torch.arange(len(places.token_P), device=x_SH.device) >= ends_E[-1])[:, None]

    def clean(t: Tensor) -> Tensor:
        # The grouped products write neither values nor gradients of rows after the last expert's.
        return t if dropped_P1 is None else t.masked_fill(dropped_P1, 0)

    x_PH = clean(_Scatter.apply(x_SH, places.token_P, places.slot_Sk))
    gate_PI, up_PI = clean(grouped_mm(x_PH, gate_up_E2IH.transpose(1, 2), offs=ends_E)).chunk(2, dim=-1)
    weight_P = routing.weight.flatten().index_select(0, places.assignment_P).to(x_SH.dtype)
    hidden_PI = clean(F.silu(gate_PI) * up_PI * weight_P[:, None])
    y_PH = clean(grouped_mm(hidden_PI, down_EHI.transpose(1, 2), offs=ends_E))
    return _Combine.apply(y_PH, places.token_P, places.slot_Sk)


def _with_dropped(routing: Routing, num_experts: int) -> Tensor:
    """Choices with dropped assignments moved to an extra expert after the last."""
    return routing.choice if routing.kept is None else routing.choice.where(routing.kept, num_experts)


class Places(NamedTuple):
    """Where tokens go: the token of each slot [P], the assignment of each slot [P] and the slots of each token [S, k].

    A padding slot holds token 0 and belongs to no assignment.
    """

    token_P: Tensor
    assignment_P: Tensor
    slot_Sk: Tensor


def sort_by_expert(choice_Sk: Tensor, num_experts: int, rooms_E: Tensor | None = None) -> tuple[Places, Tensor]:
    """Slots in the order of experts. Also each expert's number of assignments [E].

    Assignments to an expert E, one after the last, have the last slots.

    Args:
        rooms_E: int64, each expert's number of slots, if more than its assignments.
    """
    top_k = choice_Sk.shape[1]
    expert_A = choice_Sk.flatten()
    assignment_P = expert_A.to(torch.int16).argsort(stable=True)
    slot_P = torch.arange(len(expert_A), device=expert_A.device)
    counts_E = expert_A.new_zeros(num_experts + 1).scatter_add_(0, expert_A, torch.ones_like(expert_A))
    spread_P = assignment_P
    if rooms_E is not None:
        gaps_E = F.pad(rooms_E - counts_E[:-1], (1, 0)).cumsum(0)
        slot_P += gaps_E.index_select(0, expert_A.index_select(0, assignment_P))
        spread_P = assignment_P.new_zeros(len(expert_A) + int(gaps_E[-1]))
        spread_P[slot_P] = assignment_P
    slot_A = torch.empty_like(expert_A).index_copy_(0, assignment_P, slot_P)
    return Places(spread_P // top_k, spread_P, slot_A.view(-1, top_k)), counts_E[:-1]


def _combine(y_PH: Tensor, slot_Sk: Tensor, weight_Sk: Tensor | None = None) -> Tensor:
    """Sum of every token's slots, in one pass: on CPUs an embedding bag is the fastest; on GPUs it takes six times as
    long as what the compiler makes of a gather and a sum."""
    if y_PH.is_cuda:
        return y_PH[slot_Sk].sum(1)
    return F.embedding_bag(slot_Sk, y_PH, mode="sum", per_sample_weights=weight_Sk)


class _Scatter(torch.autograd.Function):
    """Tokens to their slots; autograd's own backward pass would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_P: Tensor, slot_Sk: Tensor) -> Tensor:
        ctx.save_for_backward(slot_Sk)
        return x.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        return _combine(dy, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token_P: Tensor, slot_Sk: Tensor) -> Tensor:
        ctx.save_for_backward(token_P)
        return _combine(y, slot_Sk)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        return dout.index_select(0, *ctx.saved_tensors), None, None


def _on_gpu(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    if x.dtype == torch.bfloat16:
        return grouped_experts(x, gate_up, down, routing)
    return _as_they_are(x, gate_up, down, routing)


@uncompiled
def _as_they_are(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """torch computes grouped products of every type, its compiler accepts those of bf16 only."""
    return grouped_experts(x, gate_up, down, routing)


@uncompiled
def _on_cpu(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    return _CpuExperts.apply(x, gate_up, down, _with_dropped(routing, gate_up.shape[0]), routing.weight)


class _CpuExperts(torch.autograd.Function):
    """The same with hand-written passes. Elementwise work between two products is done for as many experts at a time as
    fit in the cache: small experts amortise launch overhead, large ones find their rows in the cache.

    A padding slot's weight is 0, which keeps it out of the output and of every gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        counts = torch.bincount(choice.flatten(), minlength=len(gate_up))[: len(gate_up)].tolist()
        ctx.pieces = [Piece(1, count) for count in counts] if x.dtype == torch.float32 else _pieces(counts)
        rooms = [piece.rows for piece in ctx.pieces for _ in range(piece.experts)]
        places, _ = sort_by_expert(choice, len(gate_up), choice.new_tensor(rooms))
        slots = len(places.token_P)
        both_P2I, y_PH = x.new_empty(slots, gate_up.shape[1]), x.new_empty(slots, x.shape[1])
        y_PH[sum(rooms) :] = 0
        for pieces, experts, rows in _cached(ctx.pieces):
            both = both_P2I[rows]
            _products(pieces, x.index_select(0, places.token_P[rows]), gate_up[experts].mT, both)
            gate, up = both.chunk(2, dim=-1)
            _products(pieces, F.silu(gate).mul_(up), down[experts].mT, y_PH[rows])
        ctx.save_for_backward(x, both_P2I, weight, gate_up, down, *places)
        return _combine(y_PH, places.slot_Sk, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        x, both_P2I, weight, gate_up, down, *saved = ctx.saved_tensors
        places = Places(*saved)
        slots, used = len(places.token_P), sum(piece.experts * piece.rows for piece in ctx.pieces)
        weight_P = x.new_zeros(slots, 1)
        weight_P[places.slot_Sk.flatten(), 0] = weight.flatten().to(x.dtype)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        dweight_P, dx_PH = x.new_empty(slots), x.new_empty(slots, x.shape[1])
        dweight_P[used:], dx_PH[used:] = 0, 0
        for pieces, experts, rows in _cached(ctx.pieces):
            token_P, weight_P1, both = places.token_P[rows], weight_P[rows], both_P2I[rows]
            gate, up = both.chunk(2, dim=-1)
            dy, dhidden = dout.index_select(0, token_P), x.new_empty(up.shape)
            _products(pieces, dy, down[experts], dhidden)
            silu = F.silu(gate)
            hidden = silu * up
            torch.linalg.vecdot(dhidden, hidden, out=dweight_P[rows])
            _weight_products(pieces, dy, hidden.mul_(weight_P1), d_down[experts])
            dboth = torch.empty_like(both)
            dgate, dup = dboth.chunk(2, dim=-1)
            torch.mul(dhidden.mul_(weight_P1), silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=dgate)
            _weight_products(pieces, dboth, x.index_select(0, token_P), d_gate_up[experts])
            _products(pieces, dboth, gate_up[experts], dx_PH[rows])
        return _combine(dx_PH, places.slot_Sk), d_gate_up, d_down, None, dweight_P[places.slot_Sk].float()


class Piece(NamedTuple):
    """Neighbouring experts computed as one batched product: how many, with how many slots each."""

    experts: int
    rows: int


_ROWS = 32
"""Row granularity of a bf16 product. oneDNN compiles a kernel for every new shape, several milliseconds per layer at
every step if the shapes are the experts' loads, which never repeat. Launching a product costs about as much as this
many rows, too."""
_CACHED = 1024
"""Rows whose intermediate values stay in the cache."""


def _pieces(counts: list[int]) -> list[Piece]:
    """Group experts with this many rows each, by bisection, where fewer launches outweigh the padding."""
    rooms = [-(-count // _ROWS) * _ROWS for count in counts]
    experts, most = len(rooms), max(rooms)
    few, even = experts * most <= 4 * _CACHED, experts * most - sum(rooms) <= experts * _ROWS
    if experts == 1 or (few and even):
        return [Piece(experts, most)]
    half = experts // 2
    return _pieces(counts[:half]) + _pieces(counts[half:])


def _cached(pieces: list[Piece]) -> Iterator[tuple[list[Piece], slice, slice]]:
    """Runs of pieces that fit the cache together: the pieces, their experts, their slots."""
    run: list[Piece] = []
    expert, slot, experts, slots = 0, 0, 0, 0
    for piece in pieces:
        if run and slots + piece.experts * piece.rows > _CACHED:
            yield run, slice(expert, expert + experts), slice(slot, slot + slots)
            run, expert, slot, experts, slots = [], expert + experts, slot + slots, 0, 0
        run.append(piece)
        experts, slots = experts + piece.experts, slots + piece.experts * piece.rows
    yield run, slice(expert, expert + experts), slice(slot, slot + slots)


def _products(pieces: list[Piece], a_PK: Tensor, b_EKN: Tensor, out_PN: Tensor) -> None:
    """Every expert's slots times its matrix."""
    for a, b, out in zip(_slots(pieces, a_PK), _experts(pieces, b_EKN), _slots(pieces, out_PN), strict=True):
        _product(a, b, out)


def _weight_products(pieces: list[Piece], a_PM: Tensor, b_PN: Tensor, out_EMN: Tensor) -> None:
    """Every expert's slots of one matrix, transposed, times those of the other."""
    for a, b, out in zip(_slots(pieces, a_PM), _slots(pieces, b_PN), _experts(pieces, out_EMN), strict=True):
        _product(a.mT, b, out)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if len(a) > 1:
        torch.bmm(a, b, out=out)
    else:
        torch.mm(a[0], b[0], out=out[0])


def _slots(pieces: list[Piece], t_PN: Tensor) -> list[Tensor]:
    """Of every piece [experts, rows, N]."""
    parts = t_PN.split([experts * rows for experts, rows in pieces])
    return [part.view(*piece, t_PN.shape[1]) for piece, part in zip(pieces, parts, strict=True)]


def _experts(pieces: list[Piece], t_EMN: Tensor) -> Sequence[Tensor]:
    return t_EMN.split([piece.experts for piece in pieces])
