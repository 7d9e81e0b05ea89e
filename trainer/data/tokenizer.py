"""Tokenizers as Hugging Face tokenizer.json: byte level, BPE trained on the data, or an existing one."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from configs import ConfigError

END_OF_TEXT = "<|endoftext|>"

# Qwen2's split (Hugging Face tokenization_qwen2.py): unlike GPT-2's it keeps a line end with what follows
# punctuation and indentation in one piece, which source code is full of, and writes numbers digit by digit.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<|im_end|>")


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b (0 to 255); 256 is the end of text."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return _plain(tokenizer)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens, the end of text (id 0) and all 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, or the one in a folder (prepared data, a Hugging Face model).

    Special tokens that stand in a text are encoded as the characters they are, so a text cannot end a document.

    Raises:
        ConfigError: no such file, or not a tokenizer.
    """
    file = tokenizer_file(path)
    try:
        return _plain(Tokenizer.from_file(str(file)))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"tokenizer {file} cannot be read ({reason}): give a Hugging Face tokenizer.json") from None


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that `path` names. Raises ConfigError when there is none."""
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"tokenizer {str(path)!r}: not `bytes`, `bpe` or an existing tokenizer.json")
    return file


def vocab_size(tokenizer: Tokenizer) -> int:
    """Largest token id + 1 (ids may have holes, so the count of tokens is not enough)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text(tokenizer: Tokenizer, path: str | Path) -> tuple[str, int]:
    """The token that ends a document and its id: `eos_token` of the tokenizer_config.json beside the file where
    there is one, else the first of the usual names.

    Raises:
        ConfigError: the tokenizer has none of them.
    """
    beside = tokenizer_file(path).with_name("tokenizer_config.json")
    names: tuple[str, ...] = _KNOWN_ENDS
    if beside.is_file():
        try:
            named = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError):
            named = None
        named = named.get("content") if isinstance(named, dict) else named
        names = (named, *names) if isinstance(named, str) else names
    for name in names:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return name, token
    raise ConfigError(
        f"tokenizer {path} has no end-of-text token: add {END_OF_TEXT} to it as a special token "
        "(or name its own as eos_token in a tokenizer_config.json beside it)"
    )


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, which the ByteLevel pre-tokenizer and decoder use."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
