"""Grouped-query attention with QK-norm and RoPE, and which keys each query may see: the one of all Transformers.

Shapes: B sequences, T queries, S keys, N query heads, K key/value heads, D head size, H hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from configs import ModelConfig
from models.kernels import flex
from models.kernels.cpu_attention import CpuAttention
from models.kernels.tiled_attention import TiledAttention
from models.kernels.uncompiled import uncompiled
from models.norm import HeadNorm
from models.rope import rotate

from .pattern import Pattern

LONGEST_MASK = 512
"""On CPU a mask of [B, 1, T, T] is faster up to this T; above it a loop over documents is."""
LONGEST_KERNEL = 512
"""On CPU our own kernel is faster up to this many keys; at 2,048 torch's is as fast and keeps less memory."""


class Long:
    """For sequences too long for a mask: lengths of the documents, row after row (None: each row is one), and the
    pattern.

    A plain object, because torch.compile would recompile for other values in a tuple or a dataclass.
    """

    def __init__(self, lengths: list[int] | None, pattern: Pattern):
        self.lengths, self.pattern = lengths, pattern


@dataclass(frozen=True)
class Visibility:
    """The keys that a query sees, computed once per forward pass, shared by layers. Nothing set: all earlier ones, or
    all, if not `causal`."""

    mask: Tensor | None = None
    long: Long | None = None
    blocks: BlockMask | None = None
    causal: bool = True


def visibility(length: int, document_ids: Tensor | None, pattern: Pattern, like: Tensor) -> Visibility:
    """The keys left visible by the pattern and the document boundaries.

    Args:
        length: T.
        document_ids: [B, T], or None: one document.
        like: a tensor with the dtype and device of the hidden states.
    """
    if document_ids is None and pattern.is_full(length):
        return Visibility(causal=pattern.causal)
    if length > LONGEST_MASK and like.device.type == "cpu":
        return Visibility(long=Long(None if document_ids is None else _lengths(document_ids), pattern))
    place_BT = places(document_ids, length, like.device)
    if like.device.type == "cuda":
        return Visibility(blocks=flex.block_mask(place_BT, document_ids, pattern))
    seen = pattern.sees(place_BT[:, None, :, None], place_BT[:, None, None])
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None])
    return Visibility(mask=additive(seen, like.dtype), causal=pattern.causal)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else -inf: faster for SDPA on CPU than a bool mask."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def places(document_ids: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[B, T]: position of each token in its document; [1, T] if rows are documents."""
    columns = torch.arange(length, device=device)
    if document_ids is None:
        return columns[None]
    return columns - torch.where(_begins(document_ids), columns, 0).cummax(dim=1).values


def _lengths(document_ids: Tensor) -> list[int]:
    starts = _begins(document_ids).flatten().nonzero()[:, 0]
    return starts.diff(append=starts.new_tensor([document_ids.numel()])).tolist()


def _begins(document_ids: Tensor) -> Tensor:
    """[B, T] bool: the first token of each document."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids.diff(dim=1) != 0
    return begins


class Cache:
    """Cached keys and values of every layer, for sequences left-padded to one length.

    Args:
        padding: [B] int64, columns before each sequence's first token.
    """

    def __init__(self, padding: Tensor):
        self.padding, self.length = padding, 0
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def visibility(self, queries: int, pattern: Pattern, like: Tensor) -> Visibility:
        """Which columns, including these queries' own, each of the next queries sees. Counts them as present."""
        columns = torch.arange(self.length + queries, device=like.device)
        place = columns - self.padding[:, None, None, None]
        # A padding column sees itself: a softmax over nothing would be NaN.
        seen = pattern.sees(place[..., self.length :].transpose(2, 3), place) & (place >= 0)
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
    """With `out_bias`, the last projection has a bias, which the decoder's has not."""

    def __init__(self, config: ModelConfig, out_bias: bool = False):
        super().__init__()
        heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or config.hidden_size // heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=out_bias)
        self.q_norm = HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.attend = attend
        """Replaced from outside if the sequences are split."""

    def forward(
        self,
        x_BTH: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        visible: Visibility,
        cache: Cache | None = None,
    ) -> Tensor:
        """`cos`, `sin`: see `rope_tables`; None: queries and keys are not rotated."""
        # The number of heads is taken from the projection: tensor parallelism leaves a rank only some of them.
        q_BTND = self.q_proj(x_BTH).unflatten(-1, (-1, self.head_dim))
        k_BTKD = self.k_proj(x_BTH).unflatten(-1, (-1, self.head_dim))
        v_BTKD = self.v_proj(x_BTH).unflatten(-1, (-1, self.head_dim))
        if cos is not None and sin is not None:
            q_BTND = rotate(q_BTND, cos, sin) if self.q_norm is None else self.q_norm(q_BTND, cos, sin)
            k_BTKD = rotate(k_BTKD, cos, sin) if self.k_norm is None else self.k_norm(k_BTKD, cos, sin)
        if cache is not None:  # sequences that are being generated are whole
            return self.o_proj(attend(q_BTND, *cache.extend(self, k_BTKD, v_BTKD), visible).flatten(2))
        return self.o_proj(self.attend(q_BTND, k_BTKD, v_BTKD, visible).flatten(2))


def attend(q_BTND: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, visible: Visibility) -> Tensor:
    """Scaled dot-product attention, scale D^-0.5. Returns [B, T, N, D]."""
    if visible.blocks is not None:
        return flex.attend(q_BTND, k_BSKD, v_BSKD, visible.blocks)
    if visible.long is not None:
        return _attend_long(q_BTND, k_BSKD, v_BSKD, visible.long)
    return _sdpa(q_BTND, k_BSKD, v_BSKD, visible.mask, visible.causal)


@uncompiled
def _attend_long(q_BTND: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, long: Long) -> Tensor:
    if long.lengths is None:
        return _attend_document(q_BTND, k_BTKD, v_BTKD, long.pattern)
    # split, not slices: each slice's backward pass would fill a gradient of the whole batch.
    documents = zip(*(t.flatten(0, 1).split(long.lengths) for t in (q_BTND, k_BTKD, v_BTKD)), strict=True)
    done = [_attend_document(q[None], k[None], v[None], long.pattern)[0] for q, k, v in documents]
    return torch.cat(done).view_as(q_BTND)


def _attend_document(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    if pattern.is_full(q.shape[1]):
        return _sdpa(q, k, v, None, pattern.causal)
    y = TiledAttention.apply(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), pattern)
    return y.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ours = causal and q.device.type == "cpu" and k.shape[2] <= LONGEST_KERNEL and q.dtype != torch.float16
    if ours and torch.is_grad_enabled():
        return _on_cpu(q, k, v, mask).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


@uncompiled
def _on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return CpuAttention.apply(q, k, v, mask)
