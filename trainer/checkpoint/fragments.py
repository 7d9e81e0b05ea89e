"""Fragments: flat stretches of slices ("boxes") of tensors, and which of them holds which element."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

Box = tuple[tuple[int, int], ...]
"""A slice of a tensor: [begin, end) in each dimension."""
MOST_CORNERS = 1 << 21
"""Most corners of a checkpoint's slices that `covers` compares, 2 ** dimensions for each slice. Processes that split
the elements of one slice count once. A thousand processes that split 256 experts of 60 layers make a million corners; a
dense model over 8 tensor-parallel processes makes a hundred thousand."""


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def lengths(box: Box) -> tuple[int, ...]:
    """Shape of a box."""
    return tuple(high - low for low, high in box)


def size(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(lengths(box))


def runs(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Cut the stretch [start, stop) of a flattened box into boxes, at most 2 * dimensions - 1.

    Yields:
        (position of its first element in the flattened box, box), in order; each is contiguous in the flattened box.
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
    """The box that two boxes have in common, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(low < high for low, high in common) else None


def difference(outer: Box, inner: Box) -> list[Box]:
    """The part of `outer` outside `inner`, which lies within it, as disjoint boxes."""
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
    """Index that selects `inner` from a tensor that holds `outer`."""
    return tuple(slice(low - base, high - base) for (base, _), (low, high) in zip(outer, inner, strict=True))


def fragment_key(state: str, name: str, start: int, box: Box, shape: Sequence[int]) -> str:
    """Key of the fragment that begins at element `start` of the flattened `box` of a tensor with shape `shape`."""
    part = "" if box == whole(shape) else f"[{','.join(f'{low}:{high}' for low, high in box)}]"
    return f"{state}/{name}@{start}{part}"


_KEY = re.compile(r"([^/]+)/(.+)@(\d{1,16})(?:\[(\d{1,16}:\d{1,16}(?:,\d{1,16}:\d{1,16})*)\])?", re.ASCII | re.DOTALL)


def parse_key(key: str) -> tuple[str, str, int, Box | None]:
    """(state, parameter, start, box or None for the whole tensor) of a fragment's key. Raises ValueError."""
    found = _KEY.fullmatch(key)
    if not found:
        raise ValueError(f"{key!a:.120} is not a valid fragment key")
    state, name, start, part = found.groups()
    if part is None:
        return state, name, int(start), None
    sides = [side.split(":") for side in part.split(",")]
    return state, name, int(start), tuple((int(low), int(high)) for low, high in sides)


class Fragment(NamedTuple):
    """Elements [start, start + numel) of a flattened box, stored in a file under a key."""

    box: Box
    start: int
    numel: int
    file: str
    key: str

    def runs(self) -> "Iterator[Run]":
        """The boxes that make it up."""
        for at, stretch in runs(self.box, self.start, self.start + self.numel):
            yield Run(stretch, self.file, self.key, at - self.start)


class Run(NamedTuple):
    """A box whose elements are contiguous in a fragment."""

    box: Box
    file: str
    key: str
    offset: int
    """Position of its first element in the fragment."""


def index(
    fragments: Iterable[tuple[str, int, str]], shapes: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[tuple[str, str], list[Fragment]]:
    """(state, parameter) -> its fragments, given (key, number of elements, file) of each fragment.

    Raises:
        ValueError: a fragment belongs to no tensor in `shapes`, is empty or not within its tensor; an element is in no
            fragment or in two; the tensors are cut into more slices than `MOST_CORNERS` allows.
    """
    outer = {(state, name): whole(shape) for state, names in shapes.items() for name, shape in names.items()}
    sizes = {tensor: size(box) for tensor, box in outer.items()}
    held: dict[tuple[str, str], list[Fragment]] = {tensor: [] for tensor in outer}
    for key, numel, file in fragments:
        state, name, start, part = parse_key(key)
        tensor = state, name
        if tensor not in held:
            raise ValueError(f"{file}: {key!a:.120} belongs to no tensor in the manifest")
        box = outer[tensor] if part is None else part
        if part and (len(part) != len(outer[tensor]) or intersection(part, outer[tensor]) != part):
            raise ValueError(f"{file}: {key!a:.120} lies outside its tensor of shape {list(shapes[state][name])}")
        room = (size(part) if part else sizes[tensor]) - start
        if not 0 < numel <= room:
            raise ValueError(f"{file}: {key!a:.120} has {numel} elements, but its slice has room for {max(room, 0)}")
        held[tensor].append(Fragment(box, start, numel, file, key))
    corners = 0
    for (state, name), found in held.items():
        dimensions = len(shapes[state][name])
        room = (MOST_CORNERS - corners) >> dimensions
        boxes = list(itertools.islice((box for one in _joined(found) for _, box in runs(*one)), room + 1))
        corners += len(boxes) << dimensions
        if len(boxes) > room:
            raise ValueError(f"its tensors are cut into slices of over {MOST_CORNERS:,} corners, 2 ** dimensions each")
        if not covers(boxes, shapes[state][name]):
            total, there = sizes[state, name], sum(fragment.numel for fragment in found)
            what = f"hold {there} of its {total} elements" if there < total else "hold an element twice"
            raise ValueError(f"the fragments of {state!a:.40} {name!a:.120} {what}")
    return held


def _joined(found: Iterable[Fragment]) -> list[tuple[Box, int, int]]:
    """The stretches (box, start, stop) of fragments; adjacent ones of the same box are merged."""
    stretches: list[tuple[Box, int, int]] = []
    for box, start, numel, *_ in sorted(found):
        stop = start + numel
        if stretches and stretches[-1][0] == box and stretches[-1][2] == start:
            start = stretches.pop()[1]
        stretches.append((box, start, stop))
    return stretches


def covers(boxes: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether boxes within a tensor hold each of its elements exactly once.

    They do if their indicator functions sum to the tensor's, and functions on a grid are equal if their differences
    along all dimensions are. The difference of a box's indicator is 1 or -1 at its corners and 0 elsewhere, so the
    corners of neighbours cancel and the tensor's remain: no pairs need comparing.
    """
    signs = [(-1) ** index.bit_count() for index in range(2 ** len(shape))]
    corners: dict[tuple[int, ...], int] = defaultdict(int)
    for box in boxes:
        for corner, sign in zip(itertools.product(*box), signs, strict=True):
            corners[corner] += sign
    for corner, sign in zip(itertools.product(*whole(shape)), signs, strict=True):
        corners[corner] -= sign
    return not any(corners.values())
