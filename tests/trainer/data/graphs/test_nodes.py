"""Nodes of one graph: with which neighbours they are read, and that all of them are as good as the whole graph."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs import ConfigError, from_dict
from models.batch import Graphs
from models.families import build
from models.init import fill
from trainer.data.graphs.nodes import Nodes
from trainer.data.kinds import kind_of

SIZE = 60


def write(path, rows=1, **columns):
    """A random directed graph; edge_attr is the number of the edge."""
    draw = np.random.default_rng(0)
    edges = np.argwhere(draw.random((SIZE, SIZE)) < 0.15)
    edges = edges[edges[:, 0] != edges[:, 1]]
    row = {"edge_index": edges.T.tolist(), "node_feat": draw.normal(size=(SIZE, 3)).tolist()}
    row |= {"edge_attr": [[float(n)] for n in range(len(edges))], "y": [i % 3 for i in range(SIZE)]}
    pq.write_table(pa.Table.from_pylist([row | columns] * rows), path)
    return path


def config(path, neighbours=(4, 2), **model):
    data = {"path": str(path), "kind": "nodes", "graphs": {"neighbours": neighbours}, "prepare": {"held_out": 0.25}}
    return from_dict({"model": {"family": "gnn", "inputs": 3, "outputs": 3, "norm": "none", **model}, "data": data})


def nodes(path, split="train", seed=0, neighbours=(4, 2)) -> Nodes:
    return Nodes(config(path, neighbours).data, seed, split)


@torch.no_grad()
@pytest.mark.parametrize("layer", ["sage", "gin", "gat", "transformer"])
def test_with_all_neighbours_a_node_is_seen_as_in_the_whole_graph(tmp_path, layer):
    """As far as the network looks."""
    asked = config(write(tmp_path / "x.parquet"), (SIZE, SIZE), layer=layer, depth=2)
    module, read = build(asked.model), nodes(tmp_path / "x.parquet", neighbours=(SIZE, SIZE))
    fill(module, 0)
    batch, places = read.examples(range(20)), [int(read._nodes[read.locate(i)]) for i in range(20)]
    whole, edges = torch.from_numpy(read.packed.nodes), torch.from_numpy(read.packed.edges.T.copy())
    all_of_it = Graphs(whole, edges, None, torch.zeros(SIZE, dtype=torch.int64), 1, torch.tensor(places))
    assert torch.allclose(module(batch.inputs), module(all_of_it), atol=1e-5)
    assert batch.labels.tolist() == [place % 3 for place in places]


def test_neighbours_are_a_function_of_seed_and_index(tmp_path):
    path = write(tmp_path / "x.parquet")
    one, other, again = nodes(path), nodes(path, seed=1), nodes(path)
    first, second = one.examples([7]), again.examples([3, 7])
    assert torch.equal(first.nodes, second.nodes[second.graph_of_node == 1])
    assert torch.equal(first.edge_features, second.edge_features[-first.edges.shape[1] :])
    [later] = [i for i in range(len(one), 2 * len(one)) if one.locate(i) == one.locate(7)]
    for changed in (one.examples([later]), other.examples([7])):
        assert not torch.equal(changed.edge_features, first.edge_features)
    held_out = [nodes(path, "held_out", seed).examples([3]) for seed in (0, 1)]
    assert torch.equal(held_out[0].nodes, held_out[1].nodes)
    assert sorted([*one._nodes, *nodes(path, "held_out")._nodes]) == list(range(SIZE))


def test_a_neighbourhood_has_as_many_as_asked_for(tmp_path):
    read = nodes(write(tmp_path / "x.parquet"))
    batch, edges = read.examples(range(8)), read.packed.edges
    used = edges[batch.edge_features[:, 0].long()]
    whole = torch.from_numpy(read.packed.nodes)
    for end in (0, 1):  # each sampled edge joins the nodes that it joins in the graph
        assert torch.equal(batch.nodes[batch.edges[end]], whole[used[:, end]])
    into_root = [int((batch.edges[1] == root).sum()) for root in batch.roots]
    assert into_root == [min(4, int((edges[:, 1] == read._nodes[read.locate(i)]).sum())) for i in range(8)]
    received = torch.bincount(batch.edges[1], minlength=len(batch.nodes))
    received[batch.roots] = 0
    assert received.max() == 2
    assert batch.graph_of_node[batch.roots].tolist() == list(range(8))


def test_padding_and_nodes_without_a_label(tmp_path):
    y = [None if i < 20 else i % 3 for i in range(SIZE)]
    path = write(tmp_path / "x.parquet", y=y)
    read = nodes(path)
    assert min(read._nodes) >= 20
    batch = read.examples([-1, 0])
    assert (batch.labels[0], batch.weight(), batch.roots[0]) == (-1, 1, 0)
    assert not batch.nodes[0].any()
    assert kind_of(config(path)).ensure(config(path))[1][1] == "20 nodes without a label: only neighbours of others"


REFUSED = {
    "two graphs": ({"rows": 2}, r"has 2 graphs, but data\.kind=nodes learns from the nodes of one: keep one row"),
    "a label": ({"y": [1]}, r"y has 1 label for 60 nodes: give each node one"),
    "no number": (
        {"node_feat": [[float("nan")] * 3] * SIZE}, r"node_feat or edge_attr has a number that is missing or infinite",
    ),
    "no class": ({"y": [0.5] * SIZE}, r"y has 0\.5, but classes are whole numbers from 0"),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=message):
        nodes(write(tmp_path / "x.parquet", **columns))
