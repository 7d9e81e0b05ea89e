"""Make sure that the data a config names are prepared; `stdlib` is prepared at first use."""

import hashlib
import platform
from pathlib import Path

from configs import Config, ConfigError
from configs.data import DataConfig, PrepareConfig, Source

from .manifest import FORMAT, MANIFEST, read_manifest, read_manifests, sources_of
from .prepare import prepare, summary


def ensure_prepared(
    config: Config, *, workers: int | None = None, progress: bool = True
) -> tuple[DataConfig, list[str]]:
    """Resolve `data.path` to prepared folders, preparing `stdlib` where it has not been.

    Any number of processes may call it at once: one prepares, the others wait.

    Returns:
        `config.data` with prepared folders in `path`, and a line for each that was made or chosen.

    Raises:
        ConfigError: a path that is not prepared data (with the command that makes it), or tokenizers that differ.
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
        elif folder.exists() and not (folder / MANIFEST).is_file():
            raise ConfigError(
                f"data.path={source.path} is not prepared data (no {MANIFEST}).\nIf it holds raw text: "
                f"`muster data prepare {source.path} --out FOLDER`, then data.path=FOLDER"
            )
        read_manifest(folder)
        folders.append(source.model_copy(update={"path": str(folder)}))
    path = folders[0].path if isinstance(config.data.path, str) else tuple(folders)
    data = config.data.model_copy(update={"path": path})
    read_manifests(data)
    return data, notes


def stdlib_folder(root: str | Path, config: PrepareConfig) -> Path:
    """Where the prepared standard library stands: named by what it depends on, so that another Python or other
    settings get a folder of their own."""
    settings = hashlib.sha256(f"{FORMAT} {config.model_dump_json()}".encode()).hexdigest()[:8]
    kind = config.tokenizer if config.tokenizer in ("bytes", "bpe") else "file"
    size = f"-{config.vocab_size}" if kind == "bpe" else ""
    return Path(root) / "data" / f"stdlib-{platform.python_version()}-{kind}{size}-{settings}"


def vocabulary_size(data: DataConfig) -> int:
    """Vocabulary size of the one tokenizer of all sources. Raises ConfigError as `read_manifests`."""
    return read_manifests(data)[0].tokenizer.vocab_size
