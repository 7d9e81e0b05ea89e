"""From a preset or YAML file and `key=value` overrides to a validated `Config`."""

import copy
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, create_model

from .base import ConfigError
from .explain import annotation_of, explain, is_text, shown
from .follow import dotted, follow
from .reading.parse import FLOAT, MAX_BYTES, MAX_DEPTH, is_file, parse_yaml, read_text, shortened
from .sections.family import DECODER, UnknownFamily, section_of
from .sections.model_from import KEY as FROM
from .sections.model_from import ORIGINAL, take_model
from .sections.run import OURS, Config
from .sweep.designs import DESIGNS

PRESETS = Path(__file__).parent / "presets"
MAX_BASES = 20
"""Most files in a chain of `base` references."""


def preset_names() -> list[str]:
    """Names that `load` accepts without a path."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class Preset(NamedTuple):
    """What a preset trains, and what its first comments say of it."""

    name: str
    family: str
    task: str
    trains: str
    data: str
    held_out: str
    """The result on held-out data that was measured at the end of the run, or that none was."""
    minutes: float | None
    """How long its training took on two CPU cores; None: not measured."""


def presets() -> list[Preset]:
    """All presets, by name."""

    def read(name: str) -> Preset:
        text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
        lines = itertools.takewhile(lambda line: line.startswith("# "), text.splitlines())
        trains, *others = (line[2:] for line in lines)
        notes = dict(line.split(": ", 1) for line in others)
        minutes, config = notes.get("minutes"), load(name)
        known = (name, config.model.family, config.task, trains, notes["data"], notes["held out"])
        return Preset(*known, float(minutes) if minutes else None)

    return [read(name) for name in preset_names()]


def load(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config.

    Args:
        name: a preset's name (`quickstart`) or the path of a YAML file. A file may name another as `base:`,
            whose keys it then overrides.
        overrides: `section.key=value`; the value is read as YAML, or as it stands where the key wants text.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value out of range.
    """
    return _config_of(_layers(name), overrides, str(name))


def load_apart(text: str, overrides: Iterable[str] = (), where: str = "the config") -> Config:
    """A config that somebody else has sent: as `load` of a file of this text, but no other file is read for it.

    Raises:
        ConfigError: as `load`; and where it stands on another file, names plugins, or takes its model from a folder.
    """
    return _config_of(_layers_apart(text, where), overrides, where, refuse_outside)


def _layers_apart(text: str, where: str) -> list["Layer"]:
    """The preset that a config somebody else has sent stands on, and its own keys. Raises ConfigError."""
    try:
        if len(text.encode(errors="replace")) > MAX_BYTES:
            raise ValueError(f"it has over {MAX_BYTES:,} bytes")
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where} cannot be read as YAML: {error}") from None
    tree = _sections(tree or {}, where)
    base = tree.pop("base", None)
    if base is not None and base not in preset_names():
        known = ", ".join(preset_names())
        raise ConfigError(f"{where}: base={shown(base)}: files are not read here: choose a preset ({known})")
    below = [] if base is None else _layers(base)
    return [*below, (Path(where), tree)]


