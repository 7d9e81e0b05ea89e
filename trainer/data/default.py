"""Makes sure that a config's data are prepared; `stdlib` is prepared on first use."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

from configs import Config, ConfigError
from configs.sections.data import DataConfig, LimitsConfig, PrepareConfig, Source

from .manifest import FORMAT, MANIFEST, Manifest, read_manifest, read_manifests, sources_of, without_held_out
from .prepare.meter import Meter
from .prepare.prepare import prepare, summary
from .tokenizer.tokenizer import TokenizerProcess
from .tokenizer.tokenizer_files import tokenizer_file


def ensure_prepared(
    config: Config, *, workers: int | None = None, progress: bool = True
) -> tuple[DataConfig, list[str]]:
    """Resolve `data.path` to prepared folders, preparing `stdlib` if it has not been.

    Any number of processes may call it at once: one prepares, the others wait.

    Returns:
        `config.data` with prepared folders in `path`, and lines that say what was prepared or chosen.

    Raises:
        ConfigError: a path is not prepared data (the message has the command that prepares it), tokenizers differ, or
            one does not match its manifest or cannot be used; or as `Dataset`.
    """
    notes: list[str] = []
    folders: list[Source] = []
    for source in sources_of(config.data):
        folder = Path(source.path)
        if source.path == "stdlib":
            folder = stdlib_folder(config.run.root, config.data.prepare)
            if not (folder / MANIFEST).is_file():
                manifest = prepare(["stdlib"], folder, config.data.prepare, workers=workers, progress=progress)
                notes += [
                    f"data.path={folder}: prepared from this Python's standard library",
                    *summary(manifest).splitlines(),
                ]
            else:
                notes.append(f"data.path={folder}: this Python's standard library, prepared before")
        elif os.path.exists(folder) and not os.path.isfile(folder / MANIFEST):
            raise ConfigError(
                f"data.path={source.path} is not prepared data (no {MANIFEST}).\nIf it holds raw text: "
                f"`muster data prepare {source.path} --out FOLDER`, then data.path=FOLDER"
            )
        _check_tokenizer(folder, read_manifest(folder), config.data.limits)
        folders.append(source.model_copy(update={"path": str(folder)}))
    path = folders[0].path if isinstance(config.data.path, str) else tuple(folders)
    data = config.data.model_copy(update={"path": path})
    from .read.reader import Dataset  # imports torch, which the checks above need not wait for

    Dataset(data, config.train.seq_len, config.run.seed)  # errors show here, not in the run's processes
    nothing = without_held_out(data)
    if len(nothing) < len(folders):
        Dataset(data, config.train.seq_len, config.run.seed, split="held_out")
    if nothing:
        what = "the run has no evaluation" if len(nothing) == len(folders) else "evaluation is on the other data only"
        notes.append(f"data.path={', '.join(nothing)} has no held-out data, so {what}")
        if progress:
            Meter.say(f"muster: {notes[-1]}")
    return data, notes


def _check_tokenizer(folder: Path, manifest: Manifest, limits: LimitsConfig) -> None:
    """Test the tokenizer of prepared data, once per machine: the run itself only uses it at its first evaluation."""
    info = manifest.tokenizer
    digest = hashlib.sha256((file := tokenizer_file(folder)).read_bytes()).hexdigest()
    if digest != info.sha256:
        raise ConfigError(
            f"{file} is not the tokenizer that {folder} was prepared with (its sha256 is {digest[:12]}…, the "
            f"manifest has {info.sha256[:12]}…): restore it, or prepare the data again"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "muster" / "tokenizers"
    tried = cache / hashlib.sha256(info.model_dump_json().encode()).hexdigest()
    if tried.exists():
        return
    with TokenizerProcess(folder, limits) as tokenizer:
        tokenizer.trial()
        found = tokenizer.vocab_size, tokenizer.token_to_id(info.eos_token)
    if found != (info.vocab_size, info.eos_id):
        raise ConfigError(
            f"{file} has {found[0]:,} tokens and {info.eos_token!r} as token {found[1]}, but {folder / MANIFEST} "
            f"has {info.vocab_size:,} and {info.eos_id}: prepare the data again"
        )
    with contextlib.suppress(OSError):  # without it the next run tests again
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        tried.touch()


def stdlib_folder(root: str | Path, config: PrepareConfig) -> Path:
    """Folder of the prepared standard library, named after its inputs, so that every Python version and every choice of
    settings has its own."""
    settings = hashlib.sha256(f"{FORMAT} {config.model_dump_json()}".encode()).hexdigest()[:8]
    kind = config.tokenizer if config.tokenizer in ("bytes", "bpe") else "file"
    size = f"-{config.vocab_size}" if kind == "bpe" else ""
    return Path(root) / "data" / f"stdlib-{platform.python_version()}-{kind}{size}-{settings}"


def vocabulary_size(data: DataConfig) -> int:
    """Vocabulary size of the tokenizer that all sources share. Raises ConfigError as `read_manifests`."""
    return read_manifests(data)[0].tokenizer.vocab_size
