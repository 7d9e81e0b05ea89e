"""Turns molecules in SDF, and graphs and nodes listed by their edges, into Parquet that training reads."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from configs import ConfigError, counted
from configs.reading.parse import clip, shortened

from .labelled import MOST_BYTES, How, Made, checked_split, read_tables, schema_of, split_rows, write_splits

ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts "
    "Og"
)
NUMBER = {symbol: number for number, symbol in enumerate(ELEMENTS.split(), 1)}
GRAPHS_IN_GROUP = 1000


class Graph(NamedTuple):
    nodes: list[list[Any]]
    """Numbers of each node, all whole or not."""
    edges: list[tuple[int, int]]
    edge_features: list[list[Any]] | None
    label: str
    """As it is written; empty: none."""


class Unreadable(ValueError):
    """What is wrong with a graph that is left out."""


def prepare_graphs(
    inputs: Sequence[str], out: Path, how: How, share: float, seed: int, label: str | None = None, strict: bool = False
) -> Made:
    """Molecules of SDF files: a node is an atom by its atomic number, an edge, in both directions, a bond by its type.
    Or the graphs of a folder in the format of TUDataset (arXiv:2007.08663): NAME_A.txt, NAME_graph_indicator.txt,
    NAME_graph_labels.txt and, if there are any, NAME_node_labels.txt or NAME_node_attributes.txt and
    NAME_edge_labels.txt or NAME_edge_attributes.txt.

    Args:
        label: of SDF, the data item that is predicted. One of texts becomes classes, in the order of the texts.
        strict: fail on a graph that cannot be used instead of leaving it out.

    Raises:
        ConfigError: no such files, none of their graphs can be used, or the split is empty or has no meaning.
    """
    if how == "grouped":
        raise ConfigError("--split grouped takes the groups from a column, which graphs have not: choose another")
    found = list(_of_folder(Path(inputs[0])) if len(inputs) == 1 and Path(inputs[0]).is_dir() else _sdf(inputs, label))
    graphs: list[Graph] = []
    wrong: list[str] = []
    for where, graph in found:
        reason = str(graph) if isinstance(graph, Unreadable) else _unusable(graph)
        if reason:
            wrong.append(f"{where}: {reason}")
        elif isinstance(graph, Graph):
            graphs.append(graph)
    if not graphs:
        raise ConfigError(f"no graph can be used: {wrong[0] if wrong else 'the files have none'}")
    left_out = f"{counted(len(wrong), 'graph')} left out: the first is {wrong[0]}" if wrong else ""
    if wrong and strict:
        raise ConfigError(f"{left_out}: correct them, or leave out --strict")
    labels, classes = _numbered([graph.label for graph in graphs])
    if how == "stratified" and labels.dtype != np.int64:
        raise ConfigError("--split stratified needs one label of classes, whole numbers or texts: choose random")
    of = np.unique(labels, return_inverse=True)[1] if how == "stratified" else np.zeros(len(labels), np.int64)
    held_out = checked_split(split_rows(how, share, seed, of), share)
    schema = _schema(graphs[0], labels)

    def tables(rows: np.ndarray) -> Iterator[pa.Table]:
        for start in range(0, len(rows), GRAPHS_IN_GROUP):
            part = rows[start : start + GRAPHS_IN_GROUP].tolist()
            yield _table([graphs[row] for row in part], [[labels[row].item()] for row in part], schema)

    return Made("graphs", write_splits(out, schema, tables, held_out, seed), classes, left_out)


def prepare_nodes(inputs: Sequence[str], out: Path, label: str = "label", directed: bool = False) -> Made:
    """One graph, whose nodes are classified, of two CSV or TSV files: of edges, by the ids in the first two columns,
    and of nodes, with the columns `id`, the label (empty: none) and numbers.

    Args:
        directed: keep the edges as they are; otherwise they lead both ways.

    Raises:
        ConfigError: other files, or a column or a node is missing.
    """
    tables = [read_tables([each]) for each in inputs]
    nodes = [table for table in tables if "id" in table.column_names]
    edges = [table for table in tables if "id" not in table.column_names]
    if len(nodes) != 1 or len(edges) != 1 or edges[0].num_columns < 2:
        raise ConfigError("--kind nodes takes two CSV or TSV files: of nodes, with a column id, and of edges, without")
    if label not in nodes[0].column_names:
        there = shortened(", ".join(nodes[0].column_names), 200)
        raise ConfigError(f"--label {label}: the nodes have no such column (they have {there})")
    places = {each: place for place, each in enumerate(nodes[0]["id"].to_pylist())}
    if len(places) < nodes[0].num_rows:
        raise ConfigError("two nodes have the same id: give each its own")
    ends = [edges[0].column(number).to_pylist() for number in (0, 1)]
    if any(None in end for end in ends):
        raise ConfigError("an edge lacks the id of a node: correct it, or leave it out")
    if lost := [each for end in ends for each in end if each not in places][:1]:
        raise ConfigError(
            f"an edge has a node with the id {lost[0]}, which the nodes have not: add it, or leave it out"
        )
    pairs = [(places[a], places[b]) for a, b in zip(*ends, strict=True)]
    if not directed:
        pairs = list(dict.fromkeys([*pairs, *((b, a) for a, b in pairs)]))
    features = nodes[0].drop_columns(["id", label])
    for field in features.schema:
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            raise ConfigError(f"column {field.name} of the nodes is {field.type}, not numbers: leave it out")
        if features[field.name].null_count:
            raise ConfigError(f"column {field.name} of the nodes lacks a number: correct it")
    rows = list(map(list, zip(*(column.to_pylist() for column in features.columns), strict=True)))
    texts = ["" if each is None else str(each) for each in nodes[0][label].to_pylist()]
    if not any(texts):
        raise ConfigError(f"--label {label}: no node has one")
    numbers, classes = _numbered([text for text in texts if text])
    known = iter(numbers.tolist())
    labels = [next(known) if text else None for text in texts]
    graph = Graph(rows or [[0]] * len(labels), pairs, None, "")
    schema = _schema(graph, numbers)
    write_splits(out, schema, lambda _: iter([_table([graph], [labels], schema)]), np.zeros(1, bool), 0)
    without = len(labels) - len(numbers)
    left_out = f"{counted(without, 'node')} without a label" if without else ""
    return Made("nodes", {"train": len(numbers), "held_out": 0}, classes, left_out)


def _unusable(graph: Graph) -> str:
    if not graph.nodes:
        return "it has no node"
    return "" if graph.label else "it has no label"


def _numbered(labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(int64 classes or numbers, or float64 numbers; the names of classes that are texts, or whole numbers of which
    some are below 0)."""
    try:
        numbers = np.array([float(each) for each in labels])
        whole = bool((numbers == np.floor(numbers)).all() and (np.abs(numbers) < 2**53).all())
        if not whole or numbers.min() >= 0:
            return (numbers.astype(np.int64) if whole else numbers), []
    except ValueError:
        pass
    names = sorted(set(labels))
    number = {name: place for place, name in enumerate(names)}
    return np.array([number[each] for each in labels], np.int64), names