def refuse_outside(tree: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if the keys of a config name code to run, or a file that `from_dict` would read."""
    model, train = (each if isinstance(each := tree.get(key), Mapping) else {} for key in ("model", "train"))
    if tree.get("plugins"):
        raise ConfigError(f"{where}: plugins={shown(tree['plugins'])}: plugins are not loaded here: leave it out")
    if FROM in model:
        raise ConfigError(
            f"{where}: model.from={shown(model[FROM])}: folders are not read here: give the keys of the model"
        )
    rope = model.get("rope_scaling")
    if train.get("init_from") and isinstance(rope, Mapping) and rope.get(ORIGINAL) is None:
        raise ConfigError(
            f"{where}: train.init_from={shown(train['init_from'])}: folders are not read here: give "
            f"model.rope_scaling.{ORIGINAL}"
        )


def _config_of(
    layers: Sequence["Layer"],
    overrides: Iterable[str],
    where: str,
    check: Callable[[Mapping[str, Any], str], None] = lambda tree, where: None,
) -> Config:
    """As `load`, of files that were read; `check` may refuse the keys before a model's folder is read for them."""
    overrides = tuple(overrides)
    tree, preset = _merged(layers), _merged(each for each in layers if _is_preset(each))
    own = _merged(each for each in layers if not _is_preset(each))
    for keys in (tree, own):
        override(keys, overrides, Config, "train.steps=100")
    check(tree, where)
    # A model loaded from a folder is the user's choice, down to every key.
    (tree, taken), (own, _) = take_model(tree, where), take_model(own, where)
    defaults = follow(tree, preset, dotted(own)) | taken
    return from_dict(tree, where=where).with_defaults(defaults)


def one_file(name: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The keys of a config in one tree: the user's, over the preset that they stand on as its `base`.

    A file of them is the same config, as `load` reads it, wherever the file lies. Nothing is derived: paths and the
    model's folder are still relative to the working directory. Raises ConfigError as `load`, but checks no value.
    """
    return _one_tree(_layers(name), overrides)


def one_file_apart(text: str, overrides: Iterable[str] = (), where: str = "the config") -> dict[str, Any]:
    """As `one_file`, of a config that somebody else has sent: see `load_apart`, which is to have accepted it."""
    return _one_tree(_layers_apart(text, where), overrides)


def _one_tree(layers: Sequence["Layer"], overrides: Iterable[str]) -> dict[str, Any]:
    tree = _merged(each for each in layers if not _is_preset(each))
    override(tree, overrides, Config, "train.steps=100")
    presets = [each[0].stem for each in layers if _is_preset(each)]
    return {"base": presets[-1], **tree} if presets else tree


def model_source(name: str | Path, overrides: Iterable[str] = ()) -> str | None:
    """The folder that a config's model is loaded from, `model.from`; None if its keys are given. Arguments as in
    `load`."""
    tree = read_tree(name)
    override(tree, overrides, Config, "train.steps=100")
    model = tree.get("model")
    return model.get(FROM) if isinstance(model, dict) else None


Validated = TypeVar("Validated", bound=BaseModel)


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Validate a nested mapping. Raises ConfigError with the key, what was given and what would be right."""
    tree, taken = take_model(tree, where)
    try:
        return validated(Config, tree, where).with_defaults(taken)
    except ConfigError:
        if not _may_be_a_plugins(tree):
            raise
        later = {**tree, "model": validated(UnknownFamily, tree["model"], f"{where}: model")}
        return validated(Config, later, where).with_defaults(taken)


def _may_be_a_plugins(tree: Any) -> bool:
    """Whether a plugin that is not loaded yet may bring another family of the name of one of ours: its keys are checked
    then."""
    model = tree.get("model") if isinstance(tree, Mapping) and tree.get("plugins") else None
    family = model.get("family") if isinstance(model, Mapping) else None
    return isinstance(family, str) and section_of(family) is OURS.get(family)


def validated(model: type[Validated], tree: Mapping[str, Any], where: str) -> Validated:
    """A nested mapping as a model. Raises ConfigError with the key, what was given and what would be right."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        root = _with_family(model, tree)
        raise ConfigError("\n".join(f"{where}: {line}" for line in explain(error, root))) from None


def with_family(config: Config) -> Config:
    """The config with the keys of its family checked, now that the plugin which may define it is loaded.

    Raises:
        ConfigError: an unknown key of the family, or a value out of range.
    """
    if (section := section_of(config.model.family)) is UnknownFamily or isinstance(config.model, section):
        return config
    tree = {"model": config.model.model_dump(exclude_unset=True), "task": config.task}
    checked = validated(Config, tree, "config")
    return config.model_copy(update={"model": checked.model, "task": checked.task})


def _with_family(root: type[BaseModel], tree: Mapping[str, Any]) -> type[BaseModel]:
    """A root whose `model` has the keys of the tree's own family, so that messages name those."""
    model = tree.get("model") if isinstance(tree, Mapping) else None
    if root is not Config or not isinstance(model, Mapping) or (family := model.get("family", DECODER)) == DECODER:
        return root
    return create_model("Config", __base__=Config, model=(section_of(family).variant(model), ...))


def to_yaml(config: BaseModel) -> str:
    """The config as YAML that `load` reads back to an equal object."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """A tree as YAML that reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def flatten(config: BaseModel) -> dict[str, Any]:
    """`{"train.steps": 1000, ...}`: every value under its dotted key; lists are values."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(config.model_dump(mode="json"), ""))


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `parse_yaml` would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


Layer = tuple[Path, dict[str, Any]]
"""A file and the keys that it sets."""


def read_tree(name: str | Path) -> dict[str, Any]:
    """The keys of a preset or YAML file over those of its `base`, not validated yet. Raises ConfigError."""
    return _merged(_layers(name))


def _merged(layers: Iterable[Layer]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _, keys in layers:
        merge(tree, copy.deepcopy(keys))
    return tree


def _is_preset(layer: Layer) -> bool:
    return layer[0].parent == PRESETS


def _layers(name: str | Path, seen: tuple[Path, ...] = (), read: int = 0) -> list[Layer]:
    """A preset or YAML file, after its `base`; `read`: bytes of the files that lead to it. Raises ConfigError."""
    path = Path(name)
    if not path.suffix and str(name) in preset_names():
        path = PRESETS / f"{name}.yaml"
    if not is_file(path):
        near = difflib.get_close_matches(str(name), preset_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(preset_names())
        raise ConfigError(f"no config {shortened(repr(str(name)), 120)}: neither a file nor a preset ({known}){hint}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base` leads back to this file")
    if len(seen) == MAX_BASES:
        raise ConfigError(f"{seen[0]} has a chain of over {MAX_BASES} `base` files")
    read += path.stat().st_size
    if seen and read > MAX_BYTES:
        raise ConfigError(f"{seen[0]} and its chain of {len(seen)} `base` files have over {MAX_BYTES:,} bytes in total")
    tree = _sections(read_mapping(path), str(path))
    base = tree.pop("base", None)
    if base is None:
        return [(path, tree)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={shown(base)}: should be a preset's name or the path of a YAML file")
    beside = path.parent / base
    return [*_layers(beside if is_file(beside) else base, (*seen, path.resolve()), read), (path, tree)]


def read_mapping(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError."""
    try:
        tree = parse_yaml(read_text(path, MAX_BYTES)) or {}
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    return _mapping(tree, str(path))


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} contains a {type(tree).__name__}, not a mapping of sections")
    return tree


def _sections(tree: Any, where: str) -> dict[str, Any]:
    """The tree, if it is a run's. Raises ConfigError."""
    tree = _mapping(tree, where)
    if design := next((name for name in DESIGNS if name in tree), None):
        raise ConfigError(
            f"{where} is a sweep (it has {design}), not a run's config: train it with `muster sweep run {where}`"
        )
    return tree


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the keys of `above` over those of `below`, section by section; changes and returns `below`.

    A `model` with `from` replaces the one below.
    """
    for key, value in above.items():
        if key == "model" and isinstance(value, dict) and FROM in value:
            below[key] = value
        elif isinstance(value, dict) and isinstance(below.get(key), dict):
            below[key] = merge(below[key], value)
        else:
            below[key] = value
    return below


def override(tree: dict[str, Any], overrides: Iterable[str], root: type[BaseModel], example: str) -> None:
    """Set each `section.key=value` in a tree that is to be a `root`. Raises ConfigError."""
    # Overrides that replace a whole section come first, so that the others apply on top.
    for text in sorted(overrides, key=lambda text: text.partition("=")[0] != f"model.{FROM}"):
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")) or key.count(".") > MAX_DEPTH:
            raise ConfigError(f"{shortened(repr(text), 120)} is not key=value, such as {example}")
        _set(tree, key, value, root)


def _set(tree: dict[str, Any], key: str, text: str, root: type[BaseModel]) -> None:
    *sections, last = key.split(".")
    if key == f"model.{FROM}":
        tree["model"] = {}
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{shortened(f'{key}={text}', 120)}: the value is not YAML: {error}") from None
    annotation, plain = annotation_of((*sections, last), _with_family(root, tree)), (str, list, dict, type(None))
    if not isinstance(value, plain if is_text(annotation) else (*plain, int, float)):
        value = text  # run.name=2026-01-05 is a name, not a date
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[last] = value
