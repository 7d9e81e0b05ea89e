"""Keys of graph neural networks."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from configs.base import Size
from configs.sections.family import ModelSection


class GnnConfig(ModelSection):
    """Message passing over the nodes of a graph, read out for the whole graph or for one of its nodes."""

    default_task: ClassVar[str] = "classification"
    needs: ClassVar[tuple[str, ...]] = ("torch_geometric",)

    family: str = "gnn"
    layer: Literal["gcn", "sage", "gat", "gin", "transformer"] = "gin"
    """gcn (arXiv:1609.02907), sage (GraphSAGE with the mean of the neighbours, 1706.02216), gat (1710.10903),
    gin (1810.00826; with features of edges 1905.12265) or transformer (dot-product attention, 2009.03509)."""
    inputs: Size = 1
    """Features of a node: columns of node_feat."""
    categories: int = Field(0, ge=0, le=2**24)
    """Node features are categories, whole numbers below this, each with its own embedding; 0: they are numbers."""
    edge_inputs: int = Field(0, ge=0, le=2**24)
    """Features of an edge: columns of edge_attr; 0: none are used. For gat, gin and transformer."""
    edge_categories: int = Field(0, ge=0, le=2**24)
    """The same for edge features."""
    outputs: Size = 2
    """Classes, or predicted numbers."""
    width: Size = 64
    """Width of a node's state."""
    depth: Size = 3
    """Layers: how many edges away a node sees."""
    heads: Size = 4
    """Attention heads, of gat and transformer; they must divide width."""
    norm: Literal["none", "batch", "layer"] = "batch"
    """Normalisation of the nodes after each layer."""
    residual: bool = True
    """Add each layer's input to its output."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the nodes' states after each layer."""
    readout: Literal["mean", "sum", "max"] = "mean"
    """How node states are pooled into that of a graph."""

    @model_validator(mode="after")
    def _fits(self) -> "GnnConfig":
        if self.layer in ("gat", "transformer") and self.width % self.heads:
            raise ValueError(f"model.width ({self.width}) is not a multiple of model.heads ({self.heads})")
        if self.edge_inputs and self.layer in ("gcn", "sage"):
            raise ValueError(
                f"model.layer={self.layer} does not use edge features: set model.edge_inputs=0 and "
                "model.edge_categories=0, or model.layer=gin"
            )
        if self.edge_categories and not self.edge_inputs:
            raise ValueError("model.edge_categories needs model.edge_inputs, the number of columns of edge_attr")
        return self
