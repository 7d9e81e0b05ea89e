"""Makes the tokenizer of prepared data: byte-level, trained on a sample of the inputs, or an existing file."""

import hashlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from configs.sections.data import LimitsConfig, PrepareConfig
from trainer.data.manifest import TOKENIZER, TokenizerInfo
from trainer.data.prepare.encode import documents
from trainer.data.prepare.splitting import Splitting
from trainer.data.sources.find import Input
from trainer.data.sources.read import Reader, Refusal

from .tokenizer import TokenizerProcess, byte_tokenizer, train_bpe
from .tokenizer_files import copy_tokenizer, end_of_text, tokenizer_file

_PROBES = ("Hello World", "café Größe", "one  two\n\n\tthree\n")
"""Texts that uncased tokenizers, those that strip accents and those that split at whitespace do not restore."""


def make_tokenizer(
    files: list[Input],
    folder: Path,
    config: PrepareConfig,
    splitting: Splitting,
    reader: Reader,
    limits: LimitsConfig,
) -> tuple[TokenizerInfo, list[str]]:
    """Put the tokenizer.json that `config.tokenizer` asks for into `folder`, with the files that belong to it.

    Returns:
        Its entry in the manifest, and what a user should know of how it changes texts.

    Raises:
        ConfigError: an existing tokenizer cannot be read, exceeds the limits or has no end-of-text token.
    """
    path, doubts = folder / TOKENIZER, []
    if config.tokenizer in ("bytes", "bpe"):
        own = byte_tokenizer()
        if config.tokenizer == "bpe":
            own = train_bpe(_sample(files, config, splitting, reader), config.vocab_size)
        own.save(str(path))
        eos_token, eos_id = end_of_text(own.token_to_id, path)
        size = max(own.get_vocab(with_added_tokens=True).values()) + 1
    else:
        origin = tokenizer_file(config.tokenizer)
        with TokenizerProcess(origin, limits) as tokenizer:
            tokenizer.trial()
            eos_token, eos_id = end_of_text(tokenizer.token_to_id, origin)
            if losses := [pair for probe in _PROBES if (pair := tokenizer.lost(probe))]:
                doubts.append(changed(*losses[0]))
            copy_tokenizer(origin, folder)
            if tokenizer.dropout:
                doubts.append(
                    f"the tokenizer's BPE dropout of {tokenizer.dropout:g} is disabled: a text must have one encoding"
                )
                tokenizer.save(path)
        size = tokenizer.vocab_size
    info = TokenizerInfo(
        kind=config.tokenizer if config.tokenizer in ("bytes", "bpe") else "file",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        vocab_size=size,
        eos_id=eos_id,
        eos_token=eos_token,
    )
    return info, doubts


def changed(text: str, back: str) -> str:
    """The message about a tokenizer that changes text."""
    alike = unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", back)  # they look alike on a screen
    show = ascii if alike else repr
    return f"the tokenizer changes text: {show(text)} becomes {show(back)}"


def _sample(files: list[Input], config: PrepareConfig, splitting: Splitting, reader: Reader) -> Iterator[str]:
    """Training documents for the tokenizer: files in the order of a hash, from each its share of the cap (at least
    1 MiB, so that of many small files some are taken whole). The cap is the larger of 16 MiB and 2 KiB per token of the
    vocabulary."""
    cap = max(1 << 24, config.vocab_size << 11)
    total = max(sum(file.bytes for file in files), 1)
    order = sorted(range(len(files)), key=lambda i: hashlib.blake2b(f"{config.seed}/{i}".encode()).digest())
    taken = 0
    for index in order:
        budget = min(max(1 << 20, cap * files[index].bytes // total), cap - taken)
        for _, item in reader.read(files[index]):
            for document in documents([item], reader.text_key):
                if isinstance(document, Refusal):
                    continue
                for split, part in splitting(document):
                    if split == "train":
                        part = part[: 1 << 20]
                        yield part.decode("utf-8", errors="ignore")
                        budget -= len(part)
                        taken += len(part)
            if budget <= 0:
                break
        if taken >= cap:
            return
