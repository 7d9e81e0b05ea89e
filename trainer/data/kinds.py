"""The kinds of examples that a task can learn from: the table of their readers. A plugin adds one to `KINDS`."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs import Config, ConfigError, counted
from configs.sections.data import DataConfig
from configs.sections.pairs import check_packaged, one_by_one
from models.batch import Batch, MicroBatch
from models.tasks.table import reads, task_class
from trainer.processes.device import device
from trainer.tracking import inputs_of
from trainer.tracking.tracker import Input

from .bundled import at_hand
from .default import ensure_prepared
from .graphs.files import NEEDS as GRAPHS_NEED
from .graphs.files import read_footers
from .graphs.nodes import Nodes
from .graphs.reader import Graphs
from .manifest import Split, sources_of, without_held_out
from .pairs.prepared import ensure_pairs, inputs_of_pairs, open_pairs
from .parquet_files import files_of_splits, unless_empty
from .read.masked import MaskedReader, MaskedTexts
from .read.reader import Dataset
from .rows.reader import NEEDS, Rows, read_columns
from .series.reader import Series, ensure_series, inputs_of_series
from .texts.prepared import ensure_texts, inputs_of_texts, open_texts
from .tokenizer.kept import keep_tokenizer, keep_tokenizer_file, tokenizer_of
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


def typical(reader: ExampleReader) -> Sequence[int]:
    """Examples whose FLOPs are taken for those of all: a reader whose examples differ in size names some itself."""
    return getattr(reader, "typical", (0, 1))


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
    return KINDS[reads(config)]


def _open_tokens(config: Config, split: Split) -> Dataset | None:
    if split == "held_out" and len(without_held_out(config.data)) == len(sources_of(config.data)):
        return None
    return Dataset(config.data, config.train.seq_len, config.run.seed, split)


@contextmanager
def _prompts(run_dir: Path, config: Config, held_out: ExampleReader) -> Iterator[Prompts]:
    folder, info = tokenizer_of(run_dir, config.data)
    with TokenizerProcess(folder, config.data.limits) as tokenizer:
        yield Prompts(config.train.sample_prompts, tokenizer, info.eos_id)


def _open_masked(config: Config, split: Split) -> MaskedReader | None:
    dataset = _open_tokens(config, split)
    return MaskedReader(dataset, config) if dataset else None


@contextmanager
def _masked_texts(run_dir: Path, config: Config, held_out: ExampleReader) -> Iterator[MaskedTexts]:
    folder, _ = tokenizer_of(run_dir, config.data)
    with TokenizerProcess(folder, config.data.limits) as tokenizer, _first_held_out(run_dir, config, held_out) as batch:
        assert isinstance(batch, Batch)
        yield MaskedTexts(batch, tokenizer.decode)


def _images(data: DataConfig, seed: int = 0, split: Split = "train") -> Any:
    from .images.reader import Images  # Pillow, which other kinds need not wait for

    return Images(data, seed, split)


def _open_images(config: Config, split: Split) -> Any:
    return unless_empty(lambda: _images(at_hand(config), config.run.seed, split), split)


def _open_captions(config: Config, split: Split) -> Any:
    from .images.captions import Captions

    length: Any = getattr(config.model, "text_length", 64)
    return unless_empty(lambda: Captions(at_hand(config), config.run.seed, split, length), split)


def _ensure_images(
    config: Config, kind: str = "images", opened: Callable[[Config, Split], Any] = _open_images
) -> tuple[DataConfig, list[str]]:
    """Raises ConfigError as the reader, or if the model has other sizes."""
    check_packaged(config, kind)
    data = at_hand(config)
    images = opened(config, "train")
    images.check_sizes()
    held_out = opened(config, "held_out") if images.apart else None
    for each in filter(None, (images, held_out)):
        _check_sizes(config, math.prod(images.shape), each.classes)
    channels = getattr(config.model, "channels", None) or images.shape[0]
    if channels != images.shape[0]:
        raise ConfigError(
            f"model.channels is {channels}, but data.images.channels is {images.shape[0]}: set them to the same number"
        )
    if images.shape[1:] != (side := getattr(config.model, "image_size", None),) * 2 and side:
        raise ConfigError(
            f"model.image_size is {side}, but data.path={images.path} has images of {images.shape[2]} x "
            f"{images.shape[1]}: set data.images.size={side}, or another model.image_size"
        )
    if (least := getattr(config.model, "smallest", 1)) > min(images.shape[1:]):
        raise ConfigError(
            f"data.path={images.path} has images of {images.shape[2]} x {images.shape[1]}, too small for the stages of "
            f"model.family={config.model.family}, which need {least} x {least}: set data.images.size={least}, or other "
            "stages"
        )
    shape = " x ".join(map(str, images.shape))
    notes = [f"data.path={images.path}: {len(images):,} images of {shape}, {images.classes} classes"]
    if count := images.unlabelled[0]:
        notes.append(f"{counted(count, 'image')} left out, without a label: the first is {images.unlabelled[1]}")
    return data, notes


def _rows(config: Config, split: Split = "train") -> Rows:
    numbers = "numbers" in one_by_one(task_class(config).gives)
    return Rows(at_hand(config), config.run.seed, split, numbers)


def _open_rows(config: Config, split: Split) -> Rows | None:
    return unless_empty(lambda: _rows(config, split), split)


def _ensure_rows(config: Config) -> tuple[DataConfig, list[str]]:
    """Raises ConfigError as `rows.reader.Rows`, or if the model has other sizes."""
    check_packaged(config, "rows")
    rows, data = _rows(config), at_hand(config)
    held_out = _open_rows(config, "held_out")
    for each in filter(None, (rows, held_out)):
        _check_sizes(config, len(rows.names), each.classes)
    predicted, outputs = len(config.data.rows.labels), getattr(config.model, "outputs", None)
    if not rows.classes and outputs not in (None, predicted):
        raise ConfigError(
            f"model.outputs is {outputs}, but data.rows.labels are {predicted}: set model.outputs={predicted}"
        )
    what = f"{rows.classes} classes" if rows.classes else f"{counted(predicted, 'number')} to predict"
    notes = [
        f"data.path={rows.path}: {len(rows):,} rows of {counted(len(rows.names), 'feature')}, {what}",
        rows.left_out,
    ]
    return data, list(filter(None, notes))


def _ensure_texts(config: Config) -> tuple[DataConfig, list[str]]:
    """Raises ConfigError as `texts.reader.Texts`, or if the model has other sizes."""
    return ensure_texts(config, lambda texts: _check_sizes(config, None, texts.classes))


def _open_series(config: Config, split: Split) -> Series | None:
    return unless_empty(lambda: Series(at_hand(config), config.run.seed, split), split)


def _graphs(config: Config, split: Split = "train") -> Graphs:
    numbers = "numbers" in one_by_one(task_class(config).gives)
    return Graphs(at_hand(config), config.run.seed, split, numbers)


def _open_graphs(config: Config, split: Split) -> ExampleReader | None:
    return unless_empty(lambda: _graphs(config, split), split)


def _nodes(config: Config, split: Split = "train") -> Nodes:
    return Nodes(at_hand(config), config.run.seed, split)


def _open_nodes(config: Config, split: Split) -> ExampleReader | None:
    return unless_empty(lambda: _nodes(config, split), split)


def _ensure_nodes(config: Config) -> tuple[DataConfig, list[str]]:
    """Raises ConfigError as `graphs.nodes.Nodes`, or if the model has other sizes."""
    return _of_graphs(config, "nodes", _nodes)


def _ensure_graphs(config: Config) -> tuple[DataConfig, list[str]]:
    """Raises ConfigError as `graphs.reader.Graphs`, or if the model has other sizes."""
    data, notes = _of_graphs(config, "graphs", _graphs)
    if files_of_splits(sources_of(data)[0].path, GRAPHS_NEED)["held_out"]:  # which may differ from the others
        _check_graphs(config, _graphs(config, "held_out"))
    return data, notes


def _of_graphs(config: Config, kind: str, opened: Callable[[Config], Any]) -> tuple[DataConfig, list[str]]:
    check_packaged(config, kind)
    reader = opened(config)
    _check_graphs(config, reader)
    return at_hand(config), reader.notes


def _check_graphs(config: Config, reader: Graphs | Nodes) -> None:
    """Raise ConfigError if the model has other sizes."""
    reader.check_model(config.model)
    _check_sizes(config, getattr(config.model, "inputs", 0), reader.classes)


def _check_sizes(config: Config, inputs: int | None, classes: int) -> None:
    """Raise ConfigError if a model has too few classes, or other inputs than an example has (None: any)."""
    for key in ("classes", "outputs"):
        most = getattr(config.model, key, None)
        if most is not None and classes > most:
            raise ConfigError(
                f"model.{key} is {most}, but data.path={config.data.path} has labels up to {classes - 1}: set "
                f"model.{key}={classes}"
            )
    if inputs is not None and (own := getattr(config.model, "inputs", inputs)) != inputs:
        raise ConfigError(
            f"model.inputs is {own}, but an example of data.path={config.data.path} has {inputs} numbers: set "
            f"model.inputs={inputs}"
        )
    if (weights := config.train.class_weights) and len(weights) != (count := getattr(config.model, "outputs", classes)):
        raise ConfigError(f"train.class_weights has {len(weights)} weights for {count} classes: give one for each")


def _image_inputs(data: DataConfig) -> list[dict[str, Any]]:
    images = _images(data)
    return _input(images.path, images.sha256, {"images": len(images), "classes": images.classes})


def _row_inputs(data: DataConfig) -> list[dict[str, Any]]:
    path = sources_of(data)[0].path
    found = read_columns(files_of_splits(path, NEEDS)["train"], data.rows)
    return _input(path, found.sha256, {"rows": found.rows, "features": len(found.names)})


def _graph_inputs(data: DataConfig) -> list[dict[str, Any]]:
    path = sources_of(data)[0].path
    found = read_footers(files_of_splits(path, GRAPHS_NEED)["train"])
    return _input(path, found.sha256, {"graphs": found.graphs})


def _input(path: str, sha256: str, profile: dict[str, Any]) -> list[dict[str, Any]]:
    return [Input(Path(path).name, "training", path, sha256, profile)._asdict()]


def _token_inputs(data: DataConfig) -> list[dict[str, Any]]:
    return [entry for source in sources_of(data) for entry in inputs_of(source.path)]


KINDS: dict[str, Kind] = {
    "tokens": Kind(ensure_prepared, _open_tokens, _token_inputs, keep_tokenizer, _prompts),
    "masked tokens": Kind(ensure_prepared, _open_masked, _token_inputs, keep_tokenizer, _masked_texts),
    "images": Kind(_ensure_images, _open_images, _image_inputs),
    "captions": Kind(lambda config: _ensure_images(config, "captions", _open_captions), _open_captions, _image_inputs),
    "rows": Kind(_ensure_rows, _open_rows, _row_inputs),
    "graphs": Kind(_ensure_graphs, _open_graphs, _graph_inputs),
    "pairs": Kind(ensure_pairs, open_pairs, lambda data: _input(*inputs_of_pairs(data)), keep_tokenizer_file),
    "texts": Kind(_ensure_texts, open_texts, lambda data: _input(*inputs_of_texts(data)), keep_tokenizer_file),
    "series": Kind(ensure_series, _open_series, lambda data: _input(*inputs_of_series(data))),
    "nodes": Kind(_ensure_nodes, _open_nodes, _graph_inputs),
}
"""All but tokens are read without preparation, from Parquet: labelled images and graphs, as Hugging Face `datasets`
writes them; rows, with a column of numbers for each feature and label; texts, pairs and captions, with columns of text;
series, with columns of lists."""
