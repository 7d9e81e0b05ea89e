"""Read the headers of a column's Parquet pages: the unpacked size of each, which pyarrow does not expose.

https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift (PageHeader), in Thrift's compact
protocol.
"""

from typing import Any, NamedTuple

HEADER_BYTES = 1 << 14
"""Largest page header, with room for statistics."""


class Page(NamedTuple):
    unpacked: int
    """Bytes."""
    packed: int


def pages(file: Any, start: int, size: int) -> list[Page]:
    """The pages of a column chunk.

    Args:
        file: a pyarrow.NativeFile.
        start: offset of the first page, a dictionary's if there is one.
        size: bytes of the chunk.

    Raises:
        ValueError: these bytes are not valid pages.
    """
    found, end = [], start + size
    while start < end:
        header = _Header(file.read_at(min(HEADER_BYTES, end - start), start))
        values = header.struct()
        page = Page(values.get(2, -1), values.get(3, -1))
        if page.unpacked < 0 or page.packed < 0:
            raise ValueError("a page header has no size")
        found.append(page)
        start += header.at + page.packed
    return found


class _Header:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The integer fields of a struct, by field number; everything else is skipped."""
        values, number = {}, 0
        while byte := self._byte():
            step, kind = byte >> 4, byte & 15
            number = number + step if step else self._integer()
            if kind in (4, 5, 6):
                values[number] = self._integer()
            elif kind == 3:
                self._byte()
            elif kind == 7:
                self.at += 8
            elif kind == 8:
                length = self._varint()
                self.at += length
            elif kind == 12 and depth < 4:
                self.struct(depth + 1)
            elif kind not in (1, 2):  # a boolean's value is in its type; a page header has no lists or maps
                raise ValueError(f"field type {kind} is not allowed in a page header")
        return values

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("a page header is truncated")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("an integer in a page header is too long")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
