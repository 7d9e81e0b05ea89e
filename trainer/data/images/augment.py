"""Augmentation of one training image: cropped, mirrored, its colours changed."""

import numpy as np

from configs.sections.data import ImagesConfig
from trainer.data.read.order import mix


def augmented(pixels_CHW: np.ndarray, how: ImagesConfig, key: int) -> np.ndarray:
    """The image as `data.images.crop`, `flip` and `jitter` ask for, uint8: a function of the arguments alone.

    Args:
        key: 64 bits, different for each epoch of each image.
    """
    draw, (_, height, width), around = key, pixels_CHW.shape, how.crop
    draw, top = divmod(draw, 2 * around + 1)
    draw, left = divmod(draw, 2 * around + 1)
    if around:
        padded = np.pad(pixels_CHW, ((0, 0), (around, around), (around, around)))
        pixels_CHW = padded[:, top : top + height, left : left + width]
    if how.flip and draw % 2:
        pixels_CHW = pixels_CHW[:, :, ::-1]
    return _jittered(pixels_CHW, how.jitter, key) if how.jitter else pixels_CHW


def _jittered(pixels_CHW: np.ndarray, most: float, key: int) -> np.ndarray:
    """Brightness, then contrast and saturation, each times 1 - most to 1 + most."""
    light, contrast, colour = (
        np.float32(1 + most * (2 * (mix(key, name) / 2**64) - 1)) for name in ("light", "contrast", "colour")
    )
    x = pixels_CHW.astype(np.float32) * light
    mean = x.mean(dtype=np.float32)
    x = mean + (x - mean) * contrast
    grey = x.mean(0, keepdims=True, dtype=np.float32)
    return (grey + (x - grey) * colour).round().clip(0, 255).astype(np.uint8)
