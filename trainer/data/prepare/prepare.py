"""Prepares training data: from raw files to tokenized Parquet shards with a manifest."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Literal

from filelock import Timeout

from configs import ConfigError, counted
from configs.sections.data import LimitsConfig, PrepareConfig
from trainer.data.manifest import (
    MANIFEST,
    REFUSED,
    SPLITS,
    TOKENIZER,
    Manifest,
    read_manifest,
    write_manifest,
)
from trainer.data.sources.find import Input, find_inputs, is_marker, linked_folders
from trainer.data.sources.parquet import RECORD_WEIGHT
from trainer.data.sources.read import Reader, Record, Refusal
from trainer.data.tokenizer.make import changed, make_tokenizer
from trainer.data.tokenizer.tokenizer import tokenizer_memory
from trainer.data.tokenizer.tokenizer_files import beside, tokenizer_file
from trainer.files.durable import fsync
from trainer.files.lock_file import lock_file

from .encode import EncodeSpec, Losses, documents
from .meter import Meter
from .pool import Records, default_workers, encode_all
from .shard_writer import SplitWriter
from .splitting import Splitting, split_of_few

BATCH_BYTES = 1 << 20
"""Raw bytes that a worker encodes at once."""


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    limits: LimitsConfig | None = None,
    text_key: str = "text",
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenize raw files into a folder of Parquet shards.

    The result depends only on the inputs and the config, not on the number of workers. It is built beside `out` and
    renamed at the end, so a killed preparation leaves no folder that looks complete. If another process is preparing
    the same `out`, this one waits for it. Called again with unchanged inputs, it does nothing.

    Args:
        inputs: files, folders, glob patterns or `stdlib`, see `sources.find_inputs`.
        out: folder to create; must not exist, be empty, or hold an earlier preparation of the same inputs.
        config: tokenizer, held-out share, seed.
        limits: resources that a file or record may use; one that needs more is refused.
        text_key: key of a JSONL object or column of a Parquet file that holds the text.
        workers: processes that tokenize; None: one per CPU.
        strict: make the first refused file or document an error instead of counting it.
        progress: report to stderr, as a bar on a terminal, otherwise a line now and then.

    Raises:
        ConfigError: nothing to read, nothing usable, a bad tokenizer, an `out` that is taken, or (strict) a refusal.
    """
    config, limits = config or PrepareConfig(), limits or LimitsConfig()
    files = find_inputs(inputs)  # before anything is created: a mistyped path leaves nothing behind
    out = _folder_to_make(out)
    with _locked(out):
        fingerprint = _fingerprint(files, config, limits, text_key)
        if (out / MANIFEST).exists():
            return _unchanged(out, read_manifest(out), fingerprint, config, text_key, progress)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out}: exists but is not prepared data; choose a new folder")
        if progress and (links := linked_folders(files, inputs)):
            more = f" and {len(links) - 5} more" if len(links) > 5 else ""
            Meter.say(f"following links to folders: {', '.join(links[:5])}{more}")
        part = out.with_name(f".{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        try:
            build = partial(
                _build, files, part, config, limits, text_key, workers or default_workers(), strict, progress
            )
            manifest = build(Splitting(config.held_out, config.seed))
            if config.held_out and not all(manifest.splits[split].documents for split in SPLITS):
                splitting = split_of_few(_documents(files, limits, text_key), config.held_out, config.seed)
                if progress:
                    Meter.say(str(splitting))
                shutil.rmtree(part)
                part.mkdir(mode=0o700)
                manifest = build(splitting)
            names = [os.fsencode(str(given)).decode("utf-8", errors="replace") for given in inputs]
            manifest = manifest.model_copy(update={"fingerprint": fingerprint, "inputs": names})
            write_manifest(part, manifest)
            os.rename(part, out)
            fsync(out.parent)
            return manifest
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _folder_to_make(out: str | Path) -> Path:
    """The path of `out`, whose parent is created. Raises ConfigError if no folder can be created there."""
    try:
        if not str(out) or not os.path.basename(os.path.normpath(out)).strip("."):
            raise ConfigError(f"--out {str(out)!r} cannot be the name of a folder")
        str(out).encode()
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        _lock_of(path).touch()
    except UnicodeError:
        raise ConfigError("--out: the path is not UTF-8, so no config could refer to it; choose another") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {out} cannot be created ({why}): choose a folder where you can write") from None
    return path


def _build(
    files: list[Input],
    part: Path,
    config: PrepareConfig,
    limits: LimitsConfig,
    text_key: str,
    workers: int,
    strict: bool,
    progress: bool,
    splitting: Splitting,
) -> Manifest:
    """Write everything but the manifest into `part`; the caller fills in its `inputs` and `fingerprint`."""
    total = sum(file.bytes for file in files)
    reasons: Counter[str] = Counter()
    first: Refusal | None = None
    with ExitStack() as stack:
        meter = stack.enter_context(Meter(total, progress))
        meter.describe("make the tokenizer")
        reader = stack.enter_context(Reader(text_key, limits))
        info, doubts = make_tokenizer(files, part, config, splitting, reader, limits)
        dtype: Literal["uint16", "uint32"] = "uint16" if info.vocab_size <= 1 << 16 else "uint32"
        spec = EncodeSpec(
            tokenizer=str(part / TOKENIZER),
            byte_level=config.tokenizer == "bytes",
            eos_id=info.eos_id,
            eos_token=info.eos_token,
            vocab_size=info.vocab_size,
            dtype=dtype,
            text_key=text_key,
            splitting=splitting,
            memory=tokenizer_memory(limits, (part / TOKENIZER).stat().st_size),
            seconds=limits.seconds,
            foreign=info.kind == "file",
        )
        losses = Losses()
        writers = {split: SplitWriter(part, split, dtype, config.row_group_tokens, info.vocab_size) for split in SPLITS}
        meter.describe("tokenize")
        refused = stack.enter_context(open(part / REFUSED, "w", encoding="utf-8", errors="backslashreplace"))
        # A single worker gains nothing, so with a tokenizer of our own, which is safe in this process, there is none.
        workers = 0 if workers <= 1 and info.kind != "file" else workers
        batches = encode_all(_batches(files, reader, meter), spec, workers)
        stack.callback(batches.close)  # after an error too, before the tokenizer's file is removed
        for batch in batches:
            losses.add(batch.losses)
            for refusal in batch.refused:
                if strict and not (refusal.reason == "not data" and is_marker(refusal.path)):
                    raise ConfigError(f"--strict: {refusal}")
                reasons[refusal.reason] += 1
                first = first or refusal
                refused.write(json.dumps(refusal._asdict(), ensure_ascii=False) + "\n")
            for split, encoded in batch.splits.items():
                writers[split].add(encoded)
                meter.tokens += len(encoded.tokens)
        refused.flush()
        os.fsync(refused.fileno())
    shards = [shard for split in SPLITS for shard in writers[split].close()]
    splits = {split: writers[split].stats() for split in SPLITS}
    if not any(split.documents for split in splits.values()):
        if not first:
            raise ConfigError(
                f"no text in {counted(len(files), 'file')}: {'it is' if len(files) == 1 else 'all are'} blank"
            )
        named = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
        raise ConfigError(f"no usable document in {counted(len(files), 'file')} ({named}).\nThe first: {first}")
    if losses.lossy:
        file, *pair = losses.example
        name = os.fsencode(file).decode("utf-8", errors="replace")
        doubts.append(
            f"{changed(*pair)} in {name}; so are {losses.lossy:,} of {losses.looked_at:,} documents that were checked"
        )
    if losses.unknown:
        all_tokens = sum(split.tokens for split in splits.values())
        doubts.append(
            f"{losses.unknown:,} of {all_tokens:,} tokens are {losses.unknown_token!r}: text that the tokenizer has no "
            "token for is lost"
        )
    return Manifest(
        fingerprint="",
        inputs=[],
        input_files=len(files),
        input_bytes=total,
        text_key=text_key,
        prepare=config,
        tokenizer=info,
        dtype=dtype,
        splits=splits,
        shards=shards,
        refused=dict(sorted(reasons.items())),
        doubts=doubts,
    )


def _documents(files: list[Input], limits: LimitsConfig, text_key: str) -> Iterator[bytes]:
    with Reader(text_key, limits) as reader:
        for file in files:
            for _, item in reader.read(file):
                yield from (each for each in documents([item], text_key) if isinstance(each, bytes))


def _batches(files: list[Input], reader: Reader, meter: Meter) -> Iterator[Records]:
    batch: Records = []
    size = done = 0
    for file in files:
        for position, item in reader.read(file):
            batch.append(item)
            # A refusal counts too, so that progress is reported in a file of nothing else.
            size += RECORD_WEIGHT + (len(item.data) if isinstance(item, Record) else 0)
            if size >= BATCH_BYTES:
                meter.update(done + position)
                yield batch
                batch, size = [], 0
        done += file.bytes
    meter.update(done)
    if batch:
        yield batch


def _fingerprint(files: list[Input], config: PrepareConfig, limits: LimitsConfig, text_key: str) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((os.path.abspath(file.path), *file[1:])).encode("utf-8", "surrogateescape"))
    digest.update(_settings(config, text_key).encode())
    if limits != LimitsConfig():  # other limits may refuse other files
        digest.update(limits.model_dump_json().encode())
    return digest.hexdigest()


