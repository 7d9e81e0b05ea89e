"""Fragments: flat stretches of slices ("boxes") of tensors, and who holds which element, whichever way it was cut."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]
"""A slice of a tensor: [begin, end) in each dimension."""


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def lengths(box: Box) -> tuple[int, ...]:
    """Shape of what is in a box."""
    return tuple(high - low for low, high in box)


def size(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(lengths(box))


def runs(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Cut the stretch [start, stop) of a flattened box into boxes, at most 2 * dimensions - 1.

    Yields:
        (place of its first element in the flattened box, box), in order, each one stretch of the flattened box.
    """
    if start >= stop:
        return
    if not box:
        yield start, ()
        return
    (low, _), rest = box[0], box[1:]
    row = size(rest)

    def inside(index: int, begin: int, end: int) -> Iterator[tuple[int, Box]]:
        for at, part in runs(rest, begin - index * row, end - index * row):
            yield index * row + at, ((low + index, low + index + 1), *part)

    first, last = -(-start // row), stop // row  # rows [first, last) are whole
    if first > last:
        yield from inside(last, start, stop)
        return
    yield from inside(first - 1, start, first * row)
    if first < last:
        yield first * row, ((low + first, low + last), *rest)
    yield from inside(last, last * row, stop)


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes share, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(low < high for low, high in common) else None


def difference(outer: Box, inner: Box) -> list[Box]:
    """What of `outer` is not in `inner`, which lies within it, as boxes that share nothing."""
    left = []
    for i, ((low, high), (begin, end)) in enumerate(zip(outer, inner, strict=True)):
        sides = [(low, begin), (end, high)]
        left += [(*inner[:i], (a, b), *outer[i + 1 :]) for a, b in sides if a < b]
    return left


def share_out(wanted: Box, held: Sequence[Box]) -> tuple[list[tuple[int, Box]], list[Box]]:
    """Take each element of `wanted` from one of the boxes that hold it.

    Returns:
        ([(index in `held`, part of `wanted` taken from it)], the parts that no box holds).
    """
    taken: list[tuple[int, Box]] = []
    missing = [wanted]
    for index, box in enumerate(held):
        if not missing:
            break
        left = []
        for part in missing:
            common = intersection(part, box)
            if common is None:
                left.append(part)
            else:
                taken.append((index, common))
                left += difference(part, common)
        missing = left
    return taken, missing


def within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """Index of `inner` in a tensor that holds `outer`."""
    return tuple(slice(low - base, high - base) for (base, _), (low, high) in zip(outer, inner, strict=True))


def fragment_key(state: str, name: str, start: int, box: Box, shape: Sequence[int]) -> str:
    """Key of the fragment that begins at element `start` of the flattened `box` of a tensor of `shape`."""
    part = "" if box == whole(shape) else f"[{','.join(f'{low}:{high}' for low, high in box)}]"
    return f"{state}/{name}@{start}{part}"


def parse_key(key: str) -> tuple[str, str, int, Box | None]:
    """(state, parameter, start, box or None for the whole tensor) of a fragment's key."""
    state, _, rest = key.partition("/")
    name, _, rest = rest.rpartition("@")
    start, _, part = rest.rstrip("]").partition("[")
    sides = [side.split(":") for side in part.split(",")] if part else []
    return state, name, int(start), tuple((int(low), int(high)) for low, high in sides) or None


@dataclass(frozen=True)
class Run:
    """A box whose elements lie one after the other in a fragment."""

    box: Box
    file: str
    key: str
    offset: int
    """First of its elements in the fragment."""


def index(
    fragments: Iterable[tuple[str, int, str]], shapes: Mapping[str, Mapping[str, list[int]]]
) -> dict[tuple[str, str], list[Run]]:
    """(state, parameter) -> what is held of it, given (key, elements, file) of each fragment."""
    held: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for key, numel, file in fragments:
        state, name, start, box = parse_key(key)
        box = box or whole(shapes[state][name])
        held[state, name] += [Run(part, file, key, at - start) for at, part in runs(box, start, start + numel)]
    return held
