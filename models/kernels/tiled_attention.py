"""Attention to some of the earlier keys on CPU, tile by tile: work and memory grow with the number of visible keys.

Shapes: B sequences, T tokens, K key/value heads, G query heads of each, N = K * G, D head size, R = B * K; L queries of
a tile, S keys that one of them or more sees.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.decoder.pattern import Pattern


class TiledAttention(torch.autograd.Function):
    """As F.scaled_dot_product_attention for q [B, N, T, D], k and v [B, K, T, D], each a document, and a pattern.

    Keeps its inputs only: the backward pass recomputes the probabilities one tile of queries at a time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.pattern = pattern
        y = torch.empty_like(q)
        for start in range(0, q.shape[2], pattern.tile):
            rows, runs = _tile(pattern, start, q.shape[2])
            q_RLD, k_RSD, v_RSD = _heads(q[:, :, rows], k), _pick(k, runs), _pick(v, runs)
            mask = _mask(pattern, rows, runs, q_RLD)
            y_RLD = F.scaled_dot_product_attention(q_RLD[:, None], k_RSD[:, None], v_RSD[:, None], attn_mask=mask)
            y[:, :, rows] = y_RLD.view_as(q[:, :, rows])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        (q, k, v), pattern = ctx.saved_tensors, ctx.pattern
        dq = torch.empty_like(q)
        # A first block may be seen by all queries: too many terms to sum in bf16.
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        scale = q.shape[3] ** -0.5
        for start in range(0, q.shape[2], pattern.tile):
            rows, runs = _tile(pattern, start, q.shape[2])
            q_RLD, k_RSD, v_RSD = _heads(q[:, :, rows], k) * scale, _pick(k, runs), _pick(v, runs)
            dy_RLD = _heads(dy[:, :, rows], k)
            scores = torch.bmm(q_RLD, k_RSD.transpose(1, 2)).add_(_mask(pattern, rows, runs, q_RLD))
            p = torch.softmax(scores, -1, out=scores)
            dscores = torch._softmax_backward_data(torch.bmm(dy_RLD, v_RSD.transpose(1, 2)), p, -1, p.dtype)
            dq[:, :, rows] = torch.bmm(dscores, k_RSD).mul_(scale).view_as(dq[:, :, rows])
            _add(dk, runs, torch.bmm(dscores.transpose(1, 2), q_RLD))
            _add(dv, runs, torch.bmm(p.transpose(1, 2), dy_RLD))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _tile(pattern: Pattern, start: int, length: int) -> tuple[slice, list[slice]]:
    """The queries of the tile that begins at `start`, and the keys they see, adjacent tiles merged."""
    runs: list[slice] = []
    for tile in pattern.key_tiles(start // pattern.tile):
        first, last = tile * pattern.tile, min((tile + 1) * pattern.tile, length)
        if runs and runs[-1].stop == first:
            first = runs.pop().start
        runs.append(slice(first, last))
    return slice(start, runs[-1].stop), runs


def _heads(x_BNLD: Tensor, k: Tensor) -> Tensor:
    """All query heads of a key head as one matrix: [R, G * L, D]."""
    return x_BNLD.reshape(k.shape[0] * k.shape[1], -1, k.shape[3])


def _pick(x: Tensor, runs: list[slice]) -> Tensor:
    """[R, S, D] of [B, K, T, D]."""
    return torch.cat([x[:, :, run] for run in runs], dim=2).flatten(0, 1)


def _add(total: Tensor, runs: list[slice], x_RSD: Tensor) -> None:
    sizes = [run.stop - run.start for run in runs]
    for run, part in zip(runs, x_RSD.unflatten(0, total.shape[:2]).split(sizes, dim=2), strict=True):
        total[:, :, run] += part


def _mask(pattern: Pattern, rows: slice, runs: list[slice], q_RLD: Tensor) -> Tensor:
    """[G * L, S]: 0 where a query sees a key, else -inf."""
    queries = torch.arange(rows.start, rows.stop)
    keys = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    seen = pattern.sees(queries[:, None], keys)
    mask = torch.zeros(seen.shape, dtype=q_RLD.dtype).masked_fill_(~seen, float("-inf"))
    return mask.repeat(q_RLD.shape[1] // len(queries), 1)
