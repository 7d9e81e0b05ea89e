"""Attention, experts and compiled layers in isolation: against plain arithmetic, and against eager mode."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs import BlockSparse
from models.decoder import attention as attention_module
from models.decoder.attention import places
from models.decoder.pattern import Pattern
from models.kernels import flex
from models.kernels.uncompiled import leave_uncompiled
from models.moe import experts as moe
from models.moe.router import choosers

from . import Row, Setting
from .checks import (
    MOE,
    Recompiles,
    attempt,
    dynamo_counts,
    fresh_dynamo,
    gradients,
    kernels,
    objective,
    plain_model,
    random_batch,
    random_documents,
    relative,
    relative_all,
    small_config,
    tap_of,
    with_gradients,
    within,
)

# Attention


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention [B, T, N, D] written out, in the inputs' precision."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnts,bsnd->btnd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def heads(setting: Setting, length: int, dtype: torch.dtype, size: int = 64, rows: int = 2) -> list[Tensor]:
    """q, k and v of 8 and 2 heads, and a gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(rows, length, 8, size), (rows, length, 2, size), (rows, length, 2, size), (rows, length, 8, size)]
    return [torch.randn(shape, generator=generator).to(setting.device, dtype) for shape in shapes]


def beside_reference(
    attend: Callable[..., Tensor], inputs: Sequence[Tensor], seen: Tensor, *, backward: bool = True
) -> Row:
    """Output and gradients of an attention against masked softmax in fp32 of the same inputs.

    Allowed in fp32: rounding of sums over some thousand keys. In bf16: three times the error of the same reference
    computed in bf16, but at least 0.005.
    """
    *qkv, dout = inputs
    wide = [x.float() for x in qkv]
    gradient = dout if backward else None
    true = with_gradients(partial(masked_softmax, seen=seen), wide, None if gradient is None else gradient.float())
    allowed, noise = [2e-5] * len(true), 0.0
    if qkv[0].dtype != torch.float32:
        plain = with_gradients(partial(masked_softmax, seen=seen), qkv, gradient)
        own = [relative(a, b) for a, b in zip(plain, true, strict=True)]
        noise, allowed = max(own), [max(3 * e, 5e-3) for e in own]
    found = with_gradients(attend, qkv, gradient)
    errors = [relative(a, b) for a, b in zip(found, true, strict=True)]
    worst = max(range(len(errors)), key=lambda i: errors[i] / allowed[i] if errors[i] == errors[i] else math.inf)
    finite = all(bool(torch.isfinite(t).all()) for t in found)
    row = within(errors[worst], allowed[worst], of=("output", "dq", "dk", "dv")[worst], noise=noise)
    return row | {"ok": row["ok"] and finite}


def flexible(setting: Setting) -> Iterator[Row]:
    """`models.kernels.flex` against masked softmax."""
    fp32, bf16 = torch.float32, torch.bfloat16
    window = Pattern(window=100)
    sparse = Pattern(sparse=BlockSparse(block=64, local_blocks=2, global_blocks=1, stride=4))
    cases: list[tuple[str, Pattern, int, int, torch.dtype]] = [
        ("documents", Pattern(), 5, 1000, bf16),
        ("documents", Pattern(), 5, 1000, fp32),
        ("documents", Pattern(), 5, 128, bf16),
        ("documents", Pattern(), 5, 2048, bf16),
        ("window", window, 0, 1000, bf16),
        ("block-sparse", sparse, 0, 2048, bf16),
        ("documents, block-sparse", sparse, 3, 2048, fp32),
        ("documents, window", window, 5, 1000, fp32),
    ]
    if setting.dry:  # on a CPU it runs uncompiled, and has no backward pass
        cases = [(name, pattern, documents, 160, dtype) for name, pattern, documents, _, dtype in cases[::3]]
    previous = ""
    for name, pattern, documents, length, dtype in cases:
        if name != previous:
            fresh_dynamo()
        previous = name

        def check(pattern=pattern, documents=documents, length=length, dtype=dtype) -> Row:
            inputs = heads(setting, length, dtype)
            ids = None
            if documents:
                ids = random_documents(2, length, documents, torch.Generator().manual_seed(1)).to(setting.device)
            place = places(ids, length, torch.device(setting.device))
            blocks = flex.block_mask(place, ids, pattern)
            seen = pattern.sees(place[:, None, :, None], place[:, None, None])
            if ids is not None:
                seen = seen & (ids[:, None, :, None] == ids[:, None, None])

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return flex.attend(q, k, v, blocks)

            row = beside_reference(attend, inputs, seen, backward=setting.device == "cuda")
            row |= dynamo_counts() | {"sparsity": round(float(blocks.sparsity()), 1)}
            if setting.device == "cuda":
                row["kernel"] = kernels(lambda: with_gradients(attend, inputs[:3], inputs[3]), ("flex", "tem_"))
                row["ok"] = row["ok"] and any(word in row["kernel"] for word in ("flex", "tem_", "not told"))
            return row

        yield attempt(f"{name}, T {length}, {str(dtype)[6:]}", check)


