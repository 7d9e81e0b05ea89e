"""From a preset or YAML file and `key=value` overrides to a validated `Config`."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .base import ConfigError
from .run import Config

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names that `load` takes without a path."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config.

    Args:
        name: a preset's name (`quickstart`) or the path of a YAML file. A file may name another as `base:`,
            whose keys it then overrides.
        overrides: `section.key=value`; the value is read as YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value out of range.
    """
    tree = _read(name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not key=value, such as train.steps=100")
        _set(tree, key, value)
    return from_dict(tree, where=str(name))


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping. Raises ConfigError with the key, what was given and what would be right."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, where)) from None


def to_yaml(config: Config) -> str:
    """The config as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: BaseModel) -> dict[str, Any]:
    """`{"train.steps": 1000, ...}`: every value under its dotted key; lists are values."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(config.model_dump(mode="json"), ""))


def _read(name: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = Path(name)
    if not path.suffix and str(name) in preset_names():
        path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), preset_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no config {str(name)!r}: neither a file nor a preset ({', '.join(preset_names())}){hint}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of sections")
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / str(base)
    below = _read(beside if beside.is_file() else base, (*seen, path.resolve()))
    return _merge(below, tree)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            below[key] = _merge(below[key], value)
        else:
            below[key] = value
    return below


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: the value is not YAML: {' '.join(str(error).split())}") from None
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors()[:3]:
        key = ".".join(str(part) for part in item["loc"] if not _is_union_tag(part))
        if item["type"] == "extra_forbidden":
            names = _keys_beside(item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
            lines.append(f"{where}: unknown key {key}: {hint}")
        elif item["type"] == "value_error":
            lines.append(f"{where}: {key + ': ' if key else ''}{item['ctx']['error']}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{where}: {key}={item['input']!r}: {message}")
    return "\n".join(lines)


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    section: Any = Config
    for part in location[:-1]:
        fields = getattr(section, "model_fields", {})
        if part in fields:
            section = _section_of(fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        for part in typing.get_args(annotation):
            found = _section_of(part)
            if found is not Config:
                return found
    return Config
