"""Reads token sequences at random: a sequence is a pure function of (seed, index)."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configs import ConfigError
from configs.sections.data import DataConfig
from models.batch import Batch
from models.loss import IGNORE
from trainer.data.manifest import TOKENIZER, Split, read_manifests, sources_of
from trainer.data.tokenizer.tokenizer import TokenizerProcess

from .order import BLOCK, EpochOrder, Interleave, Permutation, mix
from .shards import DataError, Shards


class Location(NamedTuple):
    """Location of a sequence: window `window` of `seq_len` tokens of a row group."""

    source: int
    epoch: int
    file: Path
    row_group: int
    window: int


class Dataset:
    """Sequences of prepared data, packed to full length.

    Window k of a row group takes tokens [k*T, k*T + T + 1): the inputs and, shifted by one, the labels. So an epoch
    uses every token of a row group as an input once, except its last, and as a label once, except its first. A short
    last window is padded, and the padding is not trained on.

    The training split goes on epoch after epoch, each in a different order (`order`), and mixes the sources by weight.
    The held-out split has one fixed order, whatever the seed: the windows of all sources are spread evenly, so that the
    first N are a fair sample. It ends at `len()`. Sources without held-out sequences are skipped.

    Not for several threads at once: give each its own.

    Args:
        config: with `path` resolved to prepared folders (`default.ensure_prepared`).
        seq_len: tokens per sequence, T.
        seed: of the training order.
        split: `train` or `held_out`.

    Raises:
        ConfigError: data that are not prepared, are damaged, have different tokenizers, or have no sequence at all.
    """

    def __init__(self, config: DataConfig, seq_len: int, seed: int, split: Split = "train"):
        self.config, self.seq_len, self.split = config, seq_len, split
        self.sources = sources_of(config)
        self.manifests = read_manifests(config)
        self.vocab_size = self.manifests[0].tokenizer.vocab_size
        self.eos_id = self.manifests[0].tokenizer.eos_id
        self.bad_pages: list[tuple[str, int]] = []
        """(file, row group) of each bad page skipped so far under `data.on_bad_page: skip`."""
        self.shards: list[Shards] = []
        self.orders: list[EpochOrder | None] = []
        """None for a source without held-out sequences."""
        for number, (source, manifest) in enumerate(zip(self.sources, self.manifests, strict=True)):
            tokens = manifest.prepare.row_group_tokens
            if seq_len > tokens:
                raise ConfigError(
                    f"train.seq_len ({seq_len}) is longer than the row groups of {source.path} ({tokens} tokens).\n"
                    f"Prepare the data again with "
                    f"data.prepare.row_group_tokens={1 << (4 * seq_len - 1).bit_length()}, "
                    "or lower train.seq_len"
                )
            shards = Shards(source.path, manifest, split, BLOCK + BLOCK // 8, config.limits)
            windows, last = self._windows(tokens), self._windows(shards.last_tokens)
            groups = shards.groups if last else shards.groups - 1  # a single token has no label
            if groups < 1 and split == "train":
                raise ConfigError(f"data.path={source.path} has fewer than two training tokens: prepare more text")
            self.shards.append(shards)
            order = EpochOrder(groups, windows, last or windows, mix(seed, number)) if groups > 0 else None
            self.orders.append(order)
        self._ends = list(accumulate(order.size if order else 0 for order in self.orders))
        if not self._ends[-1]:
            paths = ", ".join(source.path for source in self.sources)
            raise ConfigError(
                f"data.path={paths} has no held-out documents: prepare the data with a larger "
                "data.prepare.held_out or more text"
            )
        self._interleave = Interleave([source.weight for source in self.sources], mix(seed, "mixture"))
        self._fixed = Permutation(self._ends[-1], mix("held out"))

    def __len__(self) -> int:
        """Sequences in one pass over every source; training goes on after it."""
        return self._ends[-1]

    @property
    def sha256(self) -> str:
        """Identity of the data: a digest of every source's manifest, which holds the digests of its shards."""
        return hashlib.sha256("".join(manifest.sha256 for manifest in self.manifests).encode()).hexdigest()

    def locate(self, index: int) -> Location:
        """Location of sequence `index`. Raises IndexError past the end of the held-out split."""
        source, epoch, group, window = self._place(index)
        file, row_group = self.shards[source].locate(group)
        return Location(source, epoch, file, row_group, window)

    def sequence(self, index: int) -> dict[str, np.ndarray | None]:
        """One sequence.

        Args:
            index: number of the sequence in the run (the cursor counts them); -1: padding of weight zero.

        Returns:
            `input_ids`, `labels`, `position_ids`, int64 [T], and `document_ids`, int64 [T] or None, as in
            `models.batch.Batch`. Where documents are masked, an end-of-text token has no label: the next token belongs
            to another document.

        Raises:
            DataError: a bad page, unless `data.on_bad_page` is `skip`: then no label of the sequence is trained on.
            IndexError: past the end of the held-out split.
        """
        length = self.seq_len
        tokens = self._tokens(index)
        inputs = np.full(length, self.eos_id, np.int64)
        labels = np.full(length, IGNORE, np.int64)
        count = max(len(tokens) - 1, 0)
        inputs[:count], labels[:count] = tokens[:-1], tokens[1:]
        positions = np.arange(length, dtype=np.int64)
        if not self.config.document_mask:
            return {"input_ids": inputs, "labels": labels, "position_ids": positions, "document_ids": None}
        ends = inputs == self.eos_id
        labels[ends] = IGNORE
        starts = np.zeros(length, bool)
        starts[1:] = ends[:-1]
        starts[count:] = False  # all padding together is one more document
        starts[count : count + 1] = count > 0
        documents = np.cumsum(starts)
        positions -= np.maximum.accumulate(np.where(starts, positions, 0))
        return {"input_ids": inputs, "labels": labels, "position_ids": positions, "document_ids": documents}

    def examples(self, indices: Sequence[int]) -> Batch:
        """Sequences stacked, [B, T]; -1 stands for a sequence of padding."""
        rows = [self.sequence(index) for index in indices]

        def stack(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([row[name] for row in rows]))  # type: ignore[misc]

        return Batch(
            input_ids=stack("input_ids"),
            labels=stack("labels"),
            position_ids=stack("position_ids"),
            document_ids=stack("document_ids") if self.config.document_mask else None,
            sequence_ids=torch.tensor(indices, dtype=torch.int64),
        )

    def _tokens(self, index: int) -> np.ndarray:
        if index == -1:
            return np.empty(0, np.int64)
        source, _, group, window = self._place(index)
        try:
            tokens = self.shards[source].tokens(group)
        except DataError as error:
            if self.config.on_bad_page == "stop" or not error.damaged:
                raise
            if (page := (str(error.file), error.row_group)) not in self.bad_pages:
                self.bad_pages.append(page)
            return np.empty(0, np.int64)
        return tokens[window * self.seq_len : (window + 1) * self.seq_len + 1]

    def _place(self, index: int) -> tuple[int, int, int, int]:
        if index < 0:
            raise IndexError(f"sequence {index}: indices start at 0")
        if self.split == "train":
            source, index = self._interleave(index)
            order = self.orders[source]
            assert order
            return source, *order(index)
        if index >= len(self):
            raise IndexError(f"sequence {index} of a held-out split of {len(self)} sequences")
        spread = self._fixed(index)
        source = bisect_right(self._ends, spread)
        spread -= self._ends[source - 1] if source else 0
        order = self.orders[source]
        assert order
        return source, 0, *divmod(spread, order.windows)

    def _windows(self, tokens: int) -> int:
        return -(-(tokens - 1) // self.seq_len) if tokens > 1 else 0


def load_tokenizer(data: DataConfig) -> TokenizerProcess:
    """The tokenizer that all sources share, in a process of its own. Raises ConfigError as TokenizerProcess."""
    return TokenizerProcess(Path(sources_of(data)[0].path) / TOKENIZER, data.limits)
