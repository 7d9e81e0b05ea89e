"""Turns a batch of raw records into tokens of the two splits; `serve` is a worker process of `pool`."""

import json
import mmap
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from multiprocessing.connection import Connection

import numpy as np

from configs.reading.parse import clip
from trainer.data.child import MIB, Bounds
from trainer.data.manifest import SPLITS, Split
from trainer.data.sources.damage import Damaged
from trainer.data.sources.formats import BETWEEN, RECORD_VALUES, text_in
from trainer.data.sources.read import Record, Refusal, cut
from trainer.data.tokenizer.tokenizer_process import (
    TokenizerError,
    encode,
    encode_on,
    library_errors,
    load,
    lost,
    puts_blanks,
    unknown,
)

from .splitting import Splitting

LOOKED_AT = 32
"""Documents of a batch that are decoded again, to see what the tokenizer loses: at most 3% of a MiB."""
LOOKED_AT_BYTES = 512
"""Of each, from its beginning and from a place chosen by its hash."""
_BETWEEN = BETWEEN.decode() + ",\0"
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


@dataclass(frozen=True)
class EncodeSpec:
    """Everything a worker needs to know; small and picklable."""

    tokenizer: str
    """Path of tokenizer.json."""
    byte_level: bool
    eos_id: int
    vocab_size: int
    dtype: str
    text_key: str
    splitting: Splitting
    memory: int
    """Bytes that a process may use for the tokenizer and a MiB of text; more for more text."""
    seconds: int
    """CPU seconds, likewise."""
    foreign: bool = False
    """An existing tokenizer, which may lose text, or find its end-of-text token in a text that contains its name."""
    eos_token: str = ""


@dataclass
class Encoded:
    """Tokens of one split's documents, each followed by the end-of-text token, and the size of the text."""

    tokens: np.ndarray
    documents: int = 0
    bytes: int = 0
    characters: int = 0


@dataclass
class Losses:
    """How many of the documents checked are not restored by decoding their tokens, and how many of all tokens are the
    unknown token."""

    looked_at: int = 0
    lossy: int = 0
    example: list[str] = field(default_factory=list)
    """File, text, and the text that its tokens decode to."""
    unknown: int = 0
    unknown_token: str = ""

    def add(self, other: "Losses") -> None:
        self.looked_at += other.looked_at
        self.lossy += other.lossy
        self.example = self.example or other.example
        self.unknown += other.unknown
        self.unknown_token = self.unknown_token or other.unknown_token


@dataclass
class EncodedBatch:
    splits: dict[Split, Encoded]
    refused: list[Refusal] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)


def documents(records: list[Record | Refusal], text_key: str) -> Iterator[bytes | Refusal]:
    """Every document as valid UTF-8 text, or the reason why it was rejected."""
    for record in records:
        if isinstance(record, Refusal):
            yield record
            continue
        try:
            data = (
                record.data
                if record.kind == "text"
                else text_in(_parsed(record.data, text_key), text_key).encode("utf-8")
            )
            if not data:
                raise Damaged("empty document", "")
            data.decode("utf-8")
            yield data
        except Damaged as error:
            yield Refusal(record.path, record.where, *error.args)
        except UnicodeError as error:
            yield Refusal(record.path, record.where, "invalid UTF-8", clip(error, 200))
        except (ValueError, RecursionError) as error:
            yield Refusal(record.path, record.where, "malformed JSON", clip(error, 200))
        except MemoryError:
            yield Refusal(record.path, record.where, "takes too much memory", f"{len(record.data):,} bytes")


def _parsed(data: bytes, text_key: str) -> object:
    if len(data) > RECORD_VALUES:  # a shorter one cannot have so many
        bare = _STRING.sub(b"", data)
        if (values := bare.count(b",") + bare.count(b"[") + bare.count(b"{")) > RECORD_VALUES:
            raise Damaged("too many values", f"{values:,} in one JSON object")
    # Not json.loads(data), which would guess an encoding.
    text = data.decode("utf-8-sig")
    twice = any(data.count(part) > 1 for part in _quoted(text_key))
    hook = partial(_object, text_key.split(".")) if twice else None
    try:
        return json.loads(text, object_pairs_hook=hook)
    except ValueError:
        # Only if that fails: separators and commas between values (RFC 7464), NULs after the last; a number of
        # thousands of digits beside the text.
        return json.loads(text.strip(_BETWEEN), object_pairs_hook=hook, parse_int=_integer)


@cache
def _quoted(text_key: str) -> list[bytes]:
    """A key, and each key on the path to it, as written in JSON."""
    return [b'"%b"' % part.encode("utf-8", "surrogateescape") for part in {text_key, *text_key.split(".")}]


