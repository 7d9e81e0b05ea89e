"""Graph networks: equal to dense formulas, blind to the order of nodes, and to the other graphs of a batch."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

from configs import ConfigError, from_dict, resolve
from models.batch import GraphBatch
from models.families import build
from models.flops import counted_flops
from models.init import fill
from models.noise import dropout_keys_of, keys_of_parts
from models.tasks.samples import Table
from models.tasks.table import task_of

LAYERS = ("gcn", "sage", "gat", "gin", "transformer")
SIZES = (5, 1, 9, 4)
F, WIDTH, HEADS = 3, 8, 2


def network(layer: str, **keys) -> nn.Module:
    keys = {"inputs": F, "width": WIDTH, "heads": HEADS, "outputs": 4, "norm": "none"} | keys
    module = build(from_dict({"model": {"family": "gnn", "layer": layer, **keys}}).model)
    fill(module, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):  # else 0
                parameter.normal_(0, 0.3)
    return module.eval()


def drawn(sizes=SIZES, seed=0) -> list[Data]:
    """Random graphs, directed, each with features of nodes and edges and a class."""
    draw, graphs = np.random.default_rng(seed), []
    for size in sizes:
        edges = np.argwhere(draw.random((size, size)) < 0.4)
        edges = torch.from_numpy(edges[edges[:, 0] != edges[:, 1]].T.copy())
        x, features = (torch.from_numpy(draw.normal(size=(n, F)).astype(np.float32)) for n in (size, edges.shape[1]))
        graphs.append(Data(x, edges, features, y=int(draw.integers(4))))
    return graphs


def batch(graphs: list[Data], first=0) -> GraphBatch:
    """Side by side, as torch_geometric has them."""
    found = Batch.from_data_list(graphs)
    ids = torch.arange(first, first + len(graphs))
    return GraphBatch(found.x, found.edge_index, found.edge_attr, found.batch, found.y, ids)


def dense(module: nn.Module, data: Data) -> torch.Tensor:
    """One layer without a residual, by the formula of its paper, on matrices of nodes by nodes."""
    passed, x, n = module.layers[0], module.nodes(data.x), len(data.x)
    to_from = torch.zeros(n, n)  # row: the node that receives
    to_from[data.edge_index[1], data.edge_index[0]] = 1
    name, with_self = module.config.layer, to_from + torch.eye(n)
    if name == "gcn":
        scale = with_self.sum(1) ** -0.5
        return scale[:, None] * with_self * scale @ passed.lin(x) + passed.bias
    if name == "sage":
        return passed.lin_l(to_from @ x / to_from.sum(1, keepdim=True).clamp(min=1)) + passed.lin_r(x)
    if name == "gin":
        return passed.nn((1 + passed.eps) * x + to_from @ x)
    heads = []
    for head in range(HEADS):
        own = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        if name == "gat":
            values, mask = passed.lin(x)[:, own], with_self
            scores = (values @ passed.att_dst[0, head])[:, None] + values @ passed.att_src[0, head]
            scores = nn.functional.leaky_relu(scores, 0.2)
        else:
            query, key, values = (f(x)[:, own] for f in (passed.lin_query, passed.lin_key, passed.lin_value))
            scores, mask = query @ key.T / (WIDTH / HEADS) ** 0.5, to_from
        shares = scores.masked_fill(mask == 0, -torch.inf).softmax(1).nan_to_num()  # nan: a node without a neighbour
        heads.append(shares @ values)
    return torch.cat(heads, 1) + (passed.bias if name == "gat" else passed.lin_skip(x))


@torch.no_grad()
@pytest.mark.parametrize("readout", ["mean", "sum", "max"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_the_formula_of_its_paper(layer, readout):
    module, graphs = network(layer, depth=1, residual=False, readout=readout), drawn()
    whole = {"mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0), "max": lambda x: x.max(0).values}[readout]
    expected = module.head(torch.stack([whole(dense(module, each).relu()) for each in graphs]))
    assert torch.allclose(module(batch(graphs).inputs), expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).max() > 0.02


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_the_order_of_nodes_and_edges_says_nothing(layer):
    edge_inputs = F if layer in ("gat", "gin", "transformer") else 0
    module, graphs = network(layer, norm="layer", edge_inputs=edge_inputs), drawn()
    moved = []
    for each in graphs:
        nodes, edges = torch.randperm(len(each.x)), torch.randperm(each.edge_index.shape[1])
        place = nodes.argsort()
        moved.append(Data(each.x[nodes], place[each.edge_index[:, edges]], each.edge_attr[edges], y=each.y))
    found = module(batch(graphs).inputs)
    assert torch.allclose(module(batch(moved).inputs), found, atol=1e-5)
    alone = torch.cat([module(batch([each]).inputs) for each in graphs])
    assert torch.allclose(alone, found, atol=1e-5)
    graphs[0].edge_index, graphs[0].edge_attr = graphs[0].edge_index.flip(0), graphs[0].edge_attr + 1
    changed = (module(batch(graphs).inputs) - found).abs().max(1).values > 1e-5
    assert changed.tolist() == [True, False, False, False]


@torch.no_grad()
def test_categories_have_a_table_for_each_column():
    module = network("gin", inputs=2, categories=5)
    nodes = torch.tensor([[0, 4], [3, 0]])
    table = module.nodes.map.weight
    assert torch.equal(module.nodes(nodes), torch.stack([table[0] + table[9], table[3] + table[5]]))


@torch.no_grad()
@pytest.mark.parametrize("readout", ["mean", "sum"])
@pytest.mark.parametrize("layer", ["gcn", "sage", "gin"])
def test_bf16_counts_many_neighbours(layer, readout):
    """3,000 equal ones of node 0; in bf16 a sum of ones ends at 256."""
    edges = torch.stack([torch.arange(1, 3001), torch.zeros(3000, dtype=torch.int64)])
    hub = batch([Data(torch.ones(3001, F), edges, torch.zeros(3000, F), y=0)])
    module = network(layer, depth=1, readout=readout, residual=False)
    expected = module(hub.inputs)
    found = module.bfloat16()(hub.inputs).float()
    assert torch.allclose(found, expected, rtol=0.05, atol=0.02 * expected.abs().max())


def test_dropout_belongs_to_the_node_of_the_example():
    module, whole = network("gin", dropout=0.5), batch(drawn(), first=7)
    keys = dropout_keys_of(0, whole.example_ids)
    found = module(whole.inputs, keys)
    parts = [batch(drawn()[:1], 7), batch(drawn()[1:], 8)]
    again = [module(part.inputs, dropout_keys_of(0, part.example_ids)) for part in parts]
    assert torch.allclose(torch.cat(again), found, atol=1e-5)
    assert not torch.allclose(module(whole.inputs), found, atol=1e-3)
    of_nodes = keys_of_parts(keys, whole.graph_of_node)
    assert len(of_nodes.unique()) == sum(SIZES)


@pytest.mark.parametrize("layer", LAYERS)
def test_flops_are_counted_without_computing(layer):
    config = from_dict({"model": {"family": "gnn", "layer": layer, "inputs": F, "width": WIDTH, "depth": 1}})
    nodes, linear = sum(SIZES), {"gcn": 1, "sage": 2, "gat": 1, "gin": 2, "transformer": 4}[layer]
    # Features to width without a gradient on, the layer's products, and the head; PyG's sums along edges are not
    # counted.
    expected = 2 * 2 * nodes * F * WIDTH + 3 * 2 * (nodes * linear * WIDTH * WIDTH + len(SIZES) * WIDTH * 2)
    assert counted_flops(config, batch(drawn())) == expected / len(SIZES)


def test_a_sample_of_numbers_has_a_column_for_each():
    learned = task_of(from_dict({"model": {"family": "gnn", "outputs": 2}, "task": "regression"}))
    given = batch(drawn((2, 3)))
    given.labels, given.scale = torch.tensor([[1.0, 0], [-1, 2]]), torch.tensor([[50.0, 0], [10, 1]])
    drawn_table = learned.samples({"model": lambda inputs: torch.zeros(2, 2)}, given)
    columns = ["example", "label 0", "label 1", "found 0", "found 1"]
    assert drawn_table == Table(columns, [(0, 60.0, 0.0, 50.0, 0.0), (1, 40.0, 2.0, 50.0, 0.0)])


REFUSED = {
    "heads": ({"layer": "gat", "width": 10, "heads": 4}, r": model\.width \(10\) is not a multiple of model\.heads \("),
    "edges": (
        {"layer": "gcn", "edge_inputs": 1},
        r": model\.layer=gcn does not use edge features: set model\.edge_inputs=0",
    ),
    "no edges": ({"edge_categories": 3}, r": model\.edge_categories needs model\.edge_inputs"),
    "no such": ({"layer": "gcm"}, r"model\.layer"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": {"family": "gnn", **keys}})


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("configs.sections.pairs.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^model\.family=gnn needs torch_geometric: pip install 'muster-train\["):
        resolve(from_dict({"model": {"family": "gnn"}}))
    assert importlib.util.find_spec("torch_geometric")
