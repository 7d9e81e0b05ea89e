"""From a preset or YAML file and `key=value` overrides to a validated `Config`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .base import ConfigError
from .designs import DESIGNS
from .explain import annotation_of, explain, is_text
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
        overrides: `section.key=value`; the value is read as YAML, or as it stands where the key wants text.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value out of range.
    """
    tree = read_tree(name)
    override(tree, overrides, Config, "train.steps=100")
    return from_dict(tree, where=str(name))


Validated = TypeVar("Validated", bound=BaseModel)


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping. Raises ConfigError with the key, what was given and what would be right."""
    return validated(Config, tree, where)


def validated(model: type[Validated], tree: Mapping[str, Any], where: str) -> Validated:
    """A nested mapping as a model. Raises ConfigError with the key, what was given and what would be right."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in explain(error, model))) from None


def to_yaml(config: BaseModel) -> str:
    """The config as YAML that `load` reads back to an equal object."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def flatten(config: BaseModel) -> dict[str, Any]:
    """`{"train.steps": 1000, ...}`: every value under its dotted key; lists are values."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(config.model_dump(mode="json"), ""))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number (YAML 1.2), and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            keys.append(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _parse(text: str) -> Any:
    """Read YAML. Raises ValueError with one line: what is wrong, and where."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_tree(name: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a preset or YAML file over those of its `base`, not validated yet. Raises ConfigError."""
    path = Path(name)
    if not path.suffix and str(name) in preset_names():
        path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), preset_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no config {str(name)!r}: neither a file nor a preset ({', '.join(preset_names())}){hint}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    tree = read_mapping(path)
    if design := next((name for name in DESIGNS if name in tree), None):
        raise ConfigError(
            f"{path} is a sweep (it has {design}), not a run's config: `muster sweep run {path}` trains it"
        )
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / str(base)
    below = read_tree(beside if beside.is_file() else base, (*seen, path.resolve()))
    return merge(below, tree)


def read_mapping(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError."""
    try:
        tree = _parse(path.read_text(encoding="utf-8")) or {}
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of sections")
    return tree


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Put the keys of `above` over those of `below`, section by section; changes and returns `below`."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            below[key] = merge(below[key], value)
        else:
            below[key] = value
    return below


def override(tree: dict[str, Any], overrides: Iterable[str], root: type[BaseModel], example: str) -> None:
    """Set each `section.key=value` in a tree that is to be a `root`. Raises ConfigError."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{text!r} is not key=value, such as {example}")
        _set(tree, key, value, root)


def _set(tree: dict[str, Any], key: str, text: str, root: type[BaseModel]) -> None:
    *sections, last = key.split(".")
    try:
        value = _parse(text)
    except ValueError as error:
        raise ConfigError(f"{key}={text}: the value is not YAML: {error}") from None
    if is_text(annotation_of((*sections, last), root)) and not isinstance(value, str | list | dict | None):
        value = text  # run.name=2026-01-05 is a name, not a date
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value
