"""Speed of the pieces of a training step, each alone: matrix products, attention, loss and optimizer."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from . import Row, Setting
from .rig import run_config, seconds_of


def matmul(setting: Setting) -> Iterator[Row]:
    """The upper bound: matrix products of the sizes used in training, on random numbers."""
    h, dt = setting.device, torch.bfloat16
    sizes = [(8192, 8192, 8192), (32768, 4096, 2048), (32768, 2048, 2048), (32768, 8192, 3072), (2048, 4096, 32768)]
    for m, n, k in [(128, 64, 64)] if setting.dry else sizes:
        a, b = torch.randn(m, k, device=h, dtype=dt), torch.randn(n, k, device=h, dtype=dt)
        took = seconds_of(lambda a=a, b=b: a @ b.t(), setting)
        yield {"product": f"bf16 {m}x{n}x{k}", "tflops": 2 * m * n * k / took / 1e12}
        if setting.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
            a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=h)
            rows, columns = torch.ones(m, 1, device=h), torch.ones(1, n, device=h)
            for name, sa, sb in (("tensorwise", one, one), ("rowwise", rows, columns)):
                call = lambda: torch._scaled_mm(a8, b8.t(), sa, sb, out_dtype=dt, use_fast_accum=True)  # noqa: B023, E731
                yield {"product": f"fp8 {name} {m}x{n}x{k}", "tflops": 2 * m * n * k / seconds_of(call, setting) / 1e12}
    x = torch.empty(1 << (16 if setting.dry else 30), dtype=torch.int8, device=h)
    y = torch.empty_like(x)
    yield {"product": "copy", "tb_per_second": 2 * x.numel() / seconds_of(lambda: y.copy_(x), setting) / 1e12}


def attention(setting: Setting) -> Iterator[Row]:
    """Causal attention by each of torch's kernels, forward, and forward with backward; FLOPs count the causal half."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from models.decoder.pattern import Pattern
    from models.kernels import flex

    shapes = [(16, 2048, 16, 8, 128), (4, 8192, 16, 8, 128), (16, 2048, 32, 8, 64)]
    if setting.dry:
        shapes = [(2, 64, 4, 2, 16)]
    for rows, length, heads, kv, size in shapes:
        q, k, v = (
            torch.randn(rows, n, length, size, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, kv, kv)
        )
        dy = torch.randn_like(q)
        flops = 2 * rows * heads * length * length * size  # two products, half of each

        def sdpa(backend: Any) -> Callable[[], Any]:
            def call() -> Any:
                with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023

            return call

        ways: dict[str, Callable[[], Any]] = {"sdpa default": sdpa(None)}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            ways[f"sdpa {backend.name.lower()}"] = sdpa(backend)

        def repeated() -> Any:
            groups = heads // kv  # noqa: B023
            return sdpa_all(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))  # noqa: B023

        ways["sdpa default, keys repeated"] = repeated
        places = torch.arange(length, device=setting.device)[None]
        documents = (torch.arange(length, device=setting.device) // max(length // 4, 1)).expand(rows, length)
        with torch.no_grad():
            for name, ids in (("flex causal", None), ("flex, 4 documents a row", documents)):
                place = places if ids is None else places.expand(rows, length) % max(length // 4, 1)
                blocks = flex.block_mask(place, ids, Pattern())

                def flexible(blocks: Any = blocks) -> Any:
                    return flex.attend(*(t.transpose(1, 2) for t in (q, k, v)), blocks).transpose(1, 2)  # noqa: B023

                ways[name] = flexible
        if setting.device == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            for count in (1, 4):
                ends = torch.arange(0, rows * count + 1, device="cuda", dtype=torch.int32) * (length // count)

                def varlen(ends: Any = ends, longest: int = length // count) -> Any:
                    groups = heads // kv  # noqa: B023
                    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # noqa: B023
                    flat = [flat[0], *(t.repeat_interleave(groups, 1) for t in flat[1:])]
                    causal: Any = {"is_causal": True} if _OLD_VARLEN else {"window_size": (-1, 0)}
                    y: Any = varlen_attn(*flat, ends, ends, longest, longest, **causal)
                    return y.view(rows, length, heads, size).transpose(1, 2)  # noqa: B023

                ways[f"varlen, {count} documents a row"] = varlen
        torch._dynamo.reset()  # torch.compile gives up after eight shapes
        for name, way in ways.items():
            row: Row = {"shape": f"{rows}x{length}, {heads}/{kv} heads of {size}", "by": name}
            try:
                with torch.no_grad():
                    forward = seconds_of(way, setting)
                both = seconds_of(lambda way=way: torch.autograd.grad(way(), (q, k, v), dy), setting)  # noqa: B023
            except Exception as error:
                yield row | {"not_run": f"{type(error).__name__}: {str(error)[:150]}"}
                continue
            share = 0.25 if "4 documents" in name else 1.0
            row |= {"forward_tflops": share * flops / forward / 1e12, "both_tflops": share * 3.5 * flops / both / 1e12}
            yield row | {"both_ms": both * 1e3}


def sdpa_all(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _varlen_is_old() -> bool:
    import inspect

    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        return "is_causal" in inspect.signature(varlen_attn).parameters
    return False


_OLD_VARLEN = _varlen_is_old()


def loss(setting: Setting) -> Iterator[Row]:
    """Head and cross-entropy, forward and backward: ours by chunk, and Liger's."""
    from models import loss as models_loss
    from models.loss import chunked_cross_entropy

    tokens, hidden = (128, 64) if setting.dry else (32768, 2048)
    for vocabulary in (256,) if setting.dry else (32768, 131072):
        h = torch.randn(tokens, hidden, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(vocabulary, hidden, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        w.data.mul_(0.02)
        labels = torch.randint(0, vocabulary, (tokens,), device=setting.device)
        ways: dict[str, Callable[[], Any]] = {}
        for chunk in (64,) if setting.dry else (1024, 4096, 16384):
            ways[f"ours, chunks of {chunk}"] = lambda chunk=chunk: chunked_cross_entropy(h, w, labels, chunk).loss_sum  # noqa: B023

        def eager() -> Any:
            kept, models_loss._in_two_passes = models_loss._in_two_passes, lambda: models_loss._loss_and_gradient
            try:
                return chunked_cross_entropy(h, w, labels, 4096).loss_sum  # noqa: B023
            finally:
                models_loss._in_two_passes = kept

        ways["ours, chunks of 4096, not compiled"] = eager
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            if setting.device == "cuda":
                liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
                ways["Liger fused linear"] = lambda: liger(w, h, labels)  # noqa: B023
        for name, way in ways.items():
            gc.collect()
            if setting.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row = {"vocabulary": vocabulary, "by": name}
            try:
                took = seconds_of(lambda way=way: torch.autograd.grad(way(), (h, w)), setting, repeats=5)  # noqa: B023
            except Exception as error:
                yield row | {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            memory = torch.cuda.max_memory_allocated() / 1e9 if setting.device == "cuda" else 0.0
            rate = 6 * tokens * hidden * vocabulary / took
            yield row | {"ms": took * 1e3, "tflops": rate / 1e12, "memory_gb": memory}


def optimizer(setting: Setting) -> Iterator[Row]:
    """Clipping and fused AdamW over the fp32 weights of dense-1b: each alone, with the bytes moved."""
    from models.families import build

    config = run_config("dense-1b", setting).model
    with torch.device(setting.device):
        parameters = list(build(config).parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    count = sum(p.numel() for p in parameters)
    adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def norm() -> Any:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)

    def norm_and_clip() -> None:
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm(), foreach=True)

    passes: list[tuple[str, Callable[[], Any], int]] = [
        ("norm", norm, 4), ("norm and clip", norm_and_clip, 12), ("fused AdamW", adam.step, 28),
    ]  # fmt: skip
    for name, work, size in passes:
        took = seconds_of(work, setting, repeats=5)
        yield {"pass": name, "parameters": count, "ms": took * 1e3, "tb_per_second": size * count / took / 1e12}
