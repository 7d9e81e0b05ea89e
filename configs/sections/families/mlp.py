"""Keys of the multilayer perceptron."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from configs.base import Size
from configs.sections.family import Predicting

Activation = Literal["sigmoid", "tanh", "relu", "leaky_relu", "prelu", "swish", "gelu", "swiglu"]
Initialisation = Literal[
    "torch", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "he_uniform_fan_out", "he_normal_fan_out",
    "orthogonal", "truncated_normal", "lsuv",
]  # fmt: skip


class MlpConfig(Predicting):
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
    norm: Literal["none", "batch", "layer", "rms"] = "none"
    """Normalisation before each activation."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout after each activation."""
    drop_connect: float = Field(0.0, ge=0, lt=1)
    """DropConnect (Wan et al., 2013): share of the hidden layers' weights that are zero in training, others for each
    example, so that a layer takes the memory of its weights times the examples."""
    init: Initialisation = "torch"
    """Initial weights: torch (uniform in +-1/sqrt(fan in)), xavier_uniform, xavier_normal, he_uniform, he_normal (both
    by fan in), he_uniform_fan_out, he_normal_fan_out, orthogonal, truncated_normal (standard deviation 0.02), or lsuv:
    orthogonal, then scaled so that each layer's outputs over the first training examples have variance 1
    (arXiv:1511.06422). Biases are 0 except with torch."""

    @property
    def scaled_by_examples(self) -> bool:
        return self.init == "lsuv"
