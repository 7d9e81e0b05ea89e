"""The order of training data: pure functions of (seed, index) in constant memory.

Row groups are permuted every epoch; BLOCK consecutive ones of that order form a block, whose windows are shuffled
together. So a process that reads sequentially needs only the row groups of one block at a time (8M tokens at 65,536 per
group) and decodes each once, while a batch still mixes BLOCK places of the data, and any index can be located directly.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

BLOCK = 128
KEPT_ORDERS = 2
"""Orders that a reader keeps: micro-batches that are read ahead are of this epoch, or block, and of the next."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd


def mix(*values: int | str) -> int:
    """A 64-bit key from any values, the same on every machine and version."""
    text = "/".join(map(str, values)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Permutation:
    """A pseudo-random permutation of range(size) with its inverse, in constant memory.

    A four-round Feistel network over the next even power of two, walked along its cycle back into the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, size: int, key: int):
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [mix(key, round_) for round_ in range(4)]

    def __call__(self, index: int) -> int:
        return self._walk(index, self._keys, forward=True)

    def inverse(self, index: int) -> int:
        return self._walk(index, self._keys[::-1], forward=False)

    def _walk(self, index: int, keys: list[int], forward: bool) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in range({self.size})")
        half = self._half
        low = (1 << half) - 1
        while True:
            left, right = index >> half, index & low
            for key in keys:
                if forward:
                    left, right = right, left ^ (_scramble(right ^ key) & low)
                else:
                    left, right = right ^ (_scramble(left ^ key) & low), left
            index = left << half | right
            if index < self.size:
                return index


def _scramble(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def shuffled(size: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(size), int64 [size]: the ranks of SplitMix64's outputs. Unlike numpy's own
    generators, it is the same in every version."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


class Place(NamedTuple):
    epoch: int
    group: int
    window: int


class EpochOrder:
    """Epoch after epoch of one source, each in its own order.

    Args:
        groups: row groups; all have `windows` windows, except the very last, which has `last_windows` (1 to windows).
        key: seed of the order.
    """

    def __init__(self, groups: int, windows: int, last_windows: int, key: int):
        assert groups > 0
        assert 0 < last_windows <= windows
        self.groups, self.windows, self.key = groups, windows, key
        self.lacking = windows - last_windows
        self.size = groups * windows - self.lacking
        self._block = lru_cache(KEPT_ORDERS)(self._block_of)

    def __call__(self, index: int) -> Place:
        """The window at position `index` (from 0, over all epochs)."""
        epoch, position = divmod(index, self.size)
        permutation = Permutation(self.groups, mix(self.key, epoch))
        # Only the last group is short, so a block's start follows from where the permutation has put that group.
        short = permutation.inverse(self.groups - 1) // BLOCK
        whole = BLOCK * self.windows
        block = position // whole
        if block >= short:
            block = short if position < (short + 1) * whole - self.lacking else (position + self.lacking) // whole
        start = block * whole - (self.lacking if block > short else 0)
        groups, windows = self._block(epoch, block)
        group, window = divmod(int(windows[position - start]), self.windows)
        return Place(epoch, int(groups[group]), window)

    def _block_of(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups of a block, and the order of their windows."""
        permutation = Permutation(self.groups, mix(self.key, epoch))
        members = range(block * BLOCK, min((block + 1) * BLOCK, self.groups))
        groups = [permutation(member) for member in members]
        size = len(groups) * self.windows
        if self.groups - 1 in groups:  # the short one last, so that the windows it lacks have the highest numbers
            groups.remove(self.groups - 1)
            groups.append(self.groups - 1)
            size -= self.lacking
        return np.array(groups), shuffled(size, mix(self.key, epoch, block))


class Interleave:
    """The source that each sequence of a mixture comes from, in proportions that hold over every stretch of the run.

    Sequence i comes from the source whose share of [0, 1) contains the fractional part of (shift + i * golden ratio), a
    low-discrepancy sequence. How many came from a source before is counted exactly by a floor sum, without any state.
    """

    def __init__(self, weights: Sequence[float], key: int):
        total = sum(weights)
        shares = np.cumsum([weight / total for weight in weights])
        self._bounds = [0, *(min(int(share * 2**64), 1 << 64) for share in shares[:-1]), 1 << 64]
        self._shift = key & _MASK

    def __call__(self, index: int) -> tuple[int, int]:
        """(source, number of sequences before `index` that came from that source)."""
        if len(self._bounds) == 2:
            return 0, index
        point = (_GOLDEN * index + self._shift) & _MASK
        source = next(i for i, bound in enumerate(self._bounds[1:]) if point < bound)
        return source, self._below(index, self._bounds[source + 1]) - self._below(index, self._bounds[source])

    def _below(self, count: int, bound: int) -> int:
        """How many of the first `count` points are below `bound`."""
        if bound == 0:
            return 0
        modulus = 1 << 64
        wraps = _floor_sum(count, modulus, _GOLDEN, self._shift)
        return wraps - (_floor_sum(count, modulus, _GOLDEN, self._shift - bound + modulus) - count)


def _floor_sum(count: int, modulus: int, step: int, start: int) -> int:
    """Sum of (step * i + start) // modulus over range(count), in O(log modulus) (as in AtCoder Library)."""
    total = 0
    while count:
        total += (count - 1) * count // 2 * (step // modulus) + count * (start // modulus)
        step, start = step % modulus, start % modulus
        end = step * count + start
        if end < modulus:
            break
        count, start = divmod(end, modulus)
        modulus, step = step, modulus
    return total
