"""A config as a run will use it: all that is derived filled in, paths absolute, the data at hand. Without torch."""

from pathlib import Path
from typing import Any

from configs import Config, ConfigError, resolve
from trainer.data.default import ensure_prepared, vocabulary_size
from trainer.data.manifest import read_manifest, sources_of, vocabulary


def resolve_config(config: Config, *, prepare: bool = True) -> tuple[Config, list[str]]:
    """The config with every derived value filled in and every path absolute, and one line per derived value.

    Args:
        prepare: make the default data where they are missing; otherwise the vocabulary that they will have is assumed.

    Raises:
        ConfigError: the config cannot run.
    """
    run = config.run.model_copy(update={"root": str(Path(config.run.root).expanduser().resolve())})
    config = config.model_copy(update={"run": run, "plugins": tuple(_absolute(p) for p in config.plugins)})
    if isinstance(config.data.path, str):
        path: Any = _absolute_data(config.data.path)
    else:
        path = tuple(each.model_copy(update={"path": _absolute_data(each.path)}) for each in config.data.path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
    if source := config.train.init_from:
        if not Path(source).expanduser().is_dir():
            what = "a file: name its folder" if Path(source).expanduser().is_file() else "no such folder"
            raise ConfigError(f"train.init_from={source}: {what}")
        source = str(Path(source).expanduser().resolve())
        config = config.model_copy(update={"train": config.train.model_copy(update={"init_from": source})})
    planned = config.model.vocab_size or vocabulary(config.data)
    resolved, derived = resolve(config, vocab_size=planned)
    notes: list[str] = []
    if prepare:  # only now: a mistake in the config shows at once, not after minutes of preparation
        data, notes = ensure_prepared(config)
        config = config.model_copy(update={"data": data})
        resolved, derived = resolve(config, vocab_size=vocabulary_size(data))
    return resolved, notes + derived


def refuse_early(config: Config) -> None:
    """Raise ConfigError for what is seen to be wrong without torch, which takes seconds to import."""
    resolved, _ = resolve_config(config, prepare=False)
    for source in sources_of(resolved.data):
        if source.path != "stdlib" and not Path(source.path).exists():
            read_manifest(source.path)


def _absolute_data(path: str) -> str:
    return path if path == "stdlib" else str(Path(path).expanduser().resolve())


def _absolute(plugin: str) -> str:
    return str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin
