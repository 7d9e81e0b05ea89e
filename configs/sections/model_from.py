"""`model: {from: FOLDER}`: what a model in a folder is made of, under the keys that the config gives beside it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.base import ConfigError, file_path
from configs.explain import shown
from configs.reading.parse import is_file

KEY = "from"
TOKENIZER = "tokenizer.json"
READERS: list[Callable[[Path], dict[str, Any]]] = []
"""Gives the keys of the model in a folder, or raises ConfigError: one function, of `models`, which imports this."""


def take_model(tree: Any, where: str) -> Any:
    """The tree with the model's keys in the place of `model.from`, and the folder's tokenizer for `data.path: stdlib`.

    What is no tree of a config is given back, for its validation to explain.

    Raises:
        ConfigError: no such folder, or a model that is not read.
    """
    model = tree.get("model") if isinstance(tree, Mapping) else None
    if not isinstance(model, Mapping) or KEY not in model:
        return tree
    own = {key: value for key, value in model.items() if key != KEY}
    if (source := model[KEY]) is None:
        return {**tree, "model": own}
    if not isinstance(source, str) or not source:
        raise ConfigError(f"{where}: model.from={shown(source)}: should be the folder of a model")
    try:
        folder = Path(file_path(source)).expanduser().absolute()
    except ValueError as error:
        raise ConfigError(f"{where}: model.from={shown(source)}: {error}") from None
    (read,) = READERS
    try:
        taken = {**tree, "model": {**read(folder), **own}}
    except ConfigError as error:
        raise ConfigError(f"model.from={shown(source)}: {error}") from None
    data = tree.get("data", {})
    prepare = data.get("prepare", {}) if isinstance(data, Mapping) else None
    if not isinstance(prepare, Mapping) or data.get("path", "stdlib") != "stdlib" or not is_file(folder / TOKENIZER):
        return taken
    return {**taken, "data": {**data, "prepare": {"tokenizer": str(folder / TOKENIZER), **prepare}}}
