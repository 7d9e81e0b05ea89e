"""Turn a batch of raw records into tokens of the two splits; `serve` is a worker process of `pool`."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np

from ..orphans import end_with
from .manifest import SPLITS, Split
from .sources import Record, Refusal, cut
from .tokenizer import open_tokenizer


@dataclass(frozen=True)
class EncodeSpec:
    """Everything a worker needs to know; small and picklable."""

    tokenizer: str
    """Path of tokenizer.json."""
    byte_level: bool
    eos_id: int
    dtype: str
    text_key: str
    held_out: float
    seed: int


@dataclass
class Encoded:
    """Tokens of one split's documents, each followed by the end of text, and what they were made from."""

    tokens: np.ndarray
    documents: int = 0
    bytes: int = 0
    characters: int = 0


@dataclass
class EncodedBatch:
    splits: dict[Split, Encoded]
    refused: list[Refusal] = field(default_factory=list)


def documents(records: list[Record | Refusal], text_key: str) -> Iterator[bytes | Refusal]:
    """Every document as UTF-8 text that is known to decode, or why it was left out."""
    for record in records:
        if isinstance(record, Refusal):
            yield record
            continue
        try:
            data = record.data if record.kind == "text" else _text_of(json.loads(record.data), text_key)
            if not data:
                raise _Refused("empty document")
            data.decode("utf-8")
            yield data
        except _Refused as error:
            yield Refusal(record.path, record.where, *error.args)
        except UnicodeError as error:
            yield Refusal(record.path, record.where, "bad UTF-8", " ".join(str(error).split()))
        except (ValueError, RecursionError) as error:
            yield Refusal(record.path, record.where, "malformed JSON", " ".join(str(error).split())[:200])


class _Refused(Exception):
    pass


def _text_of(value: object, text_key: str) -> bytes:
    if not isinstance(value, dict):
        raise _Refused("not a JSON object", f"a {type(value).__name__}")
    if text_key not in value:
        raise _Refused("missing key", f"no {text_key!r} among {', '.join(map(str, value))}"[:200])
    text = value[text_key]
    if not isinstance(text, str):
        raise _Refused("not text", f"{text_key!r} is {'null' if text is None else type(text).__name__}")
    return text.encode("utf-8")


def split_of(document: bytes, held_out: float, seed: int) -> Split:
    """The split of a document: a hash of (seed, its text), so equal documents never stand on both sides."""
    digest = hashlib.blake2b(document, digest_size=8, key=str(seed).encode()).digest()
    return "held_out" if int.from_bytes(digest, "big") < held_out * 2**64 else "train"


class Encoder:
    def __init__(self, spec: EncodeSpec):
        self.spec = spec
        self.tokenizer = open_tokenizer(spec.tokenizer)

    def __call__(self, records: list[Record | Refusal]) -> EncodedBatch:
        spec = self.spec
        parts: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        batch = EncodedBatch({split: Encoded(np.empty(0, spec.dtype)) for split in SPLITS})
        end = np.array([spec.eos_id], spec.dtype)
        for document in documents(records, spec.text_key):
            if isinstance(document, Refusal):
                batch.refused.append(document)
                continue
            split = split_of(document, spec.held_out, spec.seed)
            into = batch.splits[split]
            into.documents += 1
            into.bytes += len(document)
            for piece in cut(document):
                into.characters += len(text := piece.decode("utf-8"))
                parts[split].append(self.encode(text, piece))
            parts[split].append(end)
        for split, arrays in parts.items():
            if arrays:
                batch.splits[split].tokens = np.concatenate(arrays)
        return batch

    def encode(self, text: str, data: bytes) -> np.ndarray:
        """Tokens of one text (`data`: the same as UTF-8) without an end of text."""
        if self.spec.byte_level:  # what the tokenizer gives too, some hundred times faster
            return np.frombuffer(data, np.uint8).astype(self.spec.dtype)
        # The batch call with one text: no offsets are kept, and no threads are started beside the other workers.
        encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, self.spec.dtype)


def serve(descriptor: int, parent: int) -> None:
    """Answer batches that come over an inherited pipe until the other side closes it, or is gone."""
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    connection = Connection(descriptor)
    encoder = Encoder(connection.recv())
    while True:
        try:
            records = connection.recv()
        except EOFError:
            return
        connection.send(encoder(records))
