"""The Parquet files of a data set of graphs, all of them into memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import ConfigError, counted
from configs.reading.parse import shortened
from trainer.data.parquet_files import (
    check_bytes,
    check_groups,
    identity,
    readable,
    row_of,
)

EDGES, NODES, LABELS, EDGE_FEATURES, COUNT = "edge_index", "node_feat", "y", "edge_attr", "num_nodes"
NEEDS = f"graphs, as `datasets` writes them (columns {EDGES}, {NODES}, {LABELS}, and {EDGE_FEATURES} if edges have any)"


class Packed(NamedTuple):
    """Graphs one after another; those that are not whole are among them."""

    nodes: np.ndarray
    """[N, F] int64 categories, or float32."""
    edges: np.ndarray
    """[E, 2] int64: from and to which node of its graph."""
    edge_features: np.ndarray
    """[E, D], as nodes; D is 0 without any."""
    labels: np.ndarray
    """[G, K] float64; NaN: there is none."""
    node_ends: np.ndarray
    """[G] int64: where each graph's nodes end."""
    edge_ends: np.ndarray
    starts: list[tuple[int, str]]
    """Number of the first graph of each file, and the file's name."""
    self_loops: int
    """Edges left out, since they lead back to where they start."""

    @property
    def sizes(self) -> np.ndarray:
        """[G] nodes of each graph."""
        return np.diff(self.node_ends, prepend=0)

    @property
    def whole(self) -> np.ndarray:
        """Bool [G]: it has a node and a label, and no number is missing or infinite."""
        return (self.sizes > 0) & np.isfinite(self.labels).all(1) & ~self.broken

    @property
    def broken(self) -> np.ndarray:
        """Bool [G]: a number is missing or infinite."""
        found = np.zeros(len(self.labels), bool)
        for values, ends in ((self.nodes, self.node_ends), (self.edge_features, self.edge_ends)):
            bad = np.flatnonzero(~np.isfinite(values).all(1))
            found[np.searchsorted(ends, bad, side="right")] = True
        return found

    @property
    def left_out(self) -> str:
        """How many graphs are not whole, and where the first one is; empty: none."""
        if not (bad := ~self.whole).any():
            return ""
        empty, unlabelled = self.sizes == 0, ~np.isfinite(self.labels).all(1)
        reasons = {
            "without a node": empty,
            "without a label": unlabelled & ~empty,
            "with a number that is missing or infinite": self.broken & ~unlabelled,
        }
        first = int(bad.argmax())
        why = ", ".join(f"{int(rows.sum()):,} {reason}" for reason, rows in reasons.items() if rows.any())
        return f"{counted(int(bad.sum()), 'graph')} left out, {why}: the first is {row_of(first, self.starts)}"


class Footers(NamedTuple):
    """What the footers of some files say."""

    sha256: str
    """As `ImageFiles.sha256`."""
    starts: list[tuple[int, str]]
    """As `Packed.starts`."""
    graphs: int
    has_edge_features: bool


def read_footers(files: Sequence[Path]) -> Footers:
    """Check files without reading the graphs.

    Raises:
        ConfigError: a file cannot be read or lacks a column; too many graphs.
    """
    digest, starts, graphs, numbers, with_edges = hashlib.sha256(), [], 0, 0, set()
    for path in files:
        with readable(path):
            digest.update(identity(path))
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        for name in (EDGES, NODES, LABELS):
            if schema.names.count(name) != 1:
                there = shortened(", ".join(schema.names), 200)
                raise ConfigError(f"{path} should have exactly one column {name} (it has {there}): it needs {NEEDS}")
        with_edges.add(EDGE_FEATURES in schema.names)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        check_groups(path, [group.total_byte_size for group in groups])
        numbers += sum(group.column(n).num_values for group in groups for n in range(group.num_columns))
        check_bytes(path, 8 * numbers, "graphs")
        starts.append((graphs, path.name))
        graphs += metadata.num_rows
    if len(with_edges) > 1:
        raise ConfigError(
            f"{files[0].parent}: some files have a column {EDGE_FEATURES} and others do not: write them alike"
        )
    return Footers(digest.hexdigest(), starts, graphs, with_edges == {True})


