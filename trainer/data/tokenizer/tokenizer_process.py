"""Runs a tokenizer.json where it can do no harm: `serve` is the child of `tokenizer.TokenizerProcess`.

It imports as little as possible, so that a process starts in 50 ms.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from configs.reading.parse import clip
from trainer.data.child import MIB, Bounds

ANSWER_BYTES = 16 * MIB
"""An answer may only be longer if its request was long."""
SHOWN = 24
"""Characters shown of a text that was changed."""


class TokenizerError(ValueError):
    """The library refused a file, a text or tokens, or panicked on them."""


@contextmanager
def library_errors() -> Iterator[None]:
    """Turn whatever tokenizers raises into TokenizerError: it raises bare Exception, and panics as a BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(clip(error, 200) or type(error).__name__) from None
        raise


def load(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json in this process, which is limited, or wrote the file itself. Raises TokenizerError."""
    return plain(_read(path))


def _read(path: str | Path) -> Tokenizer:
    with library_errors():
        return Tokenizer.from_buffer(Path(path).read_bytes())  # from_file only takes names that are UTF-8


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Disable truncation, padding and BPE dropout; encode names of special tokens in a text as plain characters."""
    if dropout(tokenizer):
        tokenizer.model.dropout = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def dropout(tokenizer: Tokenizer) -> float:
    """The BPE dropout rate: with it, a text would be encoded differently each time."""
    return getattr(tokenizer.model, "dropout", None) or 0.0


def unknown(tokenizer: Tokenizer) -> int | None:
    """The id of the unknown token; None: there is none."""
    if isinstance(tokenizer.model, models.Unigram):  # it does not expose it
        last = encode(tokenizer, "\U0010fffd")[-1:]  # a private-use character
        return last[0] if last and not str(tokenizer.id_to_token(last[0])).startswith("<0x") else None
    named = getattr(tokenizer.model, "unk_token", None)
    return tokenizer.token_to_id(named) if named is not None else None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text as in prepared data, prompts and samples: without special tokens around them.

    The batch call with one text computes no offsets, and starts no threads, which would compete with other processes.
    """
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def encode_on(tokenizer: Tokenizer, text: str, before: str) -> list[int]:
    """Tokens of a text that continues `before`: without the space that some tokenizers put before every text.

    It is encoded after a character whose own tokens do not change when the text follows, if there is one.
    """
    if not encode(tokenizer, before[-1:]):  # a separator without tokens, as a line end is to WordPiece
        return encode(tokenizer, text)
    for first in (before[-1:], "\n", "0", "."):
        head = encode(tokenizer, first)
        tokens = encode(tokenizer, first + text)
        if head and tokens[: len(head)] == head:
            return tokens[len(head) :]
    return encode(tokenizer, text)


def puts_blanks(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of two texts, concatenated, decode to something else than the two texts concatenated."""
    try:
        with library_errors():
            one, other, both = (encode(tokenizer, text) for text in ("a", "b", "ab"))
            return tokenizer.decode(one + other) != tokenizer.decode(both)
    except TokenizerError:  # failures on real texts are reported for each of them
        return False


def lost(tokenizer: Tokenizer, text: str) -> tuple[str, str] | None:
    """The first part of a text that decoding its tokens changes, and what it becomes; None: nothing changes.

    A leading space more or less is ignored, as many tokenizers add or drop one.
    """
    back = tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False)
    pairs = [(text, back)]
    pairs += [(text[1:], back)] if text.startswith(" ") else []
    pairs += [(text, back[1:])] if back.startswith(" ") else []
    if any(one == other for one, other in pairs):
        return None
    same, one, other = max((len(os.path.commonprefix(pair)), *pair) for pair in pairs)  # noqa: RUF071, of texts
    first = max(same - SHOWN // 2, 0)
    return one[first : first + SHOWN], other[first : first + SHOWN]


def serve(descriptor: int) -> None:
    """Answer requests that arrive over an inherited pipe until the other side closes it."""
    connection, bounds = Connection(descriptor), Bounds()
    tokenizer: Tokenizer | None = None
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        request = json.loads(data)
        if "memory" in request:
            bounds.memory(request["memory"])
        bounds.seconds(request["seconds"] + len(data) / MIB)
        try:
            with library_errors():
                if request["do"] == "load":
                    tokenizer = _read(*request["arguments"])
                    random = dropout(tokenizer)
                    plain(tokenizer)
                    ids = tokenizer.get_vocab(with_added_tokens=True).values()
                    answer: Any = [len(ids), max(ids, default=-1) + 1, random]
                else:
                    assert tokenizer is not None
                    answer = _call(tokenizer, request["do"], *request["arguments"])
                reply = json.dumps({"is": answer}).encode()
                if len(reply) > ANSWER_BYTES + 64 * len(data):
                    raise ValueError(f"{len(data):,} bytes become {len(reply):,}")
        except TokenizerError as error:
            reply = json.dumps({"error": str(error)}).encode()
        connection.send_bytes(reply)


def _call(tokenizer: Tokenizer, do: str, value: Any, skip_special_tokens: bool = False) -> Any:
    if do == "encode":
        return encode(tokenizer, value)
    if do == "decode":
        return tokenizer.decode(value, skip_special_tokens=skip_special_tokens)
    if do == "save":
        return tokenizer.save(value)
    if do == "lost":
        return lost(tokenizer, value)
    return getattr(tokenizer, do)(value)
