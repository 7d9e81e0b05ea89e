"""Pydantic's errors as lines for a user: the key, what was given, what would be right."""

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from .reading.parse import shortened

WANTED = {
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "dict_type": "should be keys and their values, such as {a: 1}",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "int_from_float": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_parsing_size": "should be a whole number of at most 64 bits",
    "int_type": "should be a whole number",
    "list_type": "should be a list",
    "string_type": "should be text (in quotes if it looks like a number)",
    "tuple_type": "should be a list, such as [a, b]",
}

TRIED = {
    "batch_size": "train.global_batch",
    "epochs": "train.steps",
    "gpus": "parallel.dp",
    "gradient_clipping": "train.grad_clip",
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "name": "run.name",
    "num_gpus": "parallel.dp",
    "optimizer": "optim.name",
}
"""Names that other trainers have for a key, which a user may try without a section."""

INSTEAD = {
    "checkpoint": "for no checkpoints during training, set checkpoint.every=0",
    "data": "set data.path to name data",
    "model": "set model.family to name an architecture, or model.from to name a Hugging Face folder",
    "optim": "set optim.name to name an optimizer",
}
"""What a user may mean who gives a section a single value."""

JUDGED = 200
"""Most errors that are looked at: a list of thousands may have one for each item."""


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """At most three lines, the most useful ones of `error`, for a tree that is not a valid `root`."""
    seen: dict[str, str] = {}
    for item in _useful(error.errors()[:JUDGED], root):
        key, line = _line(item, root)
        seen.setdefault(key, line)
        if len(seen) == 3:
            break
    return list(seen.values())


def first_reason(error: ValidationError) -> str:
    """The first error of a `Typed` value, in one line."""
    first = error.errors(include_url=False)[0]
    where = shortened(".".join(map(str, first["loc"])))
    start = f"{where}: " if where else ""
    match first["type"]:
        case "missing":
            return f"{where} is missing"
        case "value_error":
            return start + str(first["ctx"]["error"])
        case "model_type" | "dataclass_type" | "dict_type":
            what = "should be keys and their values"
        case "list_type" | "tuple_type":
            what = "should be a list"
        case _:
            what = first["msg"].replace("Input should be", "should be")
    return f"{start}{what}, not {shortened(first['input']) or repr('')}"


def annotation_of(location: Sequence[Any], root: Any) -> Any:
    """The annotated type at a location such as ("train", "steps"); None if there is no such key."""
    found = root
    for part in location:
        if typing.get_origin(found) is dict:  # any key has the annotation of the mapping's values
            found = typing.get_args(found)[1]
        elif not isinstance(part, int):  # an item has the annotation of the list's items
            section = _section_of(found)
            if section is None or part not in section.model_fields:
                return None
            found = section.model_fields[part].annotation
    return found


def is_text(annotation: Any) -> bool:
    """Whether a value of this type may be a string."""
    parts = typing.get_args(annotation) or (annotation,)
    return any(part is str or isinstance(part, str) for part in parts)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return next(filter(None, map(_section_of, typing.get_args(annotation))), None)
    return None


def _useful(items: Sequence[Any], root: type[BaseModel]) -> list[Any]:
    """Drop errors that other lines explain better: union members that the value was not meant for, and a missing key
    whose name was misspelt."""
    depths: dict[tuple, int] = {}
    for item in items:
        if (tag := _union_tag(item["loc"])) is not None:
            member_of = item["loc"][:tag]
            depths[member_of] = max(depths.get(member_of, 0), len(item["loc"]))
    misspelt = {(*item["loc"][:-1], _near(item, root)) for item in items if item["type"] == "extra_forbidden"}

    def is_useful(item: Any) -> bool:
        location, tag = item["loc"], _union_tag(item["loc"])
        if item["type"] == "missing" and location in misspelt:
            return False
        if item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            return False  # too short without the invalid items
        return tag is None or len(location) > tag + 1 or depths[location[:tag]] == tag + 1

    return [item for item in items if is_useful(item)]


