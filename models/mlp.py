"""The multilayer perceptron."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.families.mlp import MlpConfig

from .init import fill_by
from .noise import dropout


class SwiGLU(nn.Module):
    """[..., 2n] -> [..., n]: one half gated by swish of the other (arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU,
    "swish": nn.SiLU, "gelu": nn.GELU, "swiglu": SwiGLU,
}  # fmt: skip
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "rms": lambda width: nn.RMSNorm(width, 1e-5),
}  # fmt: skip


class DropConnect(nn.Linear):
    """A linear layer some of whose weights are zero in training, others for each example (Wan et al., 2013)."""

    def forward(self, x: Tensor, keys: Tensor | None = None, site: int = 0, rate: float = 0.0) -> Tensor:
        """`keys`, `site`, `rate`: of `models.noise.dropout`."""
        if keys is None or not rate:
            return super().forward(x)
        kept = dropout(self.weight.expand(len(x), -1, -1), keys, site, rate)
        return torch.einsum("boi,bi->bo", kept, x) + self.bias


class Mlp(nn.Module):
    """From [B, inputs], or images of as many values, to [B, outputs]: classes' logits, or numbers."""

    def __init__(self, config: MlpConfig):
        super().__init__()
        self.config, widths = config, (config.inputs, *config.hidden)
        twice = 2 if config.activation == "swiglu" else 1
        self.layers = nn.ModuleList(
            nn.Sequential(
                DropConnect(before, twice * width), NORMS[config.norm](twice * width), ACTIVATIONS[config.activation]()
            )
            for before, width in zip(widths, config.hidden, strict=False)
        )
        self.head = nn.Linear(widths[-1], config.outputs)
        self.predictor = predictor_of(config)

    def init_weights(self, seed: int) -> None:
        fill_by(self.config.init, self, seed)

    def forward(self, inputs: Tensor, keys: Tensor | None = None, predict: bool = False) -> Tensor:
        """`keys`: of `models.noise.dropout`; `predict`: with the predictor, see `Predictor`."""
        x = inputs.flatten(1).to(self.head.weight.dtype)
        for site, layer in enumerate(self.layers, 1):
            linear, norm, activation = layer.children()
            y = activation(norm(linear(x, keys, CONNECTIONS + site, self.config.drop_connect)))
            y = dropout(y, keys, site, self.config.dropout)
            x = x + y if self.config.residual and y.shape == x.shape else y
        x = self.head(x)
        return self.predictor(x) if predict and self.predictor else x


class Predictor(nn.Module):
    """From a network's outputs to [2, B, outputs]: the outputs, normalised over the micro-batch as SimSiam's
    (arXiv:2011.10566, section 3), and what BYOL's predictor makes of them (arXiv:2006.07733, section 3.3)."""

    def __init__(self, size: int, hidden: tuple[int, ...]):
        super().__init__()
        self.norm = nn.BatchNorm1d(size, affine=False)
        self.mlp = Mlp(MlpConfig(inputs=size, hidden=hidden, outputs=size, norm="batch"))

    def forward(self, outputs: Tensor) -> Tensor:
        projected = self.norm(outputs)
        return torch.stack([projected, self.mlp(projected)])


def predictor_of(config: Any) -> Predictor | None:
    """What a config with the keys of `configs.sections.family.Predicting` asks for."""
    return Predictor(config.outputs, config.predictor) if config.predictor else None


CONNECTIONS = 1 << 16
"""Number of the first dropout of weights, beyond those of outputs."""
