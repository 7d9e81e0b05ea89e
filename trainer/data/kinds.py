"""The kinds of examples that a task can learn from: the table of their readers. A plugin adds one to `KINDS`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs import Config, ConfigError
from configs.sections.data import DataConfig
from models.batch import MicroBatch
from models.tasks.table import task_class
from trainer.processes.device import device
from trainer.tracking import inputs_of
from trainer.tracking.tracker import Input

from .default import ensure_prepared
from .manifest import Split, sources_of, without_held_out
from .read.reader import Dataset
from .tokenizer.kept import keep_tokenizer, tokenizer_of
from .tokenizer.prompts import Prompts
from .tokenizer.tokenizer import TokenizerProcess


class ExampleReader(Protocol):
    """Reads one split: an example is a pure function of (seed, index). Not for several threads at once.

    Attributes:
        bad_pages: (file, row group) of each page skipped so far.
    """

    bad_pages: list[tuple[str, int]]

    def __len__(self) -> int:
        """Examples in one pass over the data; the training split goes on after it."""

    def examples(self, indices: Sequence[int]) -> MicroBatch:
        """The examples of these indices, as the cursor counts them; -1 stands for padding of weight zero."""


SHOWN = 16
"""Examples that samples are drawn for."""


@contextmanager
def _first_held_out(run_dir: Path, config: Config, held_out: ExampleReader) -> Iterator[MicroBatch]:
    yield held_out.examples(range(min(SHOWN, len(held_out)))).to(device())


@dataclass(frozen=True)
class Kind:
    """How one kind of examples is read.

    Attributes:
        ensure: checks the data of a config, and prepares what can be. Returns `config.data` as the run will use it, and
            lines that say what was prepared or chosen. Raises ConfigError if the data cannot be read.
        open: opens a split; None: it is empty.
        inputs: the run's data as they are recorded, with their digests.
    """

    ensure: Callable[[Config], tuple[DataConfig, list[str]]]
    open: Callable[[Config, Split], ExampleReader | None]
    inputs: Callable[[DataConfig], list[dict[str, Any]]]
    keep: Callable[[Path, DataConfig], None] = lambda run_dir, data: None
    """Copies into the run's folder whatever of the data is needed to use a checkpoint without them."""
    shown: Callable[[Path, Config, ExampleReader], AbstractContextManager[Any]] = _first_held_out
    """What `Task.samples` is given, on the device: by default the first held-out examples."""


def kind_of(config: Config) -> Kind:
    """The kind of examples that the run's task learns from."""
    return KINDS[task_class(config).reads]


def _open_tokens(config: Config, split: Split) -> Dataset | None:
    if split == "held_out" and len(without_held_out(config.data)) == len(sources_of(config.data)):
        return None
    return Dataset(config.data, config.train.seq_len, config.run.seed, split)


@contextmanager
def _prompts(run_dir: Path, config: Config, held_out: ExampleReader) -> Iterator[Prompts]:
    folder, info = tokenizer_of(run_dir, config.data)
    with TokenizerProcess(folder, config.data.limits) as tokenizer:
        yield Prompts(config.train.sample_prompts, tokenizer, info.eos_id)


def _images(data: DataConfig, seed: int = 0, split: Split = "train") -> Any:
    from .images.reader import Images  # Pillow, which other kinds need not wait for

    return Images(data, seed, split)


def _open_images(config: Config, split: Split) -> ExampleReader | None:
    try:
        return _images(config.data, config.run.seed, split)
    except ConfigError:
        if split == "held_out":
            return None
        raise


def _ensure_images(config: Config) -> tuple[DataConfig, list[str]]:
    """Raises ConfigError as `images.reader.Images`, or if the data have more classes than the model."""
    if config.data.path == "stdlib":
        raise ConfigError(
            f"data.path=stdlib is text, but task={config.task} learns from images: set data.path to a Parquet file "
            "of images, or a folder of them"
        )
    images = _images(config.data)
    most = getattr(config.model, "classes", None)
    if most is not None and images.classes > most:
        raise ConfigError(
            f"model.classes is {most}, but data.path={images.path} has labels up to {images.classes - 1}: set "
            f"model.classes={images.classes}"
        )
    shape = " x ".join(map(str, images.shape))
    return config.data, [f"data.path={images.path}: {len(images):,} images of {shape}, {images.classes} classes"]


def _image_inputs(data: DataConfig) -> list[dict[str, Any]]:
    images = _images(data)
    path, profile = Path(images.path), {"images": len(images), "classes": images.classes}
    return [Input(path.name, "training", str(path), images.sha256, profile)._asdict()]


KINDS: dict[str, Kind] = {
    "tokens": Kind(
        ensure_prepared,
        _open_tokens,
        lambda data: [entry for source in sources_of(data) for entry in inputs_of(source.path)],
        keep_tokenizer,
        _prompts,
    ),
    "images": Kind(_ensure_images, _open_images, _image_inputs),
}