def _object(keys: list[str], pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Parse an object. Raises Damaged if a key on the path to the text appears twice in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        for key in (*keys, ".".join(keys)):
            if names.count(key) > 1:
                raise Damaged("ambiguous key", f"{key!r} appears {names.count(key)} times in one object")
    return found


def _integer(digits: str) -> float | int:
    return int(digits) if len(digits) < 4000 else float("inf")


class Encoder:
    def __init__(self, spec: EncodeSpec):
        self.spec = spec
        self.tokenizer = load(spec.tokenizer)
        self._puts_blanks = spec.foreign and puts_blanks(self.tokenizer)
        self._unknown = None
        if spec.foreign:
            with library_errors():
                self._unknown = unknown(self.tokenizer)

    def __call__(
        self, records: list[Record | Refusal], began: Callable[[int], None] = lambda index: None
    ) -> EncodedBatch:
        """Encode the records. `began` is called with the number of each before it is encoded."""
        spec = self.spec
        parts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        batch = EncodedBatch({split: Encoded(np.empty(0, spec.dtype)) for split in SPLITS})
        end = np.array([spec.eos_id], spec.dtype)
        for index, record in enumerate(records):
            began(index)
            [document] = documents([record], spec.text_key)
            if isinstance(document, Refusal):
                batch.refused.append(document)
                continue
            if spec.foreign and batch.losses.looked_at < LOOKED_AT:
                self._look(document, record.path, batch.losses)
            for split, part in spec.splitting(document):
                try:
                    encoded, characters = self.encode(part)
                except TokenizerError as error:
                    batch.refused.append(Refusal(record.path, record.where, "cannot be tokenized", str(error)))
                    continue
                into = batch.splits[split]
                into.documents += 1
                into.bytes += len(part)
                into.characters += characters
                parts[split] += [*encoded, end]
        for split, arrays in parts.items():
            if arrays:
                batch.splits[split].tokens = np.concatenate(arrays)
        if self._unknown not in (None, spec.eos_id):
            of_them = sum(int(np.count_nonzero(part.tokens == self._unknown)) for part in batch.splits.values())
            if of_them:
                batch.losses.add(Losses(unknown=of_them, unknown_token=self.tokenizer.id_to_token(self._unknown) or ""))
        return batch

    def encode(self, document: bytes) -> tuple[list[np.ndarray], int]:
        """Tokens of a document, in pieces and without the end-of-text token, and its number of characters."""
        pieces, characters, before = [], 0, ""
        for piece in cut(document):
            characters += len(text := piece.decode("utf-8"))
            if self.spec.byte_level:  # the same as the tokenizer gives, some hundred times faster
                pieces.append(np.frombuffer(piece, np.uint8).astype(self.spec.dtype))
                continue
            with library_errors():
                tokens = np.array(self._encode([text], before), np.uint32)
                if self.spec.foreign and (tokens == self.spec.eos_id).any():
                    tokens = np.array(self._encode(cut_inside(text, self.spec.eos_token), before), np.uint32)
                    if (tokens == self.spec.eos_id).any():
                        raise TokenizerError("it returns the end-of-text token inside a text")
            before = text
            if len(tokens) and (largest := int(tokens.max())) >= self.spec.vocab_size:
                raise TokenizerError(f"it returns token {largest:,}, which is not in its vocabulary")
            pieces.append(tokens.astype(self.spec.dtype))
        return pieces, characters

    def _encode(self, texts: list[str], before: str) -> list[int]:
        """Tokens of texts that together continue `before`."""
        tokens: list[int] = []
        for text in texts:
            goes_on = before and self._puts_blanks
            tokens += encode_on(self.tokenizer, text, before) if goes_on else encode(self.tokenizer, text)
            before = text
        return tokens

    def _look(self, document: bytes, path: str, losses: Losses) -> None:
        try:
            with library_errors():
                found = next((pair for text in _windows(document) if (pair := lost(self.tokenizer, text))), None)
        except TokenizerError:
            return  # it was encoded; that a part of it cannot be decoded does not matter here
        losses.add(Losses(1, 1, [path, *found]) if found else Losses(1))


def _windows(document: bytes) -> Iterator[str]:
    """The beginning of a document, and a part of the rest chosen by its hash: all of the rest if it is short."""
    yield document[:LOOKED_AT_BYTES].decode("utf-8", errors="ignore")
    if len(document) > LOOKED_AT_BYTES:
        start = LOOKED_AT_BYTES + zlib.crc32(document) % max(len(document) - 2 * LOOKED_AT_BYTES, 1)
        # From the start of a word: tokenizers differ in how they treat leading spaces.
        yield document[start : start + LOOKED_AT_BYTES].decode("utf-8", errors="ignore").lstrip()


def cut_inside(text: str, name: str) -> list[str]:
    """A text cut after the first character of each `name` in it, so that no part contains the name."""
    parts = text.split(name)
    last = len(parts) - 1
    return [name[1:] * (i > 0) + part + name[:1] * (i < last) for i, part in enumerate(parts)]


def serve(descriptor: int, progress: int) -> None:
    """Encode batches that arrive over an inherited pipe until the other side closes it.

    Args:
        progress: a file of 8 bytes with the number of the current record, to be read if this process dies.
    """
    connection, bounds = Connection(descriptor), Bounds()
    spec: EncodeSpec = connection.recv()
    at = memoryview(mmap.mmap(progress, 8)).cast("q")
    bounds.memory(spec.memory)
    bounds.seconds(spec.seconds + spec.memory / MIB / 32)  # whose memory grows with the tokenizer's size
    encoder = Encoder(spec)
    while True:
        at[0] = -1
        bounds.memory(spec.memory + (1 << 30))
        try:
            records = connection.recv()
        except EOFError:
            return
        size = sum(len(record.data) for record in records if isinstance(record, Record))
        # JSON of mostly four-byte characters takes 10 times its size, the tokens of a piece less.
        bounds.memory(spec.memory + 16 * size)
        bounds.seconds(spec.seconds + 30 * size / MIB)
        batch = encoder(records, lambda index: at.__setitem__(0, index))
        header = {split: [part.documents, part.bytes, part.characters] for split, part in batch.splits.items()}
        connection.send_bytes(json.dumps([header, batch.refused, asdict(batch.losses)]).encode())
        for split in SPLITS:
            connection.send_bytes(batch.splits[split].tokens.data)


def receive(connection: Connection, dtype: str) -> EncodedBatch:
    """Receive the answer of `serve` to a batch. Raises EOFError or OSError if it has died."""
    header, refused, losses = json.loads(connection.recv_bytes())
    splits = {split: Encoded(np.frombuffer(connection.recv_bytes(), dtype), *header[split]) for split in SPLITS}
    return EncodedBatch(splits, [Refusal(*each) for each in refused], Losses(**losses))
