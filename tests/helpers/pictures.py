"""Small image data sets, as Hugging Face `datasets` writes them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3] uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(path: Path, count: int = 96, classes: int = 3, size: int = 12, rows: int = 16) -> Path:
    """A Parquet file of grey images with noise: the position of a bright bar is the class."""
    draw = np.random.default_rng(0)
    images, labels = [], []
    for i in range(count):
        label = i % classes
        pixels = draw.integers(0, 100, (size, size), dtype=np.uint8)
        begin = label * size // classes
        pixels[:, begin : begin + size // classes] += 120
        images.append({"bytes": png(pixels), "path": f"{i}.png"})
        labels.append(label)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=rows)
    return path
