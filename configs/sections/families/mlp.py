"""Keys of the multilayer perceptron."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.base import Size
from configs.sections.family import ModelSection

Activation = Literal["sigmoid", "tanh", "relu", "leaky_relu", "prelu", "swish", "gelu", "swiglu"]
Initialisation = Literal[
    "torch", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "orthogonal", "truncated_normal"
]


class MlpConfig(ModelSection):
    """A multilayer perceptron on rows of numbers, or on images as rows of pixels."""

    default_task: ClassVar[str] = "classification"

    family: str = "mlp"
    inputs: Size = 64
    """Numbers of an example: feature columns of a row, or channels * height * width of an image."""
    outputs: Size = 10
    """Classes, or predicted numbers."""
    hidden: Annotated[tuple[Size, ...], Field(max_length=1000)] = (128,)
    """Widths of the hidden layers; []: none, which makes it linear."""
    activation: Activation = "relu"
    """Activation of the hidden layers: sigmoid, tanh, relu, leaky_relu (slope 0.01), prelu (its slope is learned),
    swish, gelu, or swiglu (a second linear map gated by swish)."""
    residual: bool = False
    """Add the input of each hidden layer to its output, where both have the same width (arXiv:1512.03385)."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Normalisation before each activation."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after each activation."""
    init: Initialisation = "torch"
    """Initial weights: torch (uniform in +-1/sqrt(fan in)), xavier_uniform, xavier_normal, he_uniform, he_normal (both
    by fan in), orthogonal, or truncated_normal (standard deviation 0.02). Biases are 0 except with torch."""
