"""Checks the pairs of a run before it starts, and makes the tokenizer that encodes them."""

from pathlib import Path
from typing import Any

from configs import Config, counted
from configs.sections.data import DataConfig
from configs.sections.pairs import check_packaged
from trainer.data.bundled import at_hand
from trainer.data.manifest import Split, sources_of
from trainer.data.parquet_files import files_of_splits, unless_empty
from trainer.data.texts.prepared import MADE, made_file, with_tokenizer

from .reader import NEEDS, Pairs, read_texts


def ensure_pairs(config: Config) -> tuple[DataConfig, list[str]]:
    """See `trainer.data.kinds.Kind.ensure`. Raises ConfigError as `Pairs`."""
    check_packaged(config, "pairs")
    data = at_hand(config)
    pairs = Pairs(data, config.train.seq_len, config.run.seed)
    if pairs.apart:
        open_pairs(config, "held_out")  # raises, if it cannot be read
    notes = [f"data.path={pairs.path}: {counted(len(pairs), 'pair')} to train on"]
    if pairs.left_out:
        notes.append(f"{counted(pairs.left_out, 'pair')} left out, without a source or a target")
    pairs.config = with_tokenizer(config, pairs, "pairs", notes)
    pairs.examples([0])  # a tokenizer that cannot be used shows here, not in the run's processes
    return pairs.config, notes


def planned_tokenizer(config: Config) -> Path | None:
    """The tokenizer that `ensure_pairs` would make, which may not exist yet; None: it makes none. Raises ConfigError as
    `Pairs`."""
    if config.data.prepare.tokenizer not in MADE:
        return None
    return made_file(config, Pairs(at_hand(config), config.train.seq_len, config.run.seed), "pairs")


def open_pairs(config: Config, split: Split) -> Pairs | None:
    """See `trainer.data.kinds.Kind.open`."""
    return unless_empty(lambda: Pairs(at_hand(config), config.train.seq_len, config.run.seed, split), split)


def inputs_of_pairs(data: DataConfig) -> tuple[str, str, dict[str, Any]]:
    """(path, digest, profile), for a run's record."""
    path = sources_of(data)[0].path
    found = read_texts(files_of_splits(path, NEEDS)["train"], data.pairs)
    return path, found.sha256, {"pairs": len(found.source)}
