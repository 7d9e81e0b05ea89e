"""Load a user's own modules after ours, so that a folder of theirs named like one of ours never shadows it."""

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

import models  # noqa: F401  ours first, so that a user's folder of that name cannot shadow it
from configs import Config, ConfigError, load
from configs.load import with_family
from configs.sections.pairs import check_pair
from trainer.processes.compile_locks import mend_compile_locks


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each plugin: `package.module`, or the path of a Python file.

    If there are plugins, the working directory is searched for modules too, after everything that is installed.

    Plugins are the first code of a run that may compile something, so locks left by a killed compilation are removed
    before.

    Raises:
        ConfigError: a plugin cannot be imported, with the line that failed; or as `mend_compile_locks`.
    """
    mend_compile_locks()
    here = os.getcwd()
    if plugins and here not in sys.path:
        sys.path.append(here)  # last: our own packages are loaded by now, and a user's folder cannot shadow them
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _load_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
            where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames[-1].filename != __file__ else ""
            raise ConfigError(f"plugins: {plugin}: {type(error).__name__}: {error}{where}") from None


def load_own(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Load a config that the user names, as `configs.load`, with the keys of a family that its plugins define. Raises
    ConfigError, as `configs.load`, `load_plugins` and `check_pair`."""
    overrides = tuple(overrides)
    config = load(name, overrides)
    if not config.plugins:
        return config
    load_plugins(config.plugins)
    config = with_family(load(name, overrides))  # now that the keys are known
    check_pair(config)
    return config


def with_plugins(config: Config) -> Config:
    """Load the config's plugins, and return it with the keys of its family checked. Raises ConfigError."""
    load_plugins(config.plugins)
    return with_family(config)


def _load_file(path: Path) -> None:
    path = path.resolve()
    name = f"muster_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # or a second try would find it half initialised
        raise
