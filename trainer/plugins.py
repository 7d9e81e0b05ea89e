"""Load a user's own modules after ours, so that a folder of theirs named like one of ours never shadows it."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from configs import ConfigError


def load_plugins(plugins: Iterable[str]) -> None:
    """Import each plugin: `package.module`, or the path of a Python file.

    Raises:
        ConfigError: a plugin cannot be imported.
    """
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _load_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except (ImportError, OSError, SyntaxError) as error:
            raise ConfigError(f"plugins: {plugin}: {error}") from None


def _load_file(path: Path) -> None:
    name = f"muster_plugin_{path.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
