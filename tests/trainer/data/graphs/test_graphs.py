"""Graphs: what is read of Parquet files, in which order, and what is left out or refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch_geometric.data import Batch, Data

from configs import ConfigError, from_dict
from configs.sections.data import DataConfig
from trainer.data.graphs.reader import Graphs
from trainer.data.kinds import kind_of

COUNT = 40


def table(count=COUNT, **columns) -> dict[str, list]:
    """Graphs of 1 to 6 nodes, as `datasets` writes them; `columns` replace some, None takes one away."""
    draw = np.random.default_rng(0)
    found: dict[str, list] = {"edge_index": [], "node_feat": [], "edge_attr": [], "y": [], "num_nodes": []}
    for i in range(count):
        size = 1 + i % 6
        edges = [(a, b) for a in range(size) for b in range(size) if a != b and draw.random() < 0.5]
        found["edge_index"].append([[a for a, _ in edges], [b for _, b in edges]])
        found["node_feat"].append(draw.normal(size=(size, 2)).round(3).tolist())
        found["edge_attr"].append([[a + b] for a, b in edges])
        found["y"].append([i % 3])
        found["num_nodes"].append(size)
    return {name: value for name, value in (found | columns).items() if value is not None}


def write(path, **columns):
    pq.write_table(pa.table(table(**columns)), path, row_group_size=16)
    return path


def graphs(path, split="train", numbers=False, seed=0):
    return Graphs(DataConfig(path=str(path)), seed, split, numbers)


def test_a_batch_is_that_of_torch_geometric(tmp_path):
    read, source = graphs(write(tmp_path / "x.parquet")), table()
    found, rows = read.examples([3, 50, 11]), [int(read._rows[read.locate(i)]) for i in (3, 50, 11)]
    data = [
        Data(
            torch.tensor(source["node_feat"][row]).view(-1, 2),
            torch.tensor(source["edge_index"][row], dtype=torch.int64).view(2, -1),
            torch.tensor(source["edge_attr"][row], dtype=torch.int64).view(-1, 1),
            y=source["y"][row],
        )
        for row in rows
    ]
    expected = Batch.from_data_list(data)
    assert torch.equal(found.nodes, expected.x)
    assert torch.equal(found.edges, expected.edge_index)
    assert torch.equal(found.edge_features, expected.edge_attr)
    assert torch.equal(found.graph_of_node, expected.batch)
    assert found.labels.tolist() == [each[0] for each in expected.y]
    assert (found.inputs.size, found.weight()) == (3, 3)
    assert found.edges.shape[1] > 5


def test_a_graph_is_a_function_of_seed_and_index(tmp_path):
    path = write(tmp_path / "x.parquet")
    one, other, again = graphs(path), graphs(path, seed=1), graphs(path)
    size = len(one)
    assert size == 38  # 5% of 40 are held out
    epoch, second = [one.locate(i) for i in range(size)], [one.locate(i) for i in range(size, 2 * size)]
    assert sorted(epoch) == sorted(second) == list(range(size))
    assert epoch != second != [other.locate(i) for i in range(size, 2 * size)]
    assert [again.locate(i) for i in (77, 3)] == [one.locate(77), one.locate(3)]
    held_out = graphs(path, "held_out")
    assert sorted([*one._rows, *held_out._rows]) == list(range(COUNT))
    with pytest.raises(IndexError):
        held_out.locate(len(held_out))


def test_padding_is_a_node_without_a_label(tmp_path):
    batch = graphs(write(tmp_path / "x.parquet")).examples([-1, 3, -1])
    first, last = (batch.graph_of_node == 0), (batch.graph_of_node == 2)
    assert (int(first.sum()), int(last.sum())) == (1, 1)
    assert not batch.nodes[first | last].any()
    assert set(batch.graph_of_node[batch.edges].flatten().tolist()) <= {1}
    assert (batch.labels[[0, 2]].tolist(), batch.weight()) == ([-1, -1], 1)


def test_numbers_are_standardised_and_keep_their_scale(tmp_path):
    y = [[float(i), -2.0 * i] for i in range(COUNT)]
    read = graphs(write(tmp_path / "x.parquet", y=y), numbers=True)
    assert torch.allclose(read.labels.mean(0), torch.zeros(2), atol=1e-6)
    own = read.labels * read.scale[1] + read.scale[0]
    assert torch.allclose(own, torch.tensor([y[row] for row in read._rows]), atol=1e-4)
    held_out = graphs(tmp_path / "x.parquet", "held_out", numbers=True)
    assert torch.equal(held_out.scale, read.scale)
    assert read.examples([-1]).labels.tolist() == [[0, 0]]


SHAPES = {
    "a number": [i % 3 for i in range(COUNT)],
    "a list of a list": [[[i % 3]] for i in range(COUNT)],
    "numbers with a fraction": [[float(i % 3)] for i in range(COUNT)],
}


@pytest.mark.parametrize("y", SHAPES.values(), ids=SHAPES)
def test_labels_come_in_many_shapes(tmp_path, y):
    plain = graphs(write(tmp_path / "plain.parquet"))
    found = graphs(write(tmp_path / "x.parquet", y=y, num_nodes=None, edge_attr=None))
    assert torch.equal(found.labels, plain.labels)
    assert found.examples([0]).edge_features is None


def test_what_is_not_whole_is_counted_and_left_out(tmp_path):
    source = table()
    source["y"][4], source["y"][9], source["y"][10] = None, [], [None]
    source["node_feat"][7], source["edge_index"][7], source["edge_attr"][7], source["num_nodes"][7] = (
        [],
        [[], []],
        [],
        0,
    )
    source["node_feat"][8][1][0] = float("nan")
    source["edge_index"][11], source["edge_attr"][11] = [[0, 1, 1], [1, 1, 0]], [[5], [6], [7]]
    path = write(tmp_path / "x.parquet", **source)
    config = from_dict({"model": {"family": "gnn", "inputs": 2, "outputs": 3}, "data": {"path": str(path)}})
    _, notes = kind_of(config).ensure(config)
    assert notes[1:] == [
        "1 edge left out, from a node to itself",
        "5 graphs left out, 1 without a node, 3 without a label, 1 with a number that is missing or infinite: the "
        "first is row 4 of x.parquet",
    ]
    train, held_out = graphs(path), graphs(path, "held_out")
    assert sorted([*train._rows, *held_out._rows]) == sorted(set(range(COUNT)) - {4, 7, 8, 9, 10})
    [index] = [i for i in range(len(train)) if train._rows[train.locate(i)] == 11]
    batch = train.examples([index])
    assert (batch.edges.tolist(), batch.edge_features.tolist()) == ([[0, 1], [1, 0]], [[5], [7]])


def test_the_record_tells_the_data_by_the_footers_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet")
    config = from_dict({"model": {"family": "gnn", "inputs": 2, "outputs": 3}, "data": {"path": str(path)}})
    monkeypatch.delattr(pq.ParquetFile, "read")
    [one] = kind_of(config).inputs(config.data)
    assert one["profile"] == {"graphs": COUNT}


def test_files_of_their_own_are_held_out(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", count=7)
    assert (len(graphs(tmp_path)), len(graphs(tmp_path, "held_out"))) == (COUNT, 7)


def test_what_held_out_files_have_is_checked_before_a_run(tmp_path):
    write(tmp_path / "train.parquet")
    labels = write(tmp_path / "test.parquet", count=7, y=[[i] for i in range(7)])
    model = {"family": "gnn", "inputs": 2, "outputs": 3}
    config = from_dict({"model": model, "data": {"path": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"model\.outputs is 3, but .* labels up to 6: set model\.outputs=7"):
        kind_of(config).ensure(config)
    pq.write_table(pa.table(table(count=7, y=[[0.5, 1.0]] * 7)), labels)
    config = from_dict({"model": model | {"outputs": 1}, "task": "regression", "data": {"path": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"y of the held-out files has 2 numbers, but that of the others 1"):
        kind_of(config).ensure(config)


def test_files_may_have_no_edges_or_no_graphs(tmp_path):
    lists = pa.list_(pa.list_(pa.int64()))
    edges = {"edge_index": pa.array([[[], []]] * 3, lists), "edge_attr": pa.array([[]] * 3, lists)}
    alone = edges | {"node_feat": [[[1.0, 2.0]]] * 3}
    whole = table() | {"edge_attr": pa.array(table()["edge_attr"], lists)}
    write(tmp_path / "a.parquet", **alone, y=[[0]] * 3, num_nodes=[1] * 3)
    write(tmp_path / "b.parquet", **whole)
    pq.write_table(pq.read_table(tmp_path / "b.parquet").slice(0, 0), tmp_path / "c.parquet")
    read = graphs(tmp_path)
    assert (len(read.packed.labels), read.packed.edge_features.shape[1]) == (COUNT + 3, 1)
    one = graphs(tmp_path / "a.parquet").examples([0, 1])
    assert (one.edges.shape, one.edge_features, one.nodes.tolist()) == ((2, 0), None, [[1.0, 2.0]] * 2)


def changed(name, row, value):
    found = table()[name]
    found[row] = value
    return {name: found}


REFUSED = {
    "no node": (
        {"node_feat": pa.array([[]] * COUNT, pa.list_(pa.list_(pa.int64())))},
        r"node_feat is empty in every row: a graph needs at least one node",
    ),
    "no column": (
        {"y": None},
        r"should have exactly one column y \(it has edge_index, node_feat, edge_attr, num_nodes\)",
    ),
    "an edge to nowhere": (
        changed("edge_index", 5, [[0, 6], [1, 2]]) | changed("edge_attr", 5, [[0], [0]]),
        r"an edge of row 5 joins nodes 6 and 2, but the graph has 6 nodes, from 0 on: correct edge_index",
    ),
    "an edge from below": (changed("edge_index", 1, [[-1], [0]]), r"row 1 joins nodes -1 and 0, but the graph has 2"),
    "one end": (changed("edge_index", 1, [[0]]), r"edge_index is not two lists of whole numbers in every row"),
    "ends that differ": (changed("edge_index", 1, [[0, 1], [0]]), r"the two lists of edge_index differ in length"),
    "features of other edges": (changed("edge_attr", 5, [[1]]), r"row 5 has \d+ edges, but edge_attr of 1"),
    "nodes of two widths": (changed("node_feat", 0, [[1.0]]), r"node_feat has a list of 1 number and one of 2"),
    "another count": (changed("num_nodes", 3, 9), r"num_nodes of row 3 is 9, but node_feat has 4 nodes"),
    "text": ({"node_feat": [[["a"]]] * COUNT}, r"node_feat has string, not numbers"),
    "no lists": ({"edge_index": [1] * COUNT}, r"edge_index is int64: it needs graphs, as `datasets` writes them"),
    "two labels": ({"y": [[0, 1]] * COUNT}, r"y has 2 numbers, but task=classification predicts one class"),
    "half a class": ({"y": [0.5] * COUNT}, r"y has 0\.5, but classes are whole numbers .* set task=regression"),
    "labels of two widths": (changed("y", 0, [0, 1]), r"y has 2 numbers in one row, and fewer in another"),
}


@pytest.mark.parametrize(("columns", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        graphs(write(tmp_path / "x.parquet", **columns))


SIZES = {
    "inputs": ({"inputs": 3}, {}, r"model\.inputs is 3, but node_feat .* has 2 columns: set model\.inputs=2"),
    "edges": ({"edge_inputs": 2}, {}, r"model\.edge_inputs is 2, but edge_attr .* has 1 column:"),
    "numbers": ({"categories": 9}, {}, r"model\.categories is 9, but node_feat has no whole numbers: set it to 0"),
    "categories": (
        {"edge_inputs": 1, "edge_categories": 3}, {},
        r"model\.edge_categories is 3, but edge_attr goes from 1 to 9: set it to 10, with categories from 0 on",
    ),
    "classes": ({"outputs": 2}, {}, r"model\.outputs is 2, but .* labels up to 2: set model\.outputs=3"),
    "predicted": ({"outputs": 2}, {"task": "regression"}, r"model\.outputs is 2, but y has 1: set model\.outputs=1"),
    "rows": ({}, {"data": {"path": "bundled:wine"}}, r"data\.path=bundled:wine has rows, but .* learns from graphs"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "sections", "message"), SIZES.values(), ids=SIZES)
def test_a_model_of_other_sizes_is_refused(tmp_path, model, sections, message):
    data = {"path": str(write(tmp_path / "x.parquet"))}
    tree = {"model": {"family": "gnn", "inputs": 2, "outputs": 3} | model, "data": data} | sections
    config = from_dict(tree)
    with pytest.raises(ConfigError, match=message):
        kind_of(config).ensure(config)