def _settings(config: PrepareConfig, text_key: str) -> str:
    tree = config.model_dump(mode="json")
    if config.tokenizer not in ("bytes", "bpe"):
        file = tokenizer_file(config.tokenizer)
        tree["tokenizer"] = hashlib.sha256(file.read_bytes()).hexdigest()
        # They name the end-of-text token, and are kept with the data.
        tree |= {name: hashlib.sha256(content).hexdigest() for name, content in beside(file).items()}
    return json.dumps([text_key, tree], sort_keys=True)


def _unchanged(
    out: Path, manifest: Manifest, fingerprint: str, config: PrepareConfig, text_key: str, progress: bool
) -> Manifest:
    if manifest.fingerprint == fingerprint:
        if progress:
            Meter.say(f"{out} is already prepared from these inputs: nothing to do")
        return manifest
    before, now = manifest.prepare.model_dump(), config.model_dump()
    changed = [f"{key} {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]]
    if manifest.text_key != text_key:
        changed.append(f"text_key {manifest.text_key!r} -> {text_key!r}")
    unseen = "files, or the tokenizer, were added, removed or modified since, or the limits changed"
    raise ConfigError(
        f"--out {out} is already prepared from other inputs or settings ({', '.join(changed) or unseen}).\n"
        "Choose another folder, or remove it if no run uses it"
    )


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output folder; it is released when the process ends, however that happens."""
    path = _lock_of(out)
    lock = lock_file(path)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        Meter.say(f"waiting for another process that is preparing {out}")
        held = lock.acquire()
    with held:
        try:
            yield
        finally:
            # A process that waits for it then takes a new one: filelock does not hold a file that was removed.
            path.unlink(missing_ok=True)


def refusals(reason: str, count: int) -> str:
    """A reason with its count: `2 empty files`, `3 invalid UTF-8`."""
    return (
        counted(count, reason) if reason.endswith((" file", " document", " key", " column")) else f"{count:,} {reason}"
    )


def summary(manifest: Manifest) -> str:
    """What was prepared and what was left out, as text."""
    lines = [
        f"{counted(manifest.input_files, 'file')}, {counted(manifest.input_bytes, 'byte')}; "
        f"tokenizer {manifest.tokenizer.kind}, {counted(manifest.tokenizer.vocab_size, 'token')}, "
        f"{manifest.tokenizer.eos_token!r} ends a document"
    ]
    for split, stats in manifest.splits.items():
        if not stats.documents:
            continue
        ratio = stats.bytes / max(stats.tokens, 1)
        lines.append(
            f"{split}: {counted(stats.documents, 'document')}, {counted(stats.tokens, 'token')} ({ratio:.2f} "
            f"bytes each), "
            f"unigram entropy {stats.entropy:.3f} nats, {counted(len(manifest.of(split)), 'shard')}"
        )
    if not manifest.splits["held_out"].documents:
        lines.append("nothing is held out: a run on these data alone has no evaluation")
    if manifest.refused:
        reasons = ", ".join(starmap(refusals, manifest.refused.items()))
        lines.append(f"rejected: {reasons} (each is named in {REFUSED})")
    lines += manifest.doubts
    return "\n".join(lines)