def _line(item: Mapping[str, Any], root: type[BaseModel]) -> tuple[str, str]:
    """(key, line) of one error."""
    location = _plain(item)
    key = ".".join(shortened(str(part), 60) for part in location)
    given = f"{key}={shown(item['input'])}"
    match item["type"]:
        case "extra_forbidden":
            section, last = "".join(f"{shortened(str(part), 60)}." for part in location[:-1]), str(location[-1])
            if "." in last and _names((*location[:-1], last.partition(".")[0]), root):
                return key, f"unknown key {key}: in a file it is {_nested(last, shown(item['input']))}"
            beside, likely = (name and section + name for name in (_near(item, root), _near(item, root, cutoff=0.85)))
            tried = TRIED.get(key)
            if tried and annotation_of(tried.split("."), root) is None:  # a sweep has other keys
                tried = None
            near = tried or likely or _elsewhere(str(location[-1]), root) or beside
            known = f"known keys: {', '.join(_names(location[:-1], root))}"
            return key, f"unknown key {key}: " + (f"did you mean {near}?" if near else known)
        case "missing" if isinstance(location[-1], int):
            key = key.rpartition(".")[0]
            return key, f"{key}={shown(item['input'])}: value {location[-1] + 1} is missing"
        case "missing":
            return key, f"{key} is missing in {shown(item['input'])}"
        case "too_long":
            most = "at most " if item["ctx"]["field_type"] == "List" else ""
            return key, f"{given}: should have {most}{item['ctx']['max_length']} values"
        case "too_short":
            least = item["ctx"]["min_length"]
            return key, f"{given}: should have at least {least} value{'s' if least > 1 else ''}"
        case "model_type":
            names = _names(location, root)
            if names == ["path", "weight"] and isinstance(item["input"], str):
                return key, f"{given}: write {{path: {shortened(item['input'])}, weight: 1}}"
            keys = f"{', '.join(names[:4])}{', ...' if names[4:] else ''}"
            instead = f"; {INSTEAD[key]}" if key in INSTEAD and annotation_of(["run"], root) else ""
            return key, f"{given}: should be a section of keys: {keys}{instead}"
        case "value_error":
            message = str(item["ctx"]["error"])
            return key, message if not key or message.startswith(f"{key}.") else f"{given}: {message}"
        case "literal_error":
            annotation = annotation_of(location, root)
            literals = [part for part in (annotation, *typing.get_args(annotation)) if _is_literal(part)]
            options = [str(option) for literal in literals for option in typing.get_args(literal)]
            close = difflib.get_close_matches(str(item["input"]).lower(), options, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return key, f"{given}: should be one of {', '.join(options)}{hint}"
        case "string_type" | "tuple_type" if _union_tag(item["loc"]) is not None:
            return key, f"{given}: should be text or a list"
        case kind:
            wanted = " or ".join([WANTED[kind], *_words(location, root)]) if kind in WANTED else ""
            return key, f"{given}: " + (wanted or item["msg"].removeprefix("Input ").lower())


def shown(value: Any, limit: int = 120) -> str:
    """A config value as a message shows it."""
    return shortened(json.dumps(value, default=str, ensure_ascii=False, skipkeys=True), limit)


def _words(location: Sequence[Any], root: type[BaseModel]) -> list[str]:
    """The word that a key takes besides a number: `auto`."""
    members = typing.get_args(annotation_of(location, root))
    literals = [member for member in members if _is_literal(member)]
    return [str(word) for literal in literals for word in typing.get_args(literal)]


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _union_tag(location: tuple[Any, ...]) -> int | None:
    """Where pydantic's location names the union member that it tried, such as `tuple[Source, ...]`."""
    tags = ("str", "constrained-int")
    return next((i for i, part in enumerate(location) if part in tags or "[" in str(part)), None)


def _plain(item: Mapping[str, Any]) -> tuple[Any, ...]:
    location, tag = item["loc"], _union_tag(item["loc"])
    if tag is None or (item["type"] == "extra_forbidden" and tag == len(location) - 1):  # the user's own word
        return location
    return location[:tag] + location[tag + 1 :]


def _names(location: Sequence[Any], root: type[BaseModel]) -> list[str]:
    section = _section_of(annotation_of(location, root))
    return list(section.model_fields) if section else []


def _nested(key: str, value: str) -> str:
    """YAML of a key with dots: `a: {b: value}`."""
    first, *rest = key.split(".")
    return f"{first}: " + "".join(f"{{{part}: " for part in rest) + value + "}" * len(rest)


def _near(item: Mapping[str, Any], root: type[BaseModel], cutoff: float = 0.5) -> str | None:
    """The key of the same section that is most similar."""
    location = _plain(item)
    close = difflib.get_close_matches(str(location[-1]), _names(location[:-1], root), n=1, cutoff=cutoff)
    return next(iter(close), None)


def _elsewhere(name: str, section: type[BaseModel], prefix: str = "") -> str | None:
    """The full key of the first key with that name in any section: `lr` is `optim.lr`."""
    for key, field in section.model_fields.items():
        if key == name:
            return prefix + key
        below = _section_of(field.annotation)
        if below and (found := _elsewhere(name, below, f"{prefix}{key}.")):
            return found
    return None
