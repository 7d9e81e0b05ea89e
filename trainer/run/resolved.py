"""A config as a run will use it: derived values filled in, paths absolute, data prepared. Without torch."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs import Config, ConfigError, from_dict, resolve
from configs.reading.parse import is_file
from configs.sections.data import PACKAGED
from configs.sections.pairs import TASK_ENDS, ends_of, in_both, one_by_one
from models.hf.config_json import model_keys
from trainer.checkpoint.manifest import committed
from trainer.data.manifest import planned_vocabulary, read_manifest, sources_of


def resolve_config(config: Config, *, prepare: bool = True) -> tuple[Config, list[str]]:
    """The config with every derived value filled in and every path absolute, and one line per derived value.

    Args:
        prepare: check the data, and prepare the default ones if missing; if False, their later vocabulary is assumed.

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
        begun = committed(Path(run.root) / run.name)  # such a run has its own weights, and needs their source no more
        if not begun and not Path(source).expanduser().is_dir():
            what = "a file: give its folder" if Path(source).expanduser().is_file() else "no such folder"
            raise ConfigError(f"train.init_from={source}: {what}")
        source = str(Path(source).expanduser().resolve())
        config = config.model_copy(update={"train": config.train.model_copy(update={"init_from": source})})
    planned = getattr(config.model, "vocab_size", None) or planned_vocabulary(config)
    resolved, derived = resolve(config, vocab_size=planned)
    notes: list[str] = []
    if prepare:  # only now: a mistake in the config shows at once, not after minutes of preparation
        from trainer.data.kinds import kind_of  # imports torch, which a mistake in the config need not wait for

        data, notes = kind_of(config).ensure(config)
        config = config.model_copy(update={"data": data})
        resolved, derived = resolve(config, vocab_size=planned_vocabulary(config))
    return resolved, notes + derived


def check_fork(run_dir: Path, name: str) -> int:
    """The step that a new run of this name starts from: that of the last checkpoint in `run_dir`.

    Raises:
        ConfigError: there is no checkpoint, or the name is invalid or taken.
    """
    from_dict({"run": {"name": name}}, where=f"--fork {name}")  # checks the name
    steps = committed(run_dir)
    if not steps:
        raise ConfigError(f"run.name={run_dir.name} has no checkpoint to fork from in {run_dir}")
    if (run_dir.with_name(name) / "config.yaml").exists():
        raise ConfigError(f"--fork {name}: a run of that name already exists in {run_dir.with_name(name)}")
    return steps[-1]


def refuse_early(config: Config, fork: str | None = None) -> None:
    """Raise ConfigError for mistakes that can be found without torch, which takes seconds to import, and without
    preparing the default data, which takes a minute.

    Args:
        fork: as in `trainer.run.folder.prepare_run`.
    """
    resolved, _ = resolve_config(config, prepare=False)
    run_dir = Path(resolved.run.root) / resolved.run.name
    steps = committed(run_dir)
    if fork is not None:
        check_fork(run_dir, fork)
    for source in sources_of(resolved.data) if _reads_prepared(config) else ():
        if source.path != "stdlib":
            read_manifest(source.path)
    if (weights := resolved.train.init_from) and not steps:
        folder = Path(weights)
        if is_file(folder / "config.json"):  # a Hugging Face folder
            model_keys(folder, resolved.model.model_dump())
            from models.hf.weight_files import open_tensors  # imports torch

            open_tensors(folder)
    with writable(resolved.run.root):
        Path(resolved.run.root).mkdir(mode=0o700, parents=True, exist_ok=True)


def _reads_prepared(config: Config) -> bool:
    """Whether the run learns from token shards, as far as its plugins do not decide."""
    if planned_vocabulary(config) is None or config.data.kind not in (None, "tokens"):
        return False
    takes, task = ends_of(config.model).takes, TASK_ENDS.get(config.task)
    return "tokens" in (in_both(takes, task.takes) if task else one_by_one(takes))


@contextmanager
def writable(folder: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a ConfigError that names the file and the system's reason."""
    try:
        yield
    except OSError as error:
        room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}): {room}choose a writable "
            f"run.root"
        ) from None


def _absolute_data(path: str) -> str:
    return path if path in PACKAGED or path.startswith("bundled:") else str(Path(path).expanduser().resolve())


def _absolute(plugin: str) -> str:
    return str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin
