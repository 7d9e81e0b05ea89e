"""Checks the texts of a run before it starts, and makes the tokenizer that encodes texts and pairs."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from configs import Config, ConfigError, counted
from configs.sections.data import DataConfig
from configs.sections.pairs import check_packaged, one_by_one
from models.tasks.table import task_class
from trainer.data.bundled import at_hand
from trainer.data.manifest import TOKENIZER, Split, sources_of
from trainer.data.parquet_files import files_of_splits, unless_empty
from trainer.data.tokenizer.tokenizer import byte_tokenizer, train_bpe
from trainer.data.tokenizer.tokenizer_files import tokenizer_file
from trainer.files.durable import replacing

from .reader import NEEDS, Texts, read_table

MADE = ("bytes", "bpe")
"""Tokenizers that are made for the texts, rather than there already."""


class HasTexts(Protocol):
    config: DataConfig
    sha256: str

    def texts(self) -> Iterator[str]:
        """All texts of the split."""


def ensure_texts(config: Config, check: Callable[[Texts], None]) -> tuple[DataConfig, list[str]]:
    """See `trainer.data.kinds.Kind.ensure`. Raises ConfigError as `Texts`, and as `check`, which is given each split
    that is read from files of its own."""
    check_packaged(config, "texts")
    data = at_hand(config)
    texts = _texts(config)
    held_out = open_texts(config, "held_out") if texts.apart else None
    for each in filter(None, (texts, held_out)):
        check(each)
    predicted, outputs = len(data.texts.labels), getattr(config.model, "outputs", None)
    if not texts.classes and outputs not in (None, predicted):
        raise ConfigError(
            f"model.outputs is {outputs}, but data.texts.labels are {predicted}: set model.outputs={predicted}"
        )
    what = f"{texts.classes} classes" if texts.classes else f"{counted(predicted, 'number')} to predict"
    notes = [f"data.path={texts.path}: {counted(len(texts), 'text')} to train on, {what}"]
    notes += [texts.left_out] if texts.left_out else []
    texts.config = with_tokenizer(config, texts, "texts", notes)
    texts.examples([0])  # a tokenizer that cannot be used shows here, not in the run's processes
    return texts.config, notes


def with_tokenizer(config: Config, reader: HasTexts, what: str, notes: list[str]) -> DataConfig:
    """The reader's data with the file of `data.prepare.tokenizer`, made from its texts if it is to be: a file under
    run.root/data, named after what it is made from; any number of processes may do so at once. Raises ConfigError as
    `tokenizer_file`."""
    data = reader.config
    prepare, kind = data.prepare, data.prepare.tokenizer
    if kind not in MADE:
        file = tokenizer_file(kind)
    elif not (file := made_file(config, reader, what)).is_file():
        made = byte_tokenizer() if kind == "bytes" else train_bpe(reader.texts(), prepare.vocab_size)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(file) as opened:
            opened.write(made.to_str().encode())
        notes.append(f"data.prepare.tokenizer={file}: made {f'from the {what}' if kind == 'bpe' else 'of bytes'}")
    return data.model_copy(update={"prepare": prepare.model_copy(update={"tokenizer": str(file)})})


def made_file(config: Config, reader: HasTexts, what: str) -> Path:
    """The tokenizer that `with_tokenizer` makes, which may not exist yet."""
    prepare, kind, keys = reader.config.prepare, reader.config.prepare.tokenizer, getattr(reader.config, what)
    made_from = f"{reader.sha256} {keys} {prepare.vocab_size} {prepare.held_out} {prepare.seed}"
    name = "bytes" if kind == "bytes" else f"bpe-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}"
    return Path(config.run.root) / "data" / f"{what}-{name}" / TOKENIZER


def planned_for_texts(config: Config) -> Path | None:
    """The tokenizer that `ensure_texts` would make, which may not exist yet; None: it makes none. Raises ConfigError as
    `Texts`."""
    return made_file(config, _texts(config), "texts") if config.data.prepare.tokenizer in MADE else None


def _texts(config: Config, split: Split = "train") -> Texts:
    numbers = "numbers" in one_by_one(task_class(config).gives)
    return Texts(at_hand(config), config.train.seq_len, config.run.seed, split, numbers)


def open_texts(config: Config, split: Split) -> Texts | None:
    """See `trainer.data.kinds.Kind.open`."""
    return unless_empty(lambda: _texts(config, split), split)


def inputs_of_texts(data: DataConfig) -> tuple[str, str, dict[str, Any]]:
    """(path, digest, profile), for a run's record."""
    path = sources_of(data)[0].path
    found = read_table(files_of_splits(path, NEEDS)["train"], data.texts)
    return path, found.sha256, {"texts": len(found.labels)}