def read_graphs(files: Sequence[Path]) -> Packed:
    """Read graphs.

    Raises:
        ConfigError: as `read_footers`; a column has another shape than `datasets` writes, or an edge a node that is not
            there.
    """
    footers, parts = read_footers(files), []
    for path in files:
        with readable(path), pq.ParquetFile(path) as file:
            own = [NODES, EDGES, LABELS, *([EDGE_FEATURES] if footers.has_edge_features else [])]
            own += [COUNT] if COUNT in file.schema_arrow.names else []
            table = file.read(own, use_threads=False)
        parts.append(_graphs(path, table))
    for name, found in ((NODES, "nodes"), (EDGE_FEATURES, "edge_features"), (LABELS, "labels")):
        arrays = [array for part in parts if len(array := getattr(part, found))]
        if len({(each.shape[1], each.dtype) for each in arrays}) > 1:
            raise ConfigError(f"{files[0].parent}: column {name} differs from file to file in its width or type")
    return Packed(
        _joined([part.nodes for part in parts]),
        _joined([part.edges for part in parts]),
        _joined([part.edge_features for part in parts]),
        _joined([part.labels for part in parts]),
        np.concatenate([part.sizes for part in parts]).cumsum(),
        np.concatenate([part.degrees for part in parts]).cumsum(),
        footers.starts,
        sum(part.self_loops for part in parts),
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One after another, all of one width; an array without a row does not know its width."""
    return np.concatenate([each for each in arrays if len(each)] or arrays[:1])


class Part(NamedTuple):
    """The graphs of one file, as in `Packed`."""

    nodes: np.ndarray
    edges: np.ndarray
    edge_features: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    """[G] nodes of each graph."""
    degrees: np.ndarray
    """[G] edges of each graph."""
    self_loops: int


def _graphs(path: Path, table: pa.Table) -> Part:
    sizes, nodes = _matrix(path, table, NODES)
    ends, lengths, values = _lists(path, table, EDGES)
    if not np.isin(ends, (0, 2)).all() or not pa.types.is_integer(values.type):
        raise ConfigError(f"{path}: {EDGES} is not two lists of whole numbers in every row: it needs {NEEDS}")
    degrees = np.zeros(len(table), np.int64)
    degrees[ends == 2] = lengths[::2]
    flat = _numbers(path, EDGES, values).astype(np.int64)
    to = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    if (lengths[::2] != lengths[1::2]).any():
        raise ConfigError(f"{path}: the two lists of {EDGES} differ in length in a row")
    edges = np.stack([flat[~to], flat[to]], axis=1)
    rows = np.repeat(np.arange(len(table)), degrees)
    if (wrong := ((edges < 0) | (edges >= sizes[rows, None])).any(1)).any():
        first = int(wrong.argmax())
        raise ConfigError(
            f"{path}: an edge of row {rows[first]} joins nodes {edges[first, 0]} and {edges[first, 1]}, but the graph "
            f"has {counted(int(sizes[rows[first]]), 'node')}, from 0 on: correct {EDGES}, or {NODES}"
        )
    if COUNT in table.column_names:
        _check_count(path, table, sizes)
    features = np.zeros((len(edges), 0), np.float32)
    if EDGE_FEATURES in table.column_names:
        own, features = _matrix(path, table, EDGE_FEATURES)
        if (own != degrees).any():
            row = int((own != degrees).argmax())
            raise ConfigError(f"{path}: row {row} has {degrees[row]} edges, but {EDGE_FEATURES} of {own[row]}")
    kept = edges[:, 0] != edges[:, 1]
    degrees = np.bincount(rows[kept], minlength=len(table))
    return Part(nodes, edges[kept], features[kept], _labels(path, table), sizes, degrees, int((~kept).sum()))


def _lists(path: Path, table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Of a column of lists of lists: how many lists each row has, how many values each list has, and the values."""
    column = table[name].combine_chunks()
    lengths = []
    for _ in range(2):
        if not _is_list(column.type):
            raise ConfigError(f"{path}: {name} is {shortened(str(table[name].type), 60)}: it needs {NEEDS}")
        lengths.append(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64))
        column = pc.list_flatten(column)
    return lengths[0], lengths[1], column


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _matrix(path: Path, table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(how many lists each row has, [lists, width] int64 or float32)."""
    rows, widths, values = _lists(path, table, name)
    width = int(widths[0]) if len(widths) else 0
    if (others := widths[widths != width]).size:
        raise ConfigError(
            f"{path}: {name} has a list of {counted(width, 'number')} and one of {others[0]}: make them equally long"
        )
    if len(widths) and not width:
        raise ConfigError(f"{path}: {name} has empty lists: it needs {NEEDS}")
    if len(rows) and not len(widths) and name == "node_feat":
        raise ConfigError(f"{path}: node_feat is empty in every row: a graph needs at least one node")
    kind = np.int64 if pa.types.is_integer(values.type) else np.float32
    return rows, _numbers(path, name, values).reshape(len(widths), width).astype(kind)


def _numbers(path: Path, name: str, values: pa.Array) -> np.ndarray:
    whole = pa.types.is_integer(values.type)
    if not (whole or pa.types.is_floating(values.type)):
        raise ConfigError(f"{path}: {name} has {shortened(str(values.type), 60)}, not numbers: it needs {NEEDS}")
    if whole and values.null_count:
        raise ConfigError(f"{path}: {name} has {counted(values.null_count, 'missing number')}: it needs {NEEDS}")
    return values.to_numpy(zero_copy_only=False)


def _check_count(path: Path, table: pa.Table, sizes: np.ndarray) -> None:
    """Raise ConfigError if num_nodes, a number or a list of one, contradicts node_feat."""
    told = [each[0] if isinstance(each, list) and each else each for each in table[COUNT].to_pylist()]
    for row, (count, size) in enumerate(zip(told, sizes.tolist(), strict=True)):
        if isinstance(count, int) and count != size:
            raise ConfigError(f"{path}: {COUNT} of row {row} is {count}, but {NODES} has {counted(size, 'node')}")


def _labels(path: Path, table: pa.Table) -> np.ndarray:
    """[G, K] float64: a number, a list, or a list of a list each."""
    rows = [list(_flat(each)) for each in table[LABELS].to_pylist()]
    width = max(map(len, rows), default=0)
    if any(len(each) not in (0, width) and each != [None] for each in rows):
        raise ConfigError(f"{path}: {LABELS} has {width} numbers in one row, and fewer in another")
    try:
        labels = [each if len(each) == width else [None] * width for each in rows]
        return np.array(labels, np.float64).reshape(-1, max(width, 1))
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: {LABELS} has a value that is not a number: it needs {NEEDS}") from None


def _flat(value: object):
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value
