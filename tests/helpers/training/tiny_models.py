"""Small models and batches for the tests of models/."""

from typing import Any

import torch
from torch import nn

from configs import ModelConfig
from models.batch import Batch
from models.families import build


def config(**changes: Any) -> ModelConfig:
    """A resolved two-layer MoE config; `num_experts=0` makes it dense."""
    values: dict[str, Any] = {
        "vocab_size": 96, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "num_experts": 4, "top_k": 2, "expert_size": 16, "max_positions": 64,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def model(config: ModelConfig, seed: int = 0) -> nn.Module:
    """A model with weights so large that every part of it affects the logits."""
    module = build(config.model_copy(update={"init_std": 0.2}))
    module.init_weights(seed)
    return module


def batch(
    rows: int = 3, length: int = 24, documents: torch.Tensor | None = None, seed: int = 0, vocab: int = 96
) -> Batch:
    """Random tokens; `documents` [rows, length] makes positions restart. Some labels are not trained on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].masked_fill(torch.rand(rows, length, generator=generator) < 0.2, -100)
    places = torch.arange(length).expand(rows, length)
    if documents is not None:
        places = torch.stack(
            [
                torch.cat([torch.arange(int(n)) for n in torch.unique_consecutive(row, return_counts=True)[1]])
                for row in documents
            ]
        )
    return Batch(ids[:, :-1], labels, places, documents, torch.arange(rows) + 100)


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, by name."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
