"""Bounded parsing of untrusted YAML and JSON: plain values, or ValueError with one line."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .lfs import POINTER, is_pointer

MAX_BYTES = 512 * 1024
"""Most bytes of a YAML file; the configs of a large sweep take a few thousand."""
MAX_JSON_BYTES = 4 * 1024**2
MAX_JSON_VALUES = 1 << 20
"""Most values in JSON, counting each list or mapping and every item in it; each takes some hundred bytes of memory."""
MAX_VALUES = 20_000
"""Most values in YAML, each counted as often as aliases repeat it."""
MAX_DEPTH = 64
MAX_DIGITS = 100
"""Most characters of one number."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no name or path may contain."""
_NOT_SHOWN = re.compile(CONTROL.pattern + "|[\u2028-\u202e\u2066-\u2069]")


def parse_yaml(text: str) -> Any:
    """YAML as strings, numbers, booleans, None, lists, and dicts whose keys are strings, none of them shared.

    YAML 1.1 as PyYAML reads it, except that 1e-3 is a number (YAML 1.2), a date is a string, and duplicate keys, tags
    and recursive aliases are errors.

    Raises:
        ValueError: one line that says what is wrong, and where.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{shortened(str(error.problem), 300)}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(clip(error)) from None


def parse_json(text: str | bytes, most: int = MAX_JSON_VALUES) -> Any:
    """JSON (RFC 8259). Raises ValueError with one line, also for more than `most` values, duplicate keys, NaN and
    Infinity."""
    check_values(text, most)
    try:
        tree = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("an integer has thousands of digits") from None
        raise
    level, depth = [tree], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deep")
        level = [below for each in level for below in (each.values() if isinstance(each, dict) else each)]
    return tree


def check_values(text: str | bytes, most: int) -> None:
    """Raise ValueError for a JSON text that may contain over `most` values, without parsing it.

    Each value but the first opens its list or mapping, or follows a comma; commas and brackets inside strings count
    too.
    """
    signs = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(map(text.count, signs)) > most:  # type: ignore[arg-type]
        raise ValueError(f"it has over {most:,} values, counted by its commas and brackets")


def read_text(path: Path, most: int) -> str:
    """A file's text. Raises OSError, and ValueError if it is not UTF-8, has more than `most` bytes or is a Git LFS
    pointer."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has over {most:,} bytes")
    if is_pointer(content):
        raise ValueError(f"it is {POINTER}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x})") from None


def is_file(path: Path) -> bool:
    """Whether the file exists; False also for a path that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_folder(path: Path) -> bool:
    """As `is_file`, for a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def shortened(value: object, most: int = 80) -> str:
    """A value's text as a message shows it: one line of at most `most` characters, control characters escaped."""
    text = str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clip(value: object, most: int = 300) -> str:
    """As `shortened`, with each run of white space replaced by one space."""
    return shortened(" ".join(str(value)[: 4 * most].split()), most)


class _Loader(yaml.SafeLoader):
    """A loader that composes and constructs within the bounds."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise _problem(f"the tag {shortened(tag, 60)!r} is not allowed: remove it", event.start_mark)
        self._depth, self._values = self._depth + 1, self._values + 1
        self._check(self._depth, self._values, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            self._measure(node, 1, {}, [])
        return node

    def _measure(self, node: yaml.Node, depth: int, sizes: dict[int, tuple[int, int]], above: list[int]) -> None:
        """Check a node and its descendants, and fill `sizes` with the number of values and levels after expansion.

        Args:
            depth: its level.
            sizes: {id of a node: its values and levels}, for nodes already seen.
            above: ids of its ancestors.
        """
        if id(node) in above:
            raise _problem("an alias refers to its own ancestor", node.start_mark)
        if id(node) not in sizes:
            above.append(id(node))
            values, levels = 1, 0
            for part in self._parts(node):
                self._measure(part, depth + 1, sizes, above)
                values, levels = values + sizes[id(part)][0], max(levels, sizes[id(part)][1])
                self._check(depth + levels, values, node.start_mark)
            sizes[id(node)] = values, levels + 1
            above.pop()
        self._check(depth + sizes[id(node)][1] - 1, sizes[id(node)][0], node.start_mark)

    def _parts(self, node: yaml.Node) -> list[yaml.Node]:
        """The children of a node. Raises YAMLError if the node itself is invalid."""
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        if isinstance(node, yaml.MappingNode):
            seen: set[Hashable] = set()
            for key, _ in node.value:
                self._check_key(key)
                if key.value in seen:
                    raise _problem(f"duplicate key {shortened(key.value, 60)}", key.start_mark)
                seen.add(key.value)
            return [part for pair in node.value for part in pair]
        if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
            raise _problem("a string contains NUL or an unpaired surrogate", node.start_mark)
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise _problem(f"a number has {len(node.value):,} characters", node.start_mark)
        return []

    def _check_key(self, key: yaml.Node) -> None:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key is a list or a mapping: it should be a string", key.start_mark)
        if key.tag not in _KEYS:
            kind = key.tag.rpartition(":")[2]
            raise _problem(
                f"the key {shortened(key.value, 60) or '(none)'} is read as {kind}: quote it", key.start_mark
            )

    def _check(self, depth: int, values: int, mark: Any) -> None:
        if depth > MAX_DEPTH:
            raise _problem(f"it is nested over {MAX_DEPTH} levels deep", mark)
        if values > MAX_VALUES:
            raise _problem(f"it has over {MAX_VALUES:,} values, counted as often as aliases repeat them", mark)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
"""YAML 1.2 numbers that PyYAML reads as text."""
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def _problem(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def _unshared(value: Any) -> Any:
    """A deep copy without shared objects, so that changing one does not change another."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {shortened(twice, 60)!r}")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
