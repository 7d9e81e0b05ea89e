"""One MoE layer, forward and backward, over experts, top-k and tokens: ours beside others of equal active FLOPs."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from . import Part, Row, Setting
from .rig import peak, seconds_of

# Liger reads it on import; tuning the tile sizes of its fused experts would take minutes per cell.
os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")

HIDDEN, WIDTH = 2048, 1024
CELLS = [
    (64, 8, 16384), (8, 2, 16384), (128, 8, 16384), (64, 8, 4096), (64, 8, 32768), (64, 1, 16384), (8, 1, 4096),
    (128, 2, 32768),
]  # fmt: skip
"""Experts, top-k and tokens."""


def contestants(cell: Any, setting: Setting, compiled: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Layers by name, each built when asked for, because all of them together would fill the device.

    The dense layer comes first, because the others are compared with it; Liger's, which compiles the longest, last.
    """
    import moe_layer

    def layer(name: str) -> Any:
        with torch.device(setting.device):
            made = moe_layer.layer_for(name, cell)
        made = made.to(torch.bfloat16)
        for key, p in made.named_parameters():
            router = key.endswith("gate.weight") and len(p) == cell.experts
            torch.nn.init.eye_(p) if router else torch.nn.init.normal_(p, std=0.02)
        return made

    x = moe_layer.inputs(cell, 0)[None].to(setting.device, torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)

    def both(made: Any) -> Callable[[], Any]:
        wanted = [x, *made.parameters()]
        return lambda: torch.autograd.grad(made(x), wanted, dy)

    yield "dense", both(layer("dense"))
    yield "muster", both(_with_tokens(layer("muster"), setting))
    if compiled:
        made = _with_tokens(layer("muster"), setting)
        made.compile(dynamic=False)
        yield "muster compiled", both(made)
    for kind in ("grouped_mm", "eager"):
        if kind == "grouped_mm" or cell.experts == 8:
            with contextlib.suppress(ImportError):
                yield f"transformers {kind}", both(layer(f"transformers {kind}"))
    yield "grouped products", grouped_products(cell, setting)
    if setting.device == "cuda":
        with contextlib.suppress(ImportError):
            yield "Liger fused", both(liger(layer("muster")))


def _with_tokens(layer: Any, setting: Setting) -> Any:
    layer.chooser._tokens_BT = layer.chooser._tokens_BT.to(setting.device)
    return layer


def liger(layer: Any) -> Any:
    """Our parameters and a plain top-k router, with Liger's fused experts."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts, self.top_k = layer.gate, layer.experts, layer.chooser.config.top_k

        def forward(self, x: Any) -> Any:
            flat = x.flatten(0, 1)
            weight, choice = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)
            weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
            up, down = self.experts.gate_up_proj, self.experts.down_proj
            return LigerFusedMoEFunction.apply(flat, up, down, choice.int(), weight).view_as(x)

    return Fused()


def grouped_products(cell: Any, setting: Setting) -> Callable[[], Any]:
    """Only the grouped products, for even loads and sorted tokens."""
    from models.moe.experts import grouped_mm

    slots, e = cell.tokens * cell.top_k, cell.experts
    make = lambda *shape: torch.randn(*shape, device=setting.device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()  # noqa: E731
    x, up, down = make(slots, cell.hidden), make(e, 2 * cell.width, cell.hidden), make(e, cell.hidden, cell.width)
    ends = torch.arange(1, e + 1, device=setting.device, dtype=torch.int32) * (slots // e)
    dy = torch.randn_like(x)

    def call() -> Any:
        gate, value = grouped_mm(x, up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=ends)
        return torch.autograd.grad(y, (x, up, down), dy)

    return call


def cells(which: list[tuple[int, int, int]], compiled: bool) -> Callable[[Setting], Iterator[Row]]:
    def run(setting: Setting) -> Iterator[Row]:
        import moe_layer

        for experts, top_k, tokens in [(4, 2, 128)] if setting.dry else which:
            hidden, width = (64, 32) if setting.dry else (HIDDEN, WIDTH)
            cell = moe_layer.Cell("bf16", tokens, experts, top_k, "even", hidden, width)
            flops = 3 * 2 * tokens * top_k * 3 * hidden * width
            dense = None
            for name, call in contestants(cell, setting, compiled):
                row: Row = {"experts": experts, "top_k": top_k, "tokens": tokens, "by": name}
                try:
                    took = seconds_of(call, setting, repeats=7)
                except Exception as error:
                    yield row | {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
                    continue
                finally:
                    del call
                    gc.collect()
                dense = took if name == "dense" else dense
                row |= {"ms": took * 1e3, "of_peak": flops / took / peak(setting)}
                yield row | ({"of_dense": dense / took} if dense else {})

    return run


PARTS = [
    Part("layer.main", cells(CELLS[:2], compiled=True), 35),
    Part("layer.more", cells(CELLS[2:], compiled=False), 30),
]
