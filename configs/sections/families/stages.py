"""What a convolutional network is made of: stages, and what they have in common."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.base import Section, Size

Block = Literal["conv", "basic", "bottleneck", "separable", "inverted", "convnext", "patch", "inception"]
Pool = Literal["none", "max2", "max3", "max3_valid", "average2"]
POOLS = {"max2": (2, 0), "max3": (3, 1), "max3_valid": (3, 0), "average2": (2, 0)}
"""Window and padding of each; all have a stride of 2."""
Activation = Literal["sigmoid", "tanh", "relu", "relu6", "leaky_relu", "swish", "gelu"]
Norm = Literal["none", "batch", "layer"]
ConvNorm = Literal["none", "batch", "layer", "rms", "group", "instance"]


class Stage(Section):
    """Blocks of one kind at one resolution."""

    block: Block = "conv"
    """conv: convolution, norm, activation (LeNet, AlexNet, VGG). basic and bottleneck: residual (ResNet). separable:
    depthwise, then pointwise (MobileNet). inverted: a wide depthwise convolution between narrow ends, residual where it
    can be (MobileNetV2, EfficientNet). convnext: depthwise, then an MLP of each pixel, residual. patch: a convolution
    and norm of patches that do not overlap. inception: four branches side by side."""
    width: Size = 64
    """Channels that it gives."""
    depth: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of blocks."""
    stride: Annotated[int, Field(ge=1, le=64)] = 1
    """Stride of the first block; the others have 1."""
    kernel: Annotated[int, Field(ge=1, le=255)] = 3
    """Height and width of its (depthwise) convolutions."""
    padding: Annotated[int, Field(ge=0, le=255)] | None = None
    """conv: pixels around the image; None: half of the kernel, rounded down."""
    expand: Annotated[float, Field(gt=0, le=64)] = 4.0
    """inverted and convnext: width inside, in widths of the block's input; bottleneck: width that it gives, in widths
    inside."""
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0
    """inverted: width of squeeze-and-excitation (arXiv:1709.01507), in widths of the block's input; 0: none."""
    branches: tuple[Size, Size, Size, Size, Size, Size] | None = None
    """inception: channels of the 1x1, of the 3x3 before and after, of the 5x5 before and after, and of the pooled
    branch; they make the width."""
    pool: Pool = "none"
    """Pooling after it, of stride 2: maximum over 2 or 3 pixels (max3_valid: without padding), or mean over 2."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.block == "inception") != (self.branches is not None):
            raise ValueError(
                f"block {self.block} {'has no' if self.branches else 'needs'} branches, which inception has"
            )
        if self.block not in ("conv", "patch") and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel}: block {self.block} needs an odd one, to keep height and width")
        return self

    @property
    def gives(self) -> int:
        """Channels after it."""
        if self.block == "inception" and self.branches:
            one, _, three, _, five, pooled = self.branches
            return one + three + five + pooled
        return self.width


class Architecture(Section):
    """A convolutional network but for its inputs and outputs."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=1000)]
    """From the image on."""
    norm: ConvNorm = "batch"
    """batch: BatchNorm; layer, rms: LayerNorm and RMSNorm over the channels of each pixel; group: GroupNorm of at most
    32 groups of 8 channels or more (arXiv:1803.08494); instance: of each channel of an image (arXiv:1607.08022)."""
    eps: float = Field(1e-5, gt=0)
    """Epsilon of norms."""
    activation: Activation = "relu"
    """Activation after convolutions; squeeze-and-excitation has the same."""
    grid: Size = 1
    """Height and width that the last stage is averaged to."""
    hidden: tuple[Size, ...] = ()
    """Widths of the linear layers before the last, each with its activation."""
    head_norm: bool = False
    """LayerNorm before them."""
    tf_padding: bool = False
    """A convolution of stride 2 pads right and bottom by one pixel more than left and top, as TensorFlow does for even
    sizes."""