def attention(setting: Setting) -> Iterator[Row]:
    """SDPA's backends and variable-length attention against masked softmax."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    words = ("flash", "fmha", "cudnn", "attention", "sdp", "softmax", "cutlass")
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if setting.device == "cpu":
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    for length in (48,) if setting.dry else (128, 1000, 2048):
        seen = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril()
        for backend in backends:
            for dtype in (torch.bfloat16, torch.float32):
                half_only = backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
                if setting.device == "cuda" and dtype == torch.float32 and half_only:
                    continue

                def check(backend=backend, dtype=dtype, length=length, seen=seen) -> Row:
                    inputs = heads(setting, length, dtype)

                    def attend(q: Tensor, k: Tensor, v: Tensor, gqa: bool = True) -> Tensor:
                        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                        if not gqa:
                            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
                        with sdpa_kernel(backend):  # only this one: SDPA raises if it is not supported
                            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
                        return y.transpose(1, 2)

                    try:
                        with_gradients(attend, inputs[:3], inputs[3])
                        grouped = True
                    except RuntimeError:
                        grouped = False

                    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                        return attend(q, k, v, grouped)

                    ran = kernels(lambda: with_gradients(chosen, inputs[:3], inputs[3]), words)
                    return beside_reference(chosen, inputs, seen) | {"takes_gqa": grouped, "kernel": ran}

                yield attempt(f"sdpa {backend.name}, T {length}, {str(dtype)[6:]}", check)
    for length in (48,) if setting.dry else (128, 1000, 2048):
        if setting.device == "cpu":
            yield {"check": f"varlen, T {length}", "skipped": "it has no kernel for CPUs"}
        else:
            yield attempt(f"varlen, T {length}, bfloat16", partial(variable_length, setting, length))


def variable_length(setting: Setting, length: int) -> Row:
    """torch's `varlen_attn` over documents against masked softmax."""
    from torch.nn.attention import varlen

    inputs = heads(setting, length, torch.bfloat16)
    ids = random_documents(2, length, 5, torch.Generator().manual_seed(1)).to(setting.device)
    seen = (ids[:, None, :, None] == ids[:, None, None]) & torch.ones(
        length, length, dtype=torch.bool, device=setting.device
    ).tril()
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids.diff(dim=1) != 0
    starts = begins.flatten().nonzero()[:, 0]
    ends = F.pad(starts, (0, 1), value=ids.numel()).to(torch.int32)
    longest = int(ends.diff().max())
    known = inspect.signature(varlen.varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = "enable_gqa" in known
    if grouped:
        causal["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not grouped:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        flat = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
        y: Any = varlen.varlen_attn(*flat, ends, ends, longest, longest, **causal)  # type: ignore
        assert isinstance(y, Tensor)
        return y.view(q.shape)

    row = beside_reference(attend, inputs, seen) | {"takes_gqa": grouped, "causal_by": "/".join(causal)}
    return row | {"kernel": kernels(lambda: with_gradients(attend, inputs[:3], inputs[3]), ("flash", "fmha", "cudnn"))}


# Experts


def routing_of(load: str, tokens: int, experts: int, top_k: int) -> moe.Routing:
    """Distinct experts for each token, and their weights, on the CPU.

    Args:
        load: `even`, `skewed` (each expert is twice as likely as the next), `empty` (a quarter of the experts, the
            first and last included, get nothing), `dropped` (even, with every fifth assignment left out).
    """
    generator = torch.Generator().manual_seed(tokens + experts + top_k)
    scores = torch.rand(tokens, experts, generator=generator).log().neg().log().neg()  # Gumbel noise
    if load == "skewed":
        scores = scores - 0.7 * torch.arange(experts)
    if load == "empty" and experts > top_k:
        unused = torch.arange(experts) % 4 == 0
        unused[-1] = True
        if int((~unused).sum()) >= top_k:
            scores[:, unused] = -math.inf
    choice = scores.topk(top_k, dim=-1).indices
    weight = torch.rand(tokens, top_k, generator=generator) + 0.1
    if load != "dropped":
        return moe.Routing(choice, weight)
    kept = torch.rand(tokens, top_k, generator=generator) > 0.2
    return moe.Routing(choice, weight * kept, kept)


def expert_loop(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
    """Every expert on its own; a dropped assignment has weight 0."""
    y = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, place = (choice == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].t()).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down[expert].t()
        y = y.index_add(0, token, out * weight[token, place][:, None].to(x.dtype))
    return y


def expert_check(
    setting: Setting, dtype: torch.dtype, load: str, experts: int, top_k: int, *, padded: bool = False
) -> Row:
    """Output and all gradients of grouped (or padded) experts, against the loop in fp64 on the same inputs."""
    tokens, hidden, width = (64, 32, 32) if setting.dry else (1024, 256, 128)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    x, dout = draw(tokens, hidden), draw(tokens, hidden)
    gate_up, down = draw(experts, 2 * width, hidden, std=hidden**-0.5), draw(experts, hidden, width, std=width**-0.5)
    routing = routing_of(load, tokens, experts, top_k)
    leaves = [x, gate_up, down, routing.weight]
    choice, kept = routing.choice.to(setting.device), None if routing.kept is None else routing.kept.to(setting.device)
    capacity = int(torch.bincount(routing.choice.flatten(), minlength=experts).max())

    def ours(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
        if padded:
            return moe.apply_padded(x, gate_up, down, moe.Routing(choice, weight, kept), capacity)
        return moe.grouped_experts(x, gate_up, down, moe.Routing(choice, weight, kept))

    true = with_gradients(partial(expert_loop, choice=routing.choice), [t.double() for t in leaves], dout.double())
    here = [t.to(setting.device) for t in leaves]
    found = with_gradients(ours, here, dout.to(setting.device))
    allowed = [1e-5] * 5
    if dtype != torch.float32:
        loop = with_gradients(partial(expert_loop, choice=choice), here, dout.to(setting.device))
        allowed = [max(2 * relative(a, b), 4e-3) for a, b in zip(loop, true, strict=True)]
    if kept is not None:  # the gradient of a dropped assignment's weight is undefined
        mask = routing.kept.to(torch.float64)  # type: ignore[union-attr]
        found[4], true[4] = found[4].double().cpu() * mask, true[4] * mask
    errors = [relative(a, b) for a, b in zip(found, true, strict=True)]
    worst = max(range(5), key=lambda i: errors[i] / allowed[i] if errors[i] == errors[i] else math.inf)
    row = within(errors[worst], allowed[worst], of=("output", "dx", "dgate_up", "ddown", "dweight")[worst])
    unused = torch.bincount(routing.choice.flatten(), minlength=experts) == 0
    clean = all(bool((t.cpu()[unused] == 0).all()) for t in found[2:4])
    row |= {"empty_experts": int(unused.sum()), "ok": row["ok"] and clean}
    if load == "even" and not padded:
        row["kernel"] = kernels(
            lambda: with_gradients(ours, here, dout.to(setting.device)), ("gemm", "group", "cutlass")
        )
    return row


def grouped(setting: Setting) -> Iterator[Row]:
    """`models.moe.experts` against a loop over the experts."""
    for dtype in (torch.bfloat16, torch.float32):
        for load in ("even", "skewed", "empty", "dropped"):
            for experts, top_k in ((8, 1), (8, 2), (64, 2), (64, 8)):
                name = f"{load}, {top_k} of {experts}, {str(dtype)[6:]}"
                yield attempt(name, partial(expert_check, setting, dtype, load, experts, top_k))
        for experts, top_k in ((8, 2), (64, 8)):
            name = f"padded, {top_k} of {experts}, {str(dtype)[6:]}"
            yield attempt(name, partial(expert_check, setting, dtype, "dropped", experts, top_k, padded=True))


# Compiled layers


def compiled(setting: Setting) -> Iterator[Row]:
    """Layers compiled by torch against eager ones."""
    bf16, fp32 = "bf16", "fp32"
    capacity = MOE | {"capacity_factor": 1.0}
    cases: list[tuple[str, dict[str, Any], str, int, int]] = [
        ("moe", MOE, bf16, 0, 0),
        ("dense", {}, bf16, 0, 0),
        ("moe, documents", MOE, bf16, 4, 0),
        ("moe, capacity", capacity, bf16, 0, 0),
        ("moe, hash", MOE | {"router": "hash"}, bf16, 0, 0),
        ("dropout", {"dropout": 0.1}, bf16, 0, 0),
        ("moe, recomputed", MOE, bf16, 0, 1),
        ("moe", MOE, fp32, 0, 0),
        ("dense", {}, fp32, 0, 0),
    ]
    for name, tree, kind, documents, recompute in cases:
        check = partial(against_eager, setting, tree, kind, documents, recompute)
        with as_on_gpu() if setting.device == "cpu" else nullcontext():
            row = attempt(f"{name}, {kind}", check)
        yield row
    if setting.device == "cuda":
        yield attempt("a barrier before what another thread has stored is loaded", barrier)


def barrier() -> Row:
    """Whether torch's compiler is mended: a kernel that stores in a first loop and loads that in a second."""
    from torch._inductor.utils import run_and_get_code

    from models.kernels.compiler import compiled

    def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y / y.sum(-1, keepdim=True)

    _, codes = run_and_get_code(compiled(normalised, dynamic=False), torch.randn(64, 8192, device="cuda"))
    kernel = "".join(codes)
    return {"ok": "tl.debug_barrier()" in kernel, "loads_what_it_stored": "tl.load(out_ptr" in kernel}


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Without our own CPU kernels, which the compiler cannot see into."""
    leave_uncompiled()  # once, or it would undo this
    kept = moe._on_cpu, attention_module.LONGEST_KERNEL
    moe._on_cpu, attention_module.LONGEST_KERNEL = moe._on_gpu, 0
    try:
        yield
    finally:
        moe._on_cpu, attention_module.LONGEST_KERNEL = kept


def against_eager(setting: Setting, tree: dict[str, Any], kind: str, documents: int, recompute: int) -> Row:
    """Loss and gradients of compiled and eager layers over two batches; the number of graphs, and what broke them.

    In bf16, where a compiled layer rounds less often, both are compared with the eager model in fp32: compiled layers
    may be twice as far from it as eager ones, because the few router choices that flip dominate the error.
    """
    from trainer.engine.precision import WorkingCopies

    config = small_config(setting, tree | {"num_layers": 4})
    batches = [random_batch(config, seed, documents).to(setting.device) for seed in range(2)]
    found, choices = [], []
    turns = [(False, "fp32"), (True, "fp32")] if kind == "fp32" else [(False, "fp32"), (False, "bf16"), (True, "bf16")]
    for compile_it, dtype in turns:
        fresh_dynamo()
        module = plain_model(config, setting.device)
        module.set_activation_checkpointing(recompute)  # type: ignore[operator]
        if dtype == "bf16":
            WorkingCopies(module, torch.bfloat16)
        tap = tap_of(module, config)
        with Recompiles() as again:
            if compile_it:
                backend = "aot_eager" if setting.dry else "inductor"
                for layer in module.model.layers:  # type: ignore[union-attr]
                    layer.compile(dynamic=False, backend=backend)
            losses, chosen = [], []
            for batch in batches:
                module.zero_grad()  # gradient accumulation is compiled separately
                out = module(batch)
                chosen += [chooser.heard.choice for chooser in choosers(module) if chooser.heard]
                loss = objective(tap, out, config)
                loss.backward()
                losses.append(loss.item())
        found.append((losses, gradients(module)))
        choices.append(torch.cat(chosen).sort(-1).values.cpu() if chosen else torch.zeros(1, 1))
    equal = (choices[-1] == choices[-2]).all(-1).float().mean().item()
    error, worst, name = relative_all(found[-1][1], found[-2][1])
    off = max(abs(a - b) / abs(b) for a, b in zip(found[-1][0], found[-2][0], strict=True))
    # A router choice that rounding flips moves the gradients by more than rounding.
    allowed = 1e-3 if equal == 1 else 5e-2
    more: Row = {}
    if kind == "bf16":
        eager, _, _ = relative_all(found[1][1], found[0][1])
        error, worst, name = relative_all(found[2][1], found[0][1])
        allowed, more = 2 * eager + 1e-3, {"eager_error": eager}
    row = within(error, allowed, loss_error=off, worst=worst, worst_in=name, equal_choices=equal, **more)
    row |= dynamo_counts()
    row["ok"] = row["ok"] and off <= (1e-3 if kind == "bf16" else 1e-4) and equal > (0.95 if kind == "bf16" else 0.99)
    if kind == "bf16" or not config.model.is_moe:  # experts in fp32 are left out of the graph
        # On a GPU the loss, FlexAttention's mask and the gradients' conversion are compiled separately.
        others = 2 + (documents > 0) if setting.device == "cuda" else 0
        row["ok"] = row["ok"] and row["breaks"] == 0 and row["graphs"] <= 1 + others
    if again.reasons:
        row["compiled_again"] = "; ".join(again.reasons)[:600]
    return row
