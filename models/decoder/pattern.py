"""Which tokens of its document a query sees: all, all earlier ones, a sliding window, or local, first and strided
blocks of them.

No torch: `sees` takes tensors as well as numbers, so that one rule makes dense masks, the cache's and FlexAttention's.
"""

from dataclasses import dataclass
from typing import Any

from configs import BlockSparse, ModelConfig

TILE = 128
"""Queries, and keys, per tile of tiled attention, if blocks are no larger."""


@dataclass(frozen=True)
class Pattern:
    """Causal attention by position in the document (from 0), so that documents in one row see what each would see
    alone.

    Attributes:
        window: keys that a query sees, itself included; None: all.
        sparse: blocks that a query sees; None: all. Never with a window.
        causal: False: it sees later tokens too, and there is neither a window nor blocks.
    """

    window: int | None = None
    sparse: BlockSparse | None = None
    causal: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> "Pattern":
        return cls(config.sliding_window, config.block_sparse)

    def sees(self, query: Any, key: Any) -> Any:
        """Whether the query at one position sees the key at another; positions, numbers or tensors, broadcast."""
        seen = (query >= key) | (not self.causal)
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.sparse is not None:
            key_block = key // self.sparse.block
            distance = query // self.sparse.block - key_block
            near = (distance < self.sparse.local_blocks) | (key_block < self.sparse.global_blocks)
            if self.sparse.stride:
                near = near | (distance % self.sparse.stride == 0)
            seen = seen & near
        return seen

    def is_full(self, length: int) -> bool:
        """Whether every query of a document of `length` tokens sees all earlier tokens."""
        if self.sparse is None:
            return self.window is None or self.window >= length
        blocks = -(-length // self.sparse.block)
        return self.sparse.stride == 1 or blocks <= self.sparse.local_blocks + self.sparse.global_blocks

    @property
    def tile(self) -> int:
        """Tile size: a whole number of blocks."""
        return TILE if self.sparse is None else self.sparse.block * max(1, TILE // self.sparse.block)

    def key_tiles(self, tile: int) -> list[int]:
        """The tiles that contain a key which a query of this tile sees, in order."""
        if self.sparse is None:
            first = 0 if self.window is None else max(0, tile * TILE - self.window + 1) // TILE
            return list(range(first, tile + 1))
        size = self.tile // self.sparse.block
        blocks = set().union(*map(self._key_blocks, range(tile * size, (tile + 1) * size)))
        return sorted({block // size for block in blocks})

    def keys_per_query(self, length: int) -> float:
        """Number of keys that a query sees, averaged over the positions of one document of `length` tokens."""
        if self.sparse is None:
            window = min(self.window or length, length)
            return (window * (window + 1) / 2 + (length - window) * window) / length
        size = self.sparse.block
        whole, rest = divmod(length, size)
        pairs = size * size * self._blocks_before(whole) + whole * (size * (size + 1) // 2)
        of_last = self._blocks_before(whole + 1) - self._blocks_before(whole)
        return (pairs + rest * of_last * size + rest * (rest + 1) // 2) / length

    def _blocks_before(self, blocks: int) -> int:
        """Earlier blocks that the queries of the first `blocks` blocks see, summed over these blocks."""
        assert self.sparse is not None
        near, first, stride = self.sparse.local_blocks, self.sparse.global_blocks, self.sparse.stride
        dense = min(blocks, near + first)  # blocks that see every earlier block
        found = dense * (dense - 1) // 2 + (blocks - dense) * (near + first - 1)
        if stride and blocks > dense:
            # A block whose distance from the first ones is m, near <= m, sees those at a distance of a multiple of the
            # stride in near to m: m // stride of them less the multiples below near.
            last = blocks - 1 - first
            found += _floors(last, stride) - _floors(near - 1, stride)
            found -= (last - near + 1) * ((near - 1) // stride)
        return found

    def _key_blocks(self, block: int) -> set[int]:
        """Blocks that the queries of a block see, its own among them."""
        assert self.sparse is not None
        near = range(max(0, block - self.sparse.local_blocks + 1), block + 1)
        first = range(min(self.sparse.global_blocks, block + 1))
        far = range(block % self.sparse.stride, block, self.sparse.stride) if self.sparse.stride else ()
        return {*near, *first, *far}


def _floors(last: int, stride: int) -> int:
    """The sum of m // stride for m from 0 to `last`."""
    whole, rest = divmod(last + 1, stride)
    return stride * (whole * (whole - 1) // 2) + whole * rest
