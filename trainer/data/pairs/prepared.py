"""Checks the pairs of a run before it starts, and makes the tokenizer that encodes them."""

import hashlib
from pathlib import Path
from typing import Any

from configs import Config, counted
from configs.sections.data import DataConfig
from configs.sections.pairs import check_packaged
from trainer.data.bundled import at_hand
from trainer.data.manifest import TOKENIZER, Split, sources_of
from trainer.data.parquet_files import files_of_splits, unless_empty
from trainer.data.tokenizer.tokenizer import byte_tokenizer, train_bpe
from trainer.data.tokenizer.tokenizer_files import tokenizer_file
from trainer.files.durable import replacing

from .reader import NEEDS, Pairs, read_texts

MADE = ("bytes", "bpe")
"""Tokenizers that are made for the pairs, rather than there already."""


def ensure_pairs(config: Config) -> tuple[DataConfig, list[str]]:
    """See `trainer.data.kinds.Kind.ensure`. A tokenizer that is made is a file under run.root/data, named after what it
    is made from; any number of processes may do so at once. Raises ConfigError as `Pairs`."""
    check_packaged(config, "pairs")
    data = at_hand(config)
    pairs = Pairs(data, config.train.seq_len, config.run.seed)
    if pairs.apart:
        open_pairs(config, "held_out")  # raises, if it cannot be read
    notes = [f"data.path={pairs.path}: {counted(len(pairs), 'pair')} to train on"]
    if pairs.left_out:
        notes.append(f"{counted(pairs.left_out, 'pair')} left out, without a source or a target")
    file = _tokenizer(config, pairs, notes)
    pairs.config = data.model_copy(update={"prepare": data.prepare.model_copy(update={"tokenizer": str(file)})})
    pairs.examples([0])  # a tokenizer that cannot be used shows here, not in the run's processes
    return pairs.config, notes


def _tokenizer(config: Config, pairs: Pairs, notes: list[str]) -> Path:
    """The file of `data.prepare.tokenizer`, made if it is to be. Raises ConfigError as `tokenizer_file`."""
    prepare, kind = pairs.config.prepare, pairs.config.prepare.tokenizer
    if kind not in MADE:
        return tokenizer_file(kind)
    file = _made_file(config, pairs)
    if not file.is_file():
        made = byte_tokenizer() if kind == "bytes" else train_bpe(pairs.texts(), prepare.vocab_size)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(file) as opened:
            opened.write(made.to_str().encode())
        notes.append(f"data.prepare.tokenizer={file}: made {'from the pairs' if kind == 'bpe' else 'of bytes'}")
    return file


def _made_file(config: Config, pairs: Pairs) -> Path:
    prepare, kind = pairs.config.prepare, pairs.config.prepare.tokenizer
    made_from = f"{pairs.sha256} {pairs.config.pairs} {prepare.vocab_size} {prepare.held_out} {prepare.seed}"
    name = "bytes" if kind == "bytes" else f"bpe-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}"
    return Path(config.run.root) / "data" / f"pairs-{name}" / TOKENIZER


def planned_tokenizer(config: Config) -> Path | None:
    """The tokenizer that `ensure_pairs` would make, which may not exist yet; None: it makes none. Raises ConfigError as
    `Pairs`."""
    if config.data.prepare.tokenizer not in MADE:
        return None
    return _made_file(config, Pairs(at_hand(config), config.train.seq_len, config.run.seed))


def open_pairs(config: Config, split: Split) -> Pairs | None:
    """See `trainer.data.kinds.Kind.open`."""
    return unless_empty(lambda: Pairs(at_hand(config), config.train.seq_len, config.run.seed, split), split)


def inputs_of_pairs(data: DataConfig) -> tuple[str, str, dict[str, Any]]:
    """(path, digest, profile), for a run's record."""
    path = sources_of(data)[0].path
    found = read_texts(files_of_splits(path, NEEDS)["train"], data.pairs)
    return path, found.sha256, {"pairs": len(found.source)}
