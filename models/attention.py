"""Grouped-query attention with QK-norm and RoPE, and which keys each query may see.

Shapes: B sequences, T queries, S keys, N query heads, K key/value heads, D head size, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import ModelConfig

from .cpu_attention import CpuAttention
from .norm import HeadNorm
from .rope import rotate

LONGEST_MASK = 512
"""On CPU a mask of [B, 1, T, T] is quicker up to this T; above it a loop over blocks of whole documents is."""


@dataclass(frozen=True)
class Block:
    """Queries `start:stop` of the sequences `rows` see keys `first:stop`: all earlier ones, or those under `mask`."""

    rows: slice
    start: int
    stop: int
    first: int
    mask: Tensor | None


class Blocks(tuple[Block, ...]):
    """Blocks of one batch; opaque to torch.compile, which would compile again for every batch."""


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees, made once per forward pass and shared by the layers. Neither set: all earlier ones."""

    mask: Tensor | None = None
    blocks: Blocks | None = None


def visibility(length: int, document_ids: Tensor | None, window: int | None, like: Tensor) -> Visibility:
    """Causal attention within documents and a sliding window.

    Args:
        length: T.
        document_ids: [B, T], or None: one document.
        window: keys that a query sees, itself included; None: all.
        like: a tensor with the dtype and device of the hidden states.
    """
    if window is not None and window >= length:
        window = None
    if document_ids is None and window is None:
        return Visibility()
    if length > LONGEST_MASK and like.device.type == "cpu":
        return Visibility(blocks=Blocks(_blocks(length, document_ids, window, like.dtype)))
    place = torch.arange(length, device=like.device)
    seen = causal(place, place, window)
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return Visibility(mask=additive(seen, like.dtype).expand(-1, 1, -1, -1))


def causal(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """[1, 1, T, S] bool from the places of queries [T] and keys [S]."""
    distance = queries[:, None] - keys
    seen = distance >= 0
    return (seen if window is None else seen & (distance < window))[None, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else -inf: SDPA on CPU is quicker with it than with a bool mask."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _blocks(length: int, document_ids: Tensor | None, window: int | None, dtype: torch.dtype):
    if document_ids is None:
        documents = [(slice(None), 0, length)]
    else:
        documents = []
        for row, ids in enumerate(document_ids):
            stops = torch.unique_consecutive(ids, return_counts=True)[1].cumsum(0).tolist()
            documents += [(slice(row, row + 1), a, b) for a, b in zip([0, *stops], stops, strict=False)]
    for rows, first, last in documents:
        step = window or last - first
        for start in range(first, last, step):
            stop, seen_from = min(start + step, last), max(first, start - step + 1)
            mask = None
            if seen_from < start:
                places = torch.arange(seen_from, stop)
                mask = additive(causal(places[start - seen_from :], places, window), dtype)
            yield Block(rows, start, stop, seen_from, mask)


class Cache:
    """Keys and values so far of every layer, for sequences that are padded on the left to one length.

    Args:
        padding: [B] int64, columns before each sequence's first token.
    """

    def __init__(self, padding: Tensor):
        self.padding, self.length = padding, 0
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def visibility(self, queries: int, window: int | None, like: Tensor) -> Visibility:
        """Which of the columns, these queries' included, each of the next queries sees. Counts them as present."""
        columns = torch.arange(self.length + queries, device=like.device)
        seen = causal(columns[self.length :], columns, window) & (columns >= self.padding[:, None, None, None])
        # A column of padding sees itself: a softmax over nothing would be NaN.
        seen = seen | (columns[self.length :, None] == columns)
        self.length += queries
        return Visibility(mask=additive(seen, like.dtype))

    def extend(self, layer: nn.Module, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer's keys and values and return them all."""
        if layer in self.layers:
            k_BTKD, v_BTKD = (torch.cat(pair, dim=1) for pair in zip(self.layers[layer], (k_BTKD, v_BTKD), strict=True))
        self.layers[layer] = (k_BTKD, v_BTKD)
        return self.layers[layer]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or config.hidden_size // heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTH: Tensor, cos: Tensor, sin: Tensor, visible: Visibility, cache: Cache | None) -> Tensor:
        # The number of heads is read off the projection: tensor parallelism leaves a rank only some of them.
        q_BTND = self.q_proj(x_BTH).unflatten(-1, (-1, self.head_dim))
        k_BTKD = self.k_proj(x_BTH).unflatten(-1, (-1, self.head_dim))
        v_BTKD = self.v_proj(x_BTH).unflatten(-1, (-1, self.head_dim))
        q_BTND = rotate(q_BTND, cos, sin) if self.q_norm is None else self.q_norm(q_BTND, cos, sin)
        k_BTKD = rotate(k_BTKD, cos, sin) if self.k_norm is None else self.k_norm(k_BTKD, cos, sin)
        if cache is not None:
            k_BTKD, v_BTKD = cache.extend(self, k_BTKD, v_BTKD)
        return self.o_proj(attend(q_BTND, k_BTKD, v_BTKD, visible).flatten(2))


def attend(q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, visible: Visibility) -> Tensor:
    """Scaled dot-product attention, scale D^-0.5. Returns [B, T, N, D]."""
    if visible.blocks is not None:
        return _attend_blocks(q_BTND, k_BSKD, v_BSKD, visible.blocks)
    return _sdpa(q_BTND, k_BSKD, v_BSKD, visible.mask)


@torch.compiler.disable
def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    out = torch.empty_like(q)
    for block in blocks:
        queries = q[block.rows, block.start : block.stop]
        keys, values = (t[block.rows, block.first : block.stop] for t in (k, v))
        out[block.rows, block.start : block.stop] = _sdpa(queries, keys, values, block.mask)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    short = k.shape[2] <= LONGEST_MASK or q.dtype == torch.bfloat16
    if q.device.type == "cpu" and q.dtype != torch.float16 and short and torch.is_grad_enabled():
        return _on_cpu(q, k, v, mask).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


@torch.compiler.disable
def _on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return CpuAttention.apply(q, k, v, mask)
