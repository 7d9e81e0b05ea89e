"""`model: {from: FOLDER}`: the keys of a model in a folder, with the keys given in the config on top."""

import contextlib
import importlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.base import ConfigError, file_path
from configs.explain import shown
from configs.reading.parse import is_file, is_folder
from configs.sections.model import STRETCHED_FROM

KEY = "from"
TOKENIZER = "tokenizer.json"
ORIGINAL = "original_max_positions"
READER = "models.hf.config_json"
"""Module whose `model_keys` reads the keys of a model in a folder. It imports configs, so it is imported only when
needed."""


def take_model(tree: Any, where: str) -> tuple[Any, dict[str, str]]:
    """The tree with the model's keys in place of `model.from`, and the folder's tokenizer for `data.path: stdlib`. A
    malformed tree is returned unchanged, for validation to explain.

    Returns:
        The tree; {key: why} of anything else taken from a folder: the original context length of scaled positions.

    Raises:
        ConfigError: no such folder, or a model that cannot be read.
    """
    model = tree.get("model") if isinstance(tree, Mapping) else None
    if not isinstance(model, Mapping):
        return tree, {}
    if KEY not in model:
        return _with_original({**tree, "model": dict(model)})
    source = model[KEY]
    if not isinstance(source, str) or not source:
        raise ConfigError(f"{where}: model.from={shown(source)}: should be the folder of a model")
    try:
        folder = Path(file_path(source)).expanduser().absolute()
    except ValueError as error:
        raise ConfigError(f"{where}: model.from={shown(source)}: {error}") from None
    if is_file(folder):
        raise ConfigError(f"{where}: model.from={shown(source)} is a file: give its folder")
    if not is_folder(folder):
        raise ConfigError(f"{where}: model.from={shown(source)}: no such folder{_own_config(tree.get('run'))}")
    try:
        below = _read(folder, model)
    except ConfigError as error:
        raise ConfigError(f"model.from={shown(source)}: {error}") from None
    own = {key: value for key, value in model.items() if key != KEY}
    taken, why = _with_original({**tree, "model": _over(below, own)}, below, f"model.from={source}")
    data = tree.get("data", {})
    prepare = data.get("prepare", {}) if isinstance(data, Mapping) else None
    if isinstance(prepare, Mapping) and data.get("path", "stdlib") == "stdlib" and is_file(folder / TOKENIZER):
        taken["data"] = {**data, "prepare": {"tokenizer": str(folder / TOKENIZER), **prepare}}
    return taken, why


def _own_config(run: Any) -> str:
    """How the run that these keys name goes on without the folder, if it exists: its config has the model's keys."""
    run = run if isinstance(run, Mapping) else {}
    root, name = run.get("root", "runs"), run.get("name", "run")
    with contextlib.suppress(TypeError, ValueError):  # which the validation explains
        file = Path(file_path(root)).expanduser() / name / "config.yaml"
        if is_file(file):
            return f".\nThe run goes on without it by its own config: `muster train {shlex.quote(str(file))}`"
    return ""


def _read(folder: Path, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return importlib.import_module(READER).model_keys(folder, own)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the keys of `above` over those of `below`, section by section; a section of another `kind` inherits
    nothing."""
    found = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            kind = under.get("kind")
            found[key] = _over(under, value) if value.get("kind", kind) == kind else value
        else:
            found[key] = value
    return found


def _with_original(
    tree: dict[str, Any], below: Mapping[str, Any] | None = None, source: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """Add the original context length of scaled positions, if it is missing and `below`, the keys of the model that
    this one starts from, give it; also returns why."""
    model = tree["model"]
    rope = model.get("rope_scaling")
    if not isinstance(rope, Mapping) or rope.get("kind") not in STRETCHED_FROM or rope.get(ORIGINAL) is not None:
        return tree, {}
    if below is None:
        below, source = _warm_start(tree.get("train"))
    scaled = below.get("rope_scaling")
    if scaled is None:
        key, length = "max_positions", below.get("max_positions")
    else:  # by the same formula, or one that says nothing of the original length under another
        key, length = f"rope_scaling.{ORIGINAL}", scaled.get(ORIGINAL) if scaled["kind"] == rope["kind"] else None
    if length is None:
        return tree, {}
    why = {f"model.rope_scaling.{ORIGINAL}": f"model.{key} of {source}"}
    return {**tree, "model": {**model, "rope_scaling": {**rope, ORIGINAL: length}}}, why


def _warm_start(train: Any) -> tuple[dict[str, Any], str]:
    """The keys of the model that `train.init_from` names, and its name; none if it cannot be read."""
    source = train.get("init_from") if isinstance(train, Mapping) else None
    with contextlib.suppress(ValueError):  # includes ConfigError: the start of the run explains it
        if isinstance(source, str) and source:
            return _read(Path(file_path(source)).expanduser().absolute()), f"train.init_from={source}"
    return {}, ""
