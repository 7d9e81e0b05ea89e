"""Functions of Python's standard library as syntax trees, labelled by the first word of their name.

As ogbg-code2 of the Open Graph Benchmark (arXiv:2005.00687) has those of GitHub: nodes have a kind and a depth, edges a
direction, and nothing has a name.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

WORDS = ("__init__", "__repr__", "add", "close", "get", "is", "parse", "read", "set", "write")
"""Which function it is, in the order of the classes."""
_TYPES = sorted(name for name, kind in vars(ast).items() if isinstance(kind, type) and issubclass(kind, ast.AST))
KINDS = {name: number for number, name in enumerate(_TYPES)}
SMALLEST, LARGEST, DEEPEST = 12, 200, 31
"""Fewest and most nodes; the depth that deeper nodes are given."""
LEFT_OUT = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
"""Folders of tables, programs and tests, and of what only some versions have, or is not Python's own."""


def syntax_trees() -> pa.Table:
    """A graph for each function of `WORDS` in this machine's standard library; of equal ones the first."""
    columns: dict[str, list] = {"edge_index": [], "node_feat": [], "edge_attr": [], "y": [], "num_nodes": []}
    seen = set()
    for label, function in _functions():
        nodes, edges = _graph(function)
        if SMALLEST <= len(nodes) <= LARGEST and (key := (label, str(nodes), str(edges))) not in seen:
            seen.add(key)
            ends = [[a for a, _ in edges] + [b for _, b in edges], [b for _, b in edges] + [a for a, _ in edges]]
            row = (ends, nodes, [[0]] * len(edges) + [[1]] * len(edges), [label], len(nodes))
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return pa.table(columns)


def _functions() -> Iterator[tuple[int, ast.AST]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            waiting: list[ast.AST] = [ast.parse(path.read_bytes())]
            while waiting:  # not ast.walk, which would visit every expression
                node = waiting.pop()
                waiting += [*getattr(node, "body", ()), *getattr(node, "orelse", ())][::-1]
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    name = node.name
                    word = name if name.startswith("__") else name.strip("_").partition("_")[0]
                    if word in WORDS:
                        yield WORDS.index(word), node


def _graph(function: ast.AST) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """(kind and depth of each node, edges from parent to child). Whether a name is read or written is no node."""
    nodes: list[list[int]] = []
    edges: list[tuple[int, int]] = []
    waiting = [(function, -1, 0)]
    while waiting and len(nodes) <= LARGEST:
        node, parent, depth = waiting.pop()
        if parent >= 0:
            edges.append((parent, len(nodes)))
        nodes.append([KINDS[type(node).__name__], min(depth, DEEPEST)])
        own = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
        waiting += [(child, len(nodes) - 1, depth + 1) for child in reversed(own)]
    return nodes, edges