def _schema(graph: Graph, labels: np.ndarray) -> pa.Schema:
    def width(rows: list[list[Any]]) -> pa.DataType:
        whole = all(isinstance(each, int) for row in rows for each in row)
        return pa.list_(pa.list_(pa.int64() if whole else pa.float64()))

    of_label = pa.int64() if labels.dtype == np.int64 else pa.float64()
    fields = [("edge_index", pa.list_(pa.list_(pa.int64()))), ("node_feat", width(graph.nodes))]
    fields += [("edge_attr", width(graph.edge_features))] if graph.edge_features is not None else []
    fields += [("y", pa.list_(of_label)), ("num_nodes", pa.int64())]
    return schema_of(fields, {name: _feature(kind) for name, kind in fields})


def _feature(kind: pa.DataType) -> Any:
    """As `datasets` writes it: a list of one feature for each level."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind).replace("double", "float64"), "_type": "Value"}


def _table(graphs: Sequence[Graph], labels: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "edge_index": [[[a for a, _ in graph.edges], [b for _, b in graph.edges]] for graph in graphs],
        "node_feat": [graph.nodes for graph in graphs],
        "edge_attr": [graph.edge_features for graph in graphs],
        "y": list(labels),
        "num_nodes": [len(graph.nodes) for graph in graphs],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _sdf(inputs: Sequence[str], label: str | None) -> Iterator[tuple[str, Graph | Unreadable]]:
    """(where it is, molecule) of all molecules of some files."""
    if wrong := next(
        (each for each in inputs if not (each.lower().endswith((".sdf", ".mol")) and Path(each).is_file())), None
    ):
        raise ConfigError(f"{wrong} is neither an .sdf file nor a folder of TUDataset, which --kind graphs takes")
    if label is None:
        raise ConfigError("--kind graphs of SDF files needs --label NAME, the data item that is predicted")
    if (size := sum(Path(each).stat().st_size for each in inputs)) > MOST_BYTES:
        raise ConfigError(f"the files have {size:,} bytes, over {MOST_BYTES:,}: write Parquet, which is read as it is")
    for name in inputs:
        text = Path(name).read_text(encoding="utf-8", errors="replace")
        for number, block in enumerate(re.split(r"^\$\$\$\$[ \t]*(?:\n|$)", text, flags=re.MULTILINE), 1):
            if block.strip():
                try:
                    yield f"molecule {number} of {name}", molecule(block, label)
                except Unreadable as error:
                    yield f"molecule {number} of {name}", error


def molecule(block: str, label: str) -> Graph:
    """A molecule of an SDF file: the atoms and bonds of its V2000 table, and one of its data items.

    Raises:
        Unreadable: it has no such table, or one that is damaged.
    """
    lines = block.splitlines()
    if len(lines) < 4 or "V2000" not in lines[3]:
        raise Unreadable("it has no V2000 table of atoms")
    try:
        atoms, bonds = int(lines[3][:3]), int(lines[3][3:6])
        if len(lines) < 4 + atoms + bonds:
            raise Unreadable(f"it ends within its {counted(atoms, 'atom')} and {counted(bonds, 'bond')}")
        symbols = [line[31:34].strip() for line in lines[4 : 4 + atoms]]
        edges, types = [], []
        for line in lines[4 + atoms : 4 + atoms + bonds]:
            one, other, kind = (int(line[place : place + 3]) for place in (0, 3, 6))
            if not (1 <= one <= atoms and 1 <= other <= atoms and kind >= 0):
                raise Unreadable(f"the bond {line[:9].strip()} joins an atom that is not there, or has no type")
            edges += [(one - 1, other - 1), (other - 1, one - 1)]
            types += [[kind], [kind]]
    except ValueError as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"its table: {clip(error, 100)}") from None
    if unknown := [symbol for symbol in symbols if symbol not in NUMBER]:
        raise Unreadable(f"{shortened(unknown[0], 20)} is no element")
    item = re.search(rf"^>.*<{re.escape(label)}>.*\n(.*)$", block, flags=re.MULTILINE)
    return Graph([[NUMBER[symbol]] for symbol in symbols], edges, types, item[1].strip() if item else "")


def _of_folder(folder: Path) -> Iterator[tuple[str, Graph | Unreadable]]:
    """(where it is, graph) of all graphs of a folder of TUDataset."""
    names = [path.name.removesuffix("_A.txt") for path in folder.glob("*_A.txt")]
    if len(names) != 1:
        raise ConfigError(f"{folder} has {len(names)} files NAME_A.txt, of edges: TUDataset's format has one")
    [name] = names
    if (size := sum(path.stat().st_size for path in folder.glob("*.txt"))) > MOST_BYTES:
        raise ConfigError(f"{folder} has {size:,} bytes, over {MOST_BYTES:,}: write Parquet, which is read as it is")
    edges = _numbers(folder, name, "A")
    graph_of = _numbers(folder, name, "graph_indicator")
    labels = [line.strip() for line in _lines(folder, name, "graph_labels")]
    if edges is None or graph_of is None or not labels:
        raise ConfigError(f"{folder} lacks {name}_graph_indicator.txt or {name}_graph_labels.txt, or one is empty")
    nodes, features = _either(folder, name, "node", len(graph_of)), _either(folder, name, "edge", len(edges))
    graph_of = graph_of[:, 0]
    if (np.diff(graph_of) < 0).any() or graph_of.min() < 1 or graph_of.max() > len(labels):
        raise ConfigError(f"{folder}/{name}_graph_indicator.txt: graphs must ascend from 1 to {len(labels)}")
    if edges.shape[1] != 2 or edges.min() < 1 or edges.max() > len(graph_of):
        raise ConfigError(f"{folder}/{name}_A.txt: an edge is two nodes, from 1 to {len(graph_of)}")
    edges -= 1
    first, second = graph_of[edges].T
    if (first != second).any():
        raise ConfigError(f"{folder}/{name}_A.txt: edge {int((first != second).argmax()) + 1} joins two graphs")
    starts, order = np.searchsorted(graph_of, np.arange(1, len(labels) + 2)), np.argsort(first, kind="stable")
    edge_starts = np.searchsorted(first[order], np.arange(1, len(labels) + 2))
    for number, label in enumerate(labels):
        own, places = order[edge_starts[number] : edge_starts[number + 1]], slice(*starts[number : number + 2])
        rows = [[0]] * (places.stop - places.start) if nodes is None else nodes[places].tolist()
        pairs = [(a, b) for a, b in (edges[own] - places.start).tolist()]
        of_edges = None if features is None else features[own].tolist()
        yield f"graph {number + 1} of {name}", Graph(rows, pairs, of_edges, label)


def _either(folder: Path, name: str, of: str, count: int) -> np.ndarray | None:
    """The labels of nodes or edges, from 0, or else their attributes; None: there are neither."""
    labels = _numbers(folder, name, f"{of}_labels")
    found = labels - labels.min(0) if labels is not None else _numbers(folder, name, f"{of}_attributes", float)
    if found is not None and len(found) != count:
        raise ConfigError(f"{folder}/{name}_{of}_*.txt has {len(found):,} lines for {count:,} {of}s: give each one")
    return found


def _numbers(folder: Path, name: str, what: str, kind: type = int) -> np.ndarray | None:
    """[lines, numbers]; None: there is no such file."""
    if not (lines := _lines(folder, name, what)):
        return None
    try:
        return np.array([[kind(each) for each in line.split(",")] for line in lines], kind)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{folder}/{name}_{what}.txt: {clip(error, 100)}") from None


def _lines(folder: Path, name: str, what: str) -> list[str]:
    try:
        return (folder / f"{name}_{what}.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder}/{name}_{what}.txt: {clip(error, 100)}") from None
