"""Make the tokenizer of a preparation: byte level, trained on a sample of the inputs, or an existing file."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from configs.data import PrepareConfig

from .encode import documents, split_of
from .manifest import TOKENIZER, TokenizerInfo
from .sources import Input, Refusal, read
from .tokenizer import byte_tokenizer, end_of_text, open_tokenizer, tokenizer_file, train_bpe, vocab_size


def make_tokenizer(files: list[Input], folder: Path, config: PrepareConfig, text_key: str) -> TokenizerInfo:
    """Put the tokenizer.json that `config.tokenizer` asks for into `folder`.

    Raises:
        ConfigError: an existing tokenizer that cannot be read or has no end of text.
    """
    path = origin = folder / TOKENIZER
    if config.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
        tokenizer.save(str(path))
    elif config.tokenizer == "bpe":
        tokenizer = train_bpe(_sample(files, config, text_key), config.vocab_size)
        tokenizer.save(str(path))
    else:
        origin = tokenizer_file(config.tokenizer)
        tokenizer = open_tokenizer(origin)
        shutil.copyfile(origin, path)
    eos_token, eos_id = end_of_text(tokenizer, origin)
    return TokenizerInfo(
        kind=config.tokenizer if config.tokenizer in ("bytes", "bpe") else "file",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        vocab_size=vocab_size(tokenizer),
        eos_id=eos_id,
        eos_token=eos_token,
    )


def _sample(files: list[Input], config: PrepareConfig, text_key: str) -> Iterator[str]:
    """Training documents for the tokenizer: files in an order drawn by hash, from each its share of the cap (at least
    1 MiB, so that of many small files some are taken whole). The cap is 16 MiB, or 2 KiB per token of the vocabulary
    where that is more."""
    cap = max(1 << 24, config.vocab_size << 11)
    total = max(sum(file.bytes for file in files), 1)
    order = sorted(range(len(files)), key=lambda i: hashlib.blake2b(f"{config.seed}/{i}".encode()).digest())
    taken = 0
    for index in order:
        budget = min(max(1 << 20, cap * files[index].bytes // total), cap - taken)
        for _, item in read(files[index], text_key):
            for document in documents([item], text_key):
                if isinstance(document, Refusal) or split_of(document, config.held_out, config.seed) != "train":
                    continue
                document = document[: 1 << 20]
                yield document.decode("utf-8", errors="ignore")
                budget -= len(document)
                taken += len(document)
            if budget <= 0:
                break
        if taken >= cap:
            return
