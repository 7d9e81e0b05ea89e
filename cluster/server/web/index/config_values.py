"""The configs of many runs as flat keys and values, which are mostly the same: each section is parsed and kept once."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs import mask
from configs.reading.parse import MAX_BYTES, parse_yaml
from trainer.files.own_files import read_bytes
from trainer.record.terminal import visible

MOST_KEYS = 2000
"""Of one config; the largest of today have some 150."""
LONGEST_VALUE = 2000
"""Characters of a text that are shown."""
OF_ONE_RUN = ("run.name", "run.root")
"""Keys that differ between any two runs."""
_SECTION = re.compile(r"^(?=[A-Za-z_][A-Za-z0-9_]*:)", flags=re.MULTILINE)
_SHARED = re.compile(r"[&*!|>%]|^(?:---|\.\.\.)", flags=re.MULTILINE)
"""What may reach from one section into another, or hold lines that look like a section's beginning."""


class Section(NamedTuple):
    """Some keys of a config with their values."""

    keys: tuple[str, ...]
    values: tuple[Any, ...]


Config = tuple[Section, ...]
NOTHING = Section((), ())


class Configs:
    """Reads configs; what several have in common is one object."""

    def __init__(self) -> None:
        self._sections: dict[str, Section] = {}
        self._shapes: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._values: dict[tuple[type, Any], Any] = {}

    def read(self, path: Path) -> Config:
        """The config in a file, in sections.

        Raises:
            OSError: it is not there, or no plain file, or too large.
            ValueError: it is no YAML of plain values.
        """
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
        parts = [part for part in _SECTION.split(text) if part.strip()]
        if _SHARED.search(text) or len(parts) > 64:
            return (self._parsed(text),)
        try:
            return tuple(self._kept(part) for part in parts)
        except ValueError:  # a text of several lines was cut, or it is no YAML at all
            return (self._parsed(text),)

    def _kept(self, part: str) -> Section:
        if part not in self._sections:
            section = self._parsed(part)
            if part.startswith("run:"):  # of this run alone
                return section
            if len(self._sections) >= 20_000:
                self._sections.clear()
            self._sections[part] = section
        return self._sections[part]

    def _parsed(self, text: str) -> Section:
        tree = parse_yaml(text)
        flat = dict(_flat(tree, "")) if isinstance(tree, dict) else {}
        keys = tuple(list(flat)[:MOST_KEYS])
        return self.section(keys, [flat[key] for key in keys])

    def section(self, keys: Iterable[str], values: Iterable[Any]) -> Section:
        """A section whose keys and plain values are those of others with the same ones."""
        return Section(self.shape(keys), tuple(self._shared(value) for value in values))

    def shape(self, keys: Iterable[str]) -> tuple[str, ...]:
        """These keys, as one object with the same ones of others."""
        names = tuple(keys)
        return self._shapes.setdefault(names, names)

    def _shared(self, value: Any) -> Any:
        if not isinstance(value, str | int | bool):  # one number of a run's end is hardly another's
            return value
        return self._values.setdefault((type(value), value), value)


def flat_config(config: Config) -> dict[str, Any]:
    """`{"train.steps": 1000, ...}`."""
    return {key: value for section in config for key, value in zip(section.keys, section.values, strict=True)}


def value_of(config: Config, key: str) -> Any:
    """The value of a key; None where the config has none."""
    for section in config:
        if key in section.keys:
            return section.values[section.keys.index(key)]
    return None


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each key that has not the same value in all flat configs, with the value of each; None: it has none."""
    names = dict.fromkeys(key for config in configs for key in config if key not in OF_ONE_RUN)
    return [
        {"key": key, "values": [config.get(key) for config in configs]}
        for key in names
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield visible(name)[:200], _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return visible(mask(value[:LONGEST_VALUE]))
    if isinstance(value, list):
        return [_plain(each) for each in value[:1000]]
    if isinstance(value, dict):
        return {visible(key): _plain(each) for key, each in value.items()}
    return value
