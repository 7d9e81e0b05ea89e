"""Reads labelled images at random: an image is a pure function of (seed, index)."""

import io
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError

from configs import ConfigError
from configs.reading.parse import clip
from configs.sections.data import DataConfig
from models.batch import ImageBatch
from trainer.data.manifest import Split, only_source
from trainer.data.parquet_files import EmptySplit, files_of_splits, rows_of_split
from trainer.data.read.order import KEPT_ORDERS, mix, shuffled
from trainer.data.read.shards import DataError

from .augment import augmented
from .files import BYTES, IMAGE, NEEDS, Group, open_files

BLOCK = 16
"""Row groups that are shuffled together and kept in memory."""
MODES = {1: "L", 3: "RGB"}
FORMATS = ("PNG", "JPEG")
LARGEST = 1 << 26
"""Most pixels of an image before resizing; a larger one is refused before it is decoded."""
CHECKED = 256
"""Images whose sizes are compared before a run starts."""


class WrongSize(DataError):
    """An image differs in size from the others."""

    def __str__(self) -> str:
        return f"{self.file}, row group {self.row_group}: {self.reason}"


class Images:
    """Images of a Parquet file, or of a folder of them. Not for several threads at once.

    The training split goes on epoch after epoch, each in a different order: row groups are permuted, and the images of
    BLOCK consecutive groups of that order are shuffled together. The held-out split (`validation*` or `test*` files, or
    without them the share `data.prepare.held_out` of all images) has one fixed order, whatever the seed, and ends at
    `len()`.

    Raises:
        ConfigError: as `files.open_files`; several sources; an empty split.
    """

    def __init__(self, config: DataConfig, seed: int, split: Split = "train"):
        self.config, self.split = config, split
        self.path = only_source(config, "images")
        files = files_of_splits(self.path, NEEDS)
        self.apart = bool(files["held_out"])
        """Whether the held-out split has files of its own."""
        found = open_files(files[split] or files["train"])
        self.groups, self.sha256, self._labels = found.groups, found.sha256, found.labels
        self.unlabelled = found.unlabelled
        """See `ImageFiles`: images that belong to no split."""
        self.bad_pages: list[tuple[str, int]] = []
        """(file, row group) of images that could not be decoded so far, under `data.on_bad_page: skip`."""
        chosen = rows_of_split(split, len(self._labels), bool(files["held_out"]), config.prepare) & (self._labels >= 0)
        self._ends = list(accumulate(group.rows for group in self.groups))
        self._rows = [
            np.flatnonzero(chosen[end - group.rows : end]) for group, end in zip(self.groups, self._ends, strict=True)
        ]
        self._size = sum(map(len, self._rows))
        if not self._size:
            raise EmptySplit(self.path, "image", split)
        self._key = mix(seed, "images") if split == "train" else mix("held out")
        self._bytes = lru_cache(BLOCK + 2)(lambda group: _read_group(self.groups[group]))
        self._block, self._order = lru_cache(KEPT_ORDERS)(self._block_of), lru_cache(KEPT_ORDERS)(self._order_of)
        self.shape = self._first_shape()
        """[C, H, W] of each image."""

    def __len__(self) -> int:
        """Images in one pass; training goes on after it."""
        return self._size

    @property
    def classes(self) -> int:
        """Largest label + 1."""
        return int(self._labels.max()) + 1

    def locate(self, index: int) -> tuple[int, int]:
        """(group, row in it) of example `index`. Raises IndexError past the end of the held-out split."""
        if index < 0 or (self.split == "held_out" and index >= self._size):
            raise IndexError(f"image {index} of {self._size}")
        epoch, place = divmod(index, self._size)
        _, ends = self._order(epoch)
        block = int(np.searchsorted(ends, place, side="right"))
        group, row = self._block(epoch, block)[place - (int(ends[block - 1]) if block else 0)]
        return int(group), int(row)

    def examples(self, indices: Sequence[int]) -> ImageBatch:
        """Images stacked; -1 stands for padding, a black image without a label. So does one that cannot be decoded,
        under `data.on_bad_page: skip`.

        Raises:
            DataError: an image cannot be read, is not a PNG or JPEG, or differs in size from the others.
        """
        images, labels = np.zeros((len(indices), *self.shape), np.uint8), np.full(len(indices), -1, np.int64)
        ids = torch.tensor(indices, dtype=torch.int64)
        for i, index in enumerate(indices):
            if index < 0:
                continue
            group, row = self.locate(index)
            try:
                pixels = self._decoded(group, row)
                if self.split == "train":
                    pixels = augmented(pixels, self.config.images, mix(self._key, "augment", index))
                images[i] = pixels
                labels[i] = self._labels[self._ends[group] - self.groups[group].rows + row]
            except DataError as error:
                if self.config.on_bad_page == "stop" or not error.damaged:
                    raise
                ids[i] = -1
                if (page := (str(error.file), error.row_group)) not in self.bad_pages:
                    self.bad_pages.append(page)
        return ImageBatch(torch.from_numpy(images), torch.from_numpy(labels), ids)

    def _first_shape(self) -> tuple[int, ...]:
        """That of the first image; of the first that can be decoded, if others are skipped. Raises ConfigError."""
        for index in range(min(BLOCK, self._size)):
            try:
                return self._decoded(*self.locate(index)).shape
            except DataError as error:
                if self.config.on_bad_page == "stop" or not error.damaged:
                    raise ConfigError(str(error)) from None
        raise ConfigError(f"data.path={self.path}: none of the first {min(BLOCK, self._size)} images can be decoded")

    def check_sizes(self) -> None:
        """Compare the sizes of the first CHECKED images, by their headers. Raises ConfigError if they differ."""
        if self.config.images.size:
            return
        for index in range(min(CHECKED, self._size)):
            group, row = self.locate(index)
            try:
                if data := self._bytes(group)[row]:
                    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                        self._check_size(group, row, image.width, image.height)
            except WrongSize as error:
                raise ConfigError(str(error)) from None
            except (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue  # `examples` says so

    def _check_size(self, group: int, row: int, width: int, height: int) -> None:
        """Raises WrongSize."""
        if (height, width) != self.shape[1:]:
            where, size = self.groups[group], max(self.shape[1:])
            raise WrongSize(
                where.file, where.number,
                f"row {row} has {width} x {height} pixels, others {self.shape[2]} x {self.shape[1]}: set "
                f"data.images.size={size}, which resizes all", damaged=False,
            )  # fmt: skip

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups of an epoch in order, and the cumulative number of images at the end of each block."""
        order = shuffled(len(self.groups), mix(self._key, epoch))
        sizes = np.array([len(self._rows[group]) for group in order])
        return order, np.add.reduceat(sizes, np.arange(0, len(sizes), BLOCK)).cumsum()

    def _block_of(self, epoch: int, block: int) -> np.ndarray:
        """[n, 2]: group and row of the images of a block."""
        order, _ = self._order(epoch)
        members = order[block * BLOCK : (block + 1) * BLOCK].tolist()
        pairs = np.concatenate([np.stack([np.full(len(self._rows[g]), g), self._rows[g]], axis=1) for g in members])
        return pairs[shuffled(len(pairs), mix(self._key, epoch, block))]

    def _decoded(self, group: int, row: int) -> np.ndarray:
        """[C, H, W] uint8. Raises DataError."""
        where = self.groups[group]
        data = self._bytes(group)[row]
        if data is None:
            raise DataError(where.file, where.number, f"row {row} has a path but no bytes", damaged=True)
        settings = self.config.images
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > LARGEST:
                    raise ValueError(f"{image.width} x {image.height} pixels, over {LARGEST:,}")
                drawn = image.convert(MODES[settings.channels])
            if settings.size and drawn.size != (settings.size, settings.size):
                drawn = drawn.resize((settings.size, settings.size), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = "" if isinstance(error, UnidentifiedImageError) else f": {clip(error, 150)}"
            reason = f"row {row} is not a readable PNG or JPEG{why}"
            raise DataError(where.file, where.number, reason, damaged=True) from None
        pixels = np.asarray(drawn)
        found = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if hasattr(self, "shape"):
            self._check_size(group, row, drawn.width, drawn.height)
        return found


def _read_group(group: Group) -> list[bytes | None]:
    """The encoded images of a row group. Raises DataError."""
    try:
        with pq.ParquetFile(group.file) as file:
            column = file.read_row_group(group.number, [f"{IMAGE}.{BYTES}"], use_threads=False)[IMAGE]
        images = column.combine_chunks().field(BYTES).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(group.file, group.number, clip(error, 200), damaged=False) from error
    if len(images) != group.rows:
        raise DataError(group.file, group.number, f"{len(images)} rows, the footer has {group.rows}", damaged=False)
    return images
