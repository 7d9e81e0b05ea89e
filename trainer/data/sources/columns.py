"""Find a column of text in a Parquet file, also inside structs and lists, and extract its texts."""

import re
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from .damage import Damaged
from .formats import missing


class Column(NamedTuple):
    name: str
    """Name of the whole column."""
    within: list[str]
    """Names of the struct fields that lead to the text; there may be lists between them."""
    path: str
    """Parquet path of the part to read."""

    def holds(self, leaf: str) -> bool:
        """Whether it includes a leaf of the file's schema."""
        return leaf == self.path or leaf.startswith(f"{self.path}.")


def find_column(schema: pa.Schema, leaves: list[str], key: str) -> Column:
    """The column that a key names, or a field inside one: `meta.text`.

    Args:
        leaves: paths of the leaf columns that the file stores.

    Raises:
        Damaged: there is none, there are two, or it is not text.
    """
    for end in (len(key), *(dot.start() for dot in re.finditer(r"\.", key))):
        name, rest = key[:end], key[end + 1 :]
        if (count := schema.names.count(name)) > 1:
            raise Damaged("ambiguous column", f"{count} columns are named {name!r}")
        if count and (found := _resolve(schema.field(name).type, rest)):
            within, kind = found
            _require_text(kind, key)
            path = ".".join([name, *within])
            column = Column(name, within, path)
            return column if any(map(column.holds, leaves)) else column._replace(path=name)  # through a list
    raise Damaged("missing column", missing(key, schema.names))


def texts(array: pa.Array, within: list[str], in_list: bool = False) -> list[bytes | None]:
    """The text of every row of a column, None where there is none; the texts of a list are joined, one per line.

    Args:
        in_list: the array holds the items of lists; an empty list among them counts as null.
    """
    array = _plain(array)
    if _is_list(array.type):
        items = iter(texts(pc.list_flatten(array), within, in_list=True))
        lengths = pc.list_value_length(array).to_pylist()
        rows: list[bytes | None] = []
        for valid, length in zip(array.is_valid().to_pylist(), lengths, strict=True):
            found = [next(items) for _ in range(length)] if valid else None
            some = [item for item in found or () if item is not None]
            rows.append(None if found is None or (in_list and not some) else b"\n".join(some))
        return rows
    if within:
        return texts(pc.struct_field(array, [array.type.get_field_index(within[0])]), within[1:], in_list)
    # As bytes: pyarrow would raise at the first value that is not UTF-8 and lose the rest.
    values = array.cast(pa.large_binary()).to_pylist()
    if pa.types.is_fixed_size_binary(array.type):  # shorter texts are padded
        return [value and value.rstrip(b"\0") for value in values]
    return values


def _resolve(kind: pa.DataType, key: str) -> tuple[list[str], pa.DataType] | None:
    """The fields that a key names inside a type, and the type of the last one."""
    if not key:
        return [], kind
    kind = _stored(kind)
    if _is_list(kind):
        return _resolve(kind.value_type, key)
    if not pa.types.is_struct(kind):
        return None
    for end in (len(key), *(dot.start() for dot in re.finditer(r"\.", key))):
        index = kind.get_field_index(key[:end])
        if index >= 0 and (found := _resolve(kind.field(index).type, key[end + 1 :])):
            return [key[:end], *found[0]], found[1]
    return None


def _require_text(kind: pa.DataType, key: str) -> None:
    inner, uuid = _stored(kind), _is_uuid(kind)
    while _is_list(inner):
        uuid = uuid or _is_uuid(inner.value_type)
        inner = _stored(inner.value_type)
    if pa.types.is_struct(inner):
        fields = ", ".join(f"{key}.{inner.field(i).name}" for i in range(min(inner.num_fields, 5)))
        raise Damaged("not text", f"column {key!r} is a struct: choose one of {fields}"[:200])
    text = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    if uuid or (inner not in text and not pa.types.is_fixed_size_binary(inner)):
        raise Damaged("not text", f"column {key!r} is {kind}"[:200])


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


def _stored(kind: pa.DataType) -> pa.DataType:
    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return kind


def _plain(array: pa.Array) -> pa.Array:
    while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    return array


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    )  # fmt: skip
