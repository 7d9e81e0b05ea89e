"""Message passing on graphs, by torch_geometric's layers.

torch_geometric would look at the values of a batch to add self-loops, which stops the device and cannot be counted on
the meta device: the reader leaves self-loops out, and here every node gets one, for the layers that want it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.utils import scatter

from configs.sections.families.graph import GnnConfig
from models.batch import Graphs
from models.noise import dropout, keys_of_parts

NORMS: dict[str, type[nn.Module]] = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
SELF_LOOPS = ("gcn", "gat")


class Embedding(nn.Module):
    """[N, F] features to [N, width]: a linear map of numbers; of categories the sum of a vector for each of them."""

    def __init__(self, inputs: int, categories: int, width: int):
        super().__init__()
        self.categories = categories
        self.map = nn.Embedding(inputs * categories, width) if categories else nn.Linear(inputs, width)

    def forward(self, features: Tensor) -> Tensor:
        if not self.categories:
            return self.map(features.to(self.map.weight.dtype))
        table = torch.arange(features.shape[1], device=features.device) * self.categories
        return self.map(features + table).sum(1)


class Sum(pyg.SumAggregation):
    """In fp32: in bf16 a sum of like numbers stops growing at 256 of them."""

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return super().forward(x.float(), *arguments, **keywords).to(x.dtype)


class Mean(pyg.MeanAggregation):
    """In fp32, as `Sum`."""

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return super().forward(x.float(), *arguments, **keywords).to(x.dtype)


def layer(config: GnnConfig) -> nn.Module:
    """One step of message passing. Its dropout would not be a function of the example, and is off."""
    width, each = config.width, config.width // config.heads
    edge_dim = width if config.edge_inputs else None
    if config.layer == "gcn":
        return pyg.GCNConv(width, width, add_self_loops=False, aggr=Sum())
    if config.layer == "sage":
        return pyg.SAGEConv(width, width, aggr=Mean())
    if config.layer == "gat":
        return pyg.GATConv(width, each, config.heads, add_self_loops=False, edge_dim=edge_dim)
    if config.layer == "transformer":
        return pyg.TransformerConv(width, each, config.heads, edge_dim=edge_dim)
    mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return (pyg.GINEConv if config.edge_inputs else pyg.GINConv)(mlp, train_eps=True, aggr=Sum())


class Gnn(nn.Module):
    """From `Graphs` to [B, outputs]: classes' logits, or numbers, of each graph or of the node that is asked about."""

    def __init__(self, config: GnnConfig):
        super().__init__()
        self.config = config
        self.nodes = Embedding(config.inputs, config.categories, config.width)
        self.edges = Embedding(config.edge_inputs, config.edge_categories, config.width) if config.edge_inputs else None
        self.layers = nn.ModuleList(layer(config) for _ in range(config.depth))
        self.norms = nn.ModuleList(NORMS[config.norm](config.width) for _ in range(config.depth))
        self.head = nn.Linear(config.width, config.outputs)

    def forward(self, graphs: Graphs, keys: Tensor | None = None) -> Tensor:
        """`keys`: of `models.noise.dropout`."""
        config, edges = self.config, graphs.edges
        x = self.nodes(graphs.nodes)
        features = [] if self.edges is None else [self.edges(graphs.edge_features)]
        if config.layer in SELF_LOOPS:
            edges = torch.cat([edges, torch.arange(len(x), device=x.device).expand(2, -1)], 1)
            features = [torch.cat([each, each.new_zeros(len(x), config.width)]) for each in features]
        if config.layer == "gcn":
            features = [torch.ones(edges.shape[1], device=x.device)]  # in fp32, so that it counts neighbours in fp32
        if keys is not None:
            keys = keys_of_parts(keys, graphs.graph_of_node)
        for site, (passed, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            new = dropout(norm(passed(x, edges, *features).to(x.dtype)).relu(), keys, site, config.dropout)
            x = x + new if config.residual else new
        if graphs.roots is not None:
            return self.head(x[graphs.roots])
        whole = scatter(x.float(), graphs.graph_of_node, dim_size=graphs.size, reduce=config.readout)
        return self.head(whole.to(x.dtype))
