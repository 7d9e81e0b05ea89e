"""Which documents, or parts of them, are held out from training."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.data.manifest import Split

MIN_TAIL = 128
"""Fewest bytes held out of a document that is split: some forty tokens."""
ENOUGH_DOCUMENTS = 1 << 16
"""Documents to choose one from."""


@dataclass(frozen=True)
class Splitting:
    """A rule for each document, independent of the others; small and picklable."""

    share: float
    """Share of the documents that is held out, by the hash of their text."""
    seed: int
    document: int | None = None
    """Number of one more that is held out."""
    tail: float = 0.0
    """Share of each document, from its end, that is held out."""

    def __call__(self, document: bytes) -> list[tuple[Split, bytes]]:
        """The document, or its two parts, each with its split."""
        if self.tail:
            at = _tail(document, self.tail)
            return [("train", document[:at]), ("held_out", document[at:])] if at else [("train", document)]
        number = number_of(document, self.seed)
        held_out = number < self.share * 2**64 or number == self.document
        return [("held_out" if held_out else "train", document)]

    def __str__(self) -> str:
        if self.tail:
            return f"Too few documents to hold one out: at least the last {self.tail:.0%} of each long one is held out"
        if self.document is not None:
            return "Few documents: the random split held none out, so one was set aside for evaluation"
        return "too little text to hold any of it out"


def number_of(document: bytes, seed: int) -> int:
    """A hash of (seed, text) below 2^64, so that equal documents are never in both splits."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8, key=str(seed).encode()).digest(), "big")


def split_of_few(documents: Iterable[bytes], share: float, seed: int) -> Splitting:
    """A rule for few documents, where splitting by hash holds out none or all of them. It holds out one of at most a
    quarter of the text, else the ends of long ones, else one of at most half, else nothing."""
    sizes: Counter[int] = Counter()
    longest = 0
    for document in documents:
        sizes[number_of(document, seed)] += len(document)
        longest = max(longest, len(document))
        if len(sizes) == ENOUGH_DOCUMENTS:
            break
    total = sizes.total()
    least = max(MIN_TAIL, share * total / 16)
    fair = {part: [number for number, size in sizes.items() if least <= size <= part * total] for part in (0.25, 0.5)}
    if longest >= 4 * MIN_TAIL and not fair[0.25]:
        return Splitting(0.0, seed, tail=share)
    return Splitting(0.0, seed, document=min(fair[0.25] or fair[0.5], default=None))


def _tail(document: bytes, share: float) -> int:
    """Where the held-out end begins: at a line, else at a word, else at a character; 0: the document is too short."""
    if len(document) < 4 * MIN_TAIL:
        return 0
    least = len(document) // 2
    at = min(len(document) - MIN_TAIL, max(least, int(len(document) * (1 - share))))
    for between in (b"\n", b" "):
        if (found := document.rfind(between, least, at) + 1) > 0:
            return found
    while document[at] & 0xC0 == 0x80:
        at -= 1
    return at
