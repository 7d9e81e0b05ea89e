"""Keys of convolutional networks, whose stages a named architecture has, or the config itself."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from configs.base import Size
from configs.sections.family import Predicting

from .architectures import ARCHITECTURES
from .mlp import Initialisation
from .stages import POOLS, Activation, Architecture, ConvNorm, Stage


class ConvNetConfig(Predicting):
    """A convolutional network on images, built from stages."""

    default_task: ClassVar[str] = "classification"

    family: str = "convnet"
    architecture: str = "resnet18"
    """Name of a list of stages: lenet, alexnet, vgg11, vgg16, inception, resnet18 to resnet152, mobilenet,
    efficientnet_b0 to b7, convnext_tiny to convnext_large."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=1000)] | None = None
    """Stages of its own, from the image on, each with block, width, depth, stride, kernel, ...; None: those of the
    architecture."""
    channels: Literal[1, 3] = 3
    """Channels of an image, as in data.images.channels."""
    outputs: Size = 10
    """Classes."""
    activation: Activation | None = None
    """Activation after convolutions; None: the architecture's."""
    norm: ConvNorm | None = None
    """After convolutions: none, batch, layer or rms (over the channels of each pixel), group (of 8 channels or more) or
    instance (each channel); None: the architecture's."""
    hidden: tuple[Size, ...] | None = None
    """Widths of the linear layers before the last; None: those of the architecture."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before each linear layer."""
    spatial_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of whole channels after each stage."""
    stochastic_depth: float = Field(0.0, ge=0, lt=1)
    """Share of examples that skip the last residual block in training; it falls linearly to 0 for the first
    (arXiv:1603.09382)."""
    init: Initialisation = "torch"
    """Initial weights of convolutions and linear layers, as of the family mlp."""

    @property
    def scaled_by_examples(self) -> bool:
        return self.init == "lsuv"

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ARCHITECTURES:
            raise ValueError(f"should be one of {', '.join(ARCHITECTURES)}")
        return name

    @property
    def shape(self) -> Architecture:
        """The architecture with the keys that are given in their place."""
        own = {key: getattr(self, key) for key in ("stages", "norm", "activation", "hidden")}
        named = ARCHITECTURES[self.architecture]
        return named.model_copy(update={key: value for key, value in own.items() if value is not None})

    @property
    def smallest(self) -> int:
        """Least height and width of an image: after every stage at least a pixel is left."""
        size, shape = 1, self.shape
        for stage in reversed(shape.stages):
            if stage.pool != "none":
                window, padding = POOLS[stage.pool]
                size = max(1, 2 * (size - 1) + window - 2 * padding)
            if stage.block in ("patch", "convnext"):  # whose other convolutions keep the size
                size *= stage.stride
                continue
            for stride in [*[1] * (stage.depth - 1), stage.stride]:
                around = 2 * (stage.kernel // 2 if stage.padding is None else stage.padding)
                if shape.tf_padding and stride == 2 and stage.kernel > 1:
                    around -= 1
                size = max(1, (size - 1) * stride + stage.kernel - around)
        return size
