"""Tokenizers as Hugging Face tokenizer.json: byte-level, a BPE trained on the data, or an existing one."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from configs import ConfigError
from configs.sections.data import LimitsConfig
from trainer.data.child import MIB, Child, ChildDied

from .tokenizer_files import END_OF_TEXT, tokenizer_file
from .tokenizer_process import plain

# Qwen2's split (Hugging Face tokenization_qwen2.py): unlike GPT-2's it keeps line ends together with the punctuation
# before them, and indentation in one piece, both frequent in source code, and splits numbers into digits.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TRIAL = "def f(x):\n    return 'für 数据 🙂', 3.14" + "a" * 64 + " " * 64 + "\n" * 8 + "!0" * 32
"""Words, and runs on which patterns with nested repetitions backtrack for ever."""


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose token b is byte b (0 to 255); 256 is the end-of-text token."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return plain(tokenizer)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens, including the end-of-text token (id 0) and all bytes."""
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
    return plain(tokenizer)


class TokenizerProcess:
    """A tokenizer.json in a child process: loading it and using it may hang, exhaust memory or panic.

    Names of special tokens in a text are encoded as plain characters, so a text cannot end a document. Use it as a
    context manager or call `close()`. Every method raises ConfigError if the tokenizer fails.

    Args:
        path: a tokenizer.json, or a folder with one (prepared data, a Hugging Face model).
        limits: on its memory and CPU time; for each MiB of the file 32 MiB and a second more.

    Raises:
        ConfigError: no such file, not a tokenizer, or one that exceeds the limits.
    """

    def __init__(self, path: str | Path, limits: LimitsConfig | None = None):
        limits = limits or LimitsConfig()
        self.file = tokenizer_file(path)
        self._limits = limits
        self._child = Child("trainer.data.tokenizer.tokenizer_process")
        size = self.file.stat().st_size
        bounds = {"memory": tokenizer_memory(limits, size), "seconds": limits.seconds + size / MIB}
        try:
            tokens, self.vocab_size, self.dropout = self._ask("load", str(self.file), **bounds)
            # Token counts and the embedding have a row for every id.
            if self.vocab_size > 4 * tokens + 1024:
                raise ConfigError(
                    f"tokenizer {self.file}: its {tokens:,} tokens have ids up to {self.vocab_size - 1:,}; number "
                    "them from 0 without large gaps"
                )
        except BaseException:
            self.close()
            raise

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as in prepared data: no special tokens around them."""
        return self._ask("encode", text)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._ask("decode", list(tokens), skip_special_tokens)

    def continued(self, prompt: str, tokens: Sequence[int], added: Sequence[int]) -> str:
        """A prompt and the tokens that a model has added to it, as one text.

        They are decoded together, as SentencePiece's decoders drop a leading space.
        """
        for text in (None, ".", "a", "\n"):  # invalid bytes right after the prompt can garble its last characters
            head = tokens if text is None else self.encode(text)
            before, whole = self.decode(head), self.decode([*head, *added])
            if whole.startswith(before):
                return prompt + whole[len(before) :]
        return prompt + self.decode(added)

    def lost(self, text: str) -> tuple[str, str] | None:
        """The first part of a text that decoding its tokens changes, and what it becomes; None: nothing changes."""
        found = self._ask("lost", text)
        return found and (found[0], found[1])

    def trial(self) -> None:
        """Encode and decode a short text, which reveals most faults."""
        self.decode(self.encode(_TRIAL))

    def save(self, path: Path) -> None:
        """Write it to a file as it is used here: without truncation, padding and BPE dropout."""
        self._ask("save", str(path))

    def token_to_id(self, token: str) -> int | None:
        return self._ask("token_to_id", token)

    def id_to_token(self, token: int) -> str | None:
        return self._ask("id_to_token", token)

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> "TokenizerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, do: str, *arguments: Any, **bounds: Any) -> Any:
        bounds = bounds or {"seconds": self._limits.seconds}
        try:
            answer = self._child.ask({"do": do, "arguments": arguments} | bounds)
        except ChildDied as error:
            answer = {"error": str(error)}
        if re.search(r"at line \d+ column \d+$", answer.get("error", "")):  # not JSON, or not a tokenizer's
            raise ConfigError(
                f"tokenizer {self.file} cannot be used ({answer['error']}): give a Hugging Face tokenizer.json"
            )
        if "error" in answer:
            raise ConfigError(
                f"tokenizer {self.file} cannot be used ({answer['error']}): give a Hugging Face tokenizer.json.\n"
                f"If it is one, raise data.limits.memory ({self._limits.memory}) or data.limits.seconds "
                f"({self._limits.seconds}); `muster data prepare` has --limit"
            )
        return answer["is"]


def tokenizer_memory(limits: LimitsConfig, size: int) -> int:
    """Bytes that a process may use for a tokenizer.json of `size` bytes. A BPE of 256,000 tokens took 16 per byte."""
    return limits.memory * MIB + 32 * size


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, which the ByteLevel pre-tokenizer and decoder use."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
