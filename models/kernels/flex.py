"""Attention on GPU where a query sees only some keys: FlexAttention skips whole tiles (arXiv:2412.05496)."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.decoder.pattern import Pattern

from .compiler import compiled

SMALLEST_HEAD = 16
"""Minimum width of the kernel's matrix products."""


def block_mask(places_BT: Tensor, document_ids: Tensor | None, pattern: Pattern) -> BlockMask:
    """Which tiles of [T, T] are visible fully, partly or not at all.

    Args:
        places_BT: position of each token in its document.
        document_ids: [B, T], or None: each row is one document.
    """
    rows, length = places_BT.shape

    def row_sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.sees(query, key)

    def documents_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert document_ids is not None
        same = document_ids[row, query] == document_ids[row, key]
        return same & pattern.sees(places_BT[row, query], places_BT[row, key])

    sees, batch = (row_sees, None) if document_ids is None else (documents_see, rows)
    return _on(places_BT, create_block_mask)(sees, batch, None, length, length, device=places_BT.device)


def attend(q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, blocks: BlockMask) -> Tensor:
    """Scaled dot-product attention, scale D^-0.5. Returns [B, T, N, D]."""
    size = q_BTND.shape[-1]
    q, k, v = (F.pad(x.transpose(1, 2), (0, max(0, SMALLEST_HEAD - size))) for x in (q_BTND, k_BTKD, v_BTKD))
    y = _on(q, flex_attention)(q, k, v, block_mask=blocks, scale=size**-0.5, enable_gqa=q.shape[1] != k.shape[1])
    return y[..., :size].transpose(1, 2)


def _on(x: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on GPU: uncompiled it would materialise all of [T, T]."""
    return _compiled(function) if x.device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function)
