"""The convolutional networks of the literature, each a list of stages."""

import math

from .stages import Architecture, Stage


def _vgg(*depths: int) -> Architecture:
    """arXiv:1409.1556, table 1."""
    widths = (64, 128, 256, 512, 512)
    stages = tuple(Stage(width=w, depth=d, pool="max2") for w, d in zip(widths, depths, strict=True))
    return Architecture(stages=stages, norm="none", grid=7, hidden=(4096, 4096))


def _resnet(block: str, *depths: int) -> Architecture:
    """arXiv:1512.03385, table 1, with the stride in the 3x3 convolution of a bottleneck."""
    width = 256 if block == "bottleneck" else 64
    stages = [Stage(width=64, kernel=7, stride=2, pool="max3")]
    for number, depth in enumerate(depths):
        stages.append(Stage(block=block, width=width << number, depth=depth, stride=2 if number else 1))  # type: ignore[arg-type]
    return Architecture(stages=tuple(stages))


def _inception(*branches: int, pool: str = "none") -> Stage:
    return Stage(block="inception", branches=branches, pool=pool)  # type: ignore[arg-type]


def _efficientnet(width: float, depth: float) -> Architecture:
    """arXiv:1905.11946, table 1, scaled by its section 3.3."""

    def rounded(channels: int) -> int:
        """To a multiple of 8, by at most a tenth down."""
        near = max(8, int(width * channels + 4) // 8 * 8)
        return near if near >= 0.9 * width * channels else near + 8

    rows = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip
    blocks = [
        Stage(block="inverted", expand=expand, width=rounded(channels), depth=math.ceil(depth * number), stride=stride,
              kernel=kernel, squeeze=0.25)
        for expand, channels, number, stride, kernel in rows
    ]  # fmt: skip
    stages = (Stage(width=rounded(32), stride=2), *blocks, Stage(width=rounded(1280), kernel=1))
    return Architecture(stages=stages, activation="swish", eps=1e-3, tf_padding=True)


def _convnext(width: int, *depths: int) -> Architecture:
    """arXiv:2201.03545, section 2."""
    blocks = [
        Stage(block="convnext", width=width << number, depth=depth, stride=2 if number else 1, kernel=7)
        for number, depth in enumerate(depths)
    ]
    stages = (Stage(block="patch", width=width, stride=4), *blocks)
    return Architecture(stages=stages, norm="layer", activation="gelu", eps=1e-6, head_norm=True)


_MOBILENET = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
"""Width, depth and first stride of its stages."""
_COMPOUND = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
"""Factors of width and depth of EfficientNet-B0 to B7."""

ARCHITECTURES: dict[str, Architecture] = {
    # LeCun et al., "Gradient-based learning applied to document recognition", 1998, for images of 28 x 28.
    "lenet": Architecture(
        stages=(
            Stage(width=6, kernel=5, pool="average2"), Stage(width=16, kernel=5, padding=0, pool="average2"),
        ),
        norm="none", activation="tanh", grid=5, hidden=(120, 84),
    ),
    # arXiv:1404.5997, one column.
    "alexnet": Architecture(
        stages=(
            Stage(width=64, kernel=11, stride=4, padding=2, pool="max3_valid"),
            Stage(width=192, kernel=5, pool="max3_valid"), Stage(width=384), Stage(width=256),
            Stage(width=256, pool="max3_valid"),
        ),
        norm="none", grid=6, hidden=(4096, 4096),
    ),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    # GoogLeNet, arXiv:1409.4842, table 1, with BatchNorm (arXiv:1502.03167) and without auxiliary classifiers.
    "inception": Architecture(
        stages=(
            Stage(width=64, kernel=7, stride=2, pool="max3"), Stage(width=64, kernel=1), Stage(width=192, pool="max3"),
            _inception(64, 96, 128, 16, 32, 32), _inception(128, 128, 192, 32, 96, 64, pool="max3"),
            _inception(192, 96, 208, 16, 48, 64), _inception(160, 112, 224, 24, 64, 64),
            _inception(128, 128, 256, 24, 64, 64), _inception(112, 144, 288, 32, 64, 64),
            _inception(256, 160, 320, 32, 128, 128, pool="max3"),
            _inception(256, 160, 320, 32, 128, 128), _inception(384, 192, 384, 48, 128, 128),
        ),
        eps=1e-3,
    ),
    "resnet18": _resnet("basic", 2, 2, 2, 2),
    "resnet34": _resnet("basic", 3, 4, 6, 3),
    "resnet50": _resnet("bottleneck", 3, 4, 6, 3),
    "resnet101": _resnet("bottleneck", 3, 4, 23, 3),
    "resnet152": _resnet("bottleneck", 3, 8, 36, 3),
    # arXiv:1704.04861, table 1.
    "mobilenet": Architecture(
        stages=(
            Stage(width=32, stride=2),
            *(Stage(block="separable", width=width, depth=depth, stride=stride) for width, depth, stride in _MOBILENET),
        ),
        activation="relu6", eps=1e-3, tf_padding=True,
    ),
    **{f"efficientnet_b{number}": _efficientnet(*factors) for number, factors in enumerate(_COMPOUND)},
    "convnext_tiny": _convnext(96, 3, 3, 9, 3),
    "convnext_small": _convnext(96, 3, 3, 27, 3),
    "convnext_base": _convnext(128, 3, 3, 27, 3),
    "convnext_large": _convnext(192, 3, 3, 27, 3),
}  # fmt: skip
"""By the name that `model.architecture` gives."""
