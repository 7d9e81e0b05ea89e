"""The config of a Hugging Face folder of any architecture as keys of `model` (no torch)."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from configs import ConfigError
from configs.explain import shown
from configs.sections.families.hf import (
    REFUSED,
    SET_ELSEWHERE,
    ImageClassifier,
    LanguageModel,
    TextClassifier,
    TransformersConfig,
    is_random,
    kind_of_class,
)


def keys_of_folder(tree: Any, own: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Keys of `model` for the family transformers: the network of a folder, without dropout.

    Args:
        tree: its config.json, not validated.
        own: keys that will be put on top; an architecture among them may be another of the same config.

    Raises:
        ConfigError: it is no config of a class in transformers.
    """
    model_type, names = (tree.get("model_type"), tree.get("architectures")) if isinstance(tree, dict) else (None, None)
    architecture = own.get("architecture") or (names[0] if isinstance(names, list) and names else None)
    if not isinstance(model_type, str) or not isinstance(architecture, str):
        raise ConfigError(f"{folder}: config.json has no model_type, or no architectures: set model.architecture")
    known = keys_of(_config_class(model_type, folder))
    keys = {key: _kept(value) for key, value in tree.items() if key in known and _describes(key)}
    found: dict[str, Any] = {"architecture": architecture, "config": keys}
    section = kind_of_class(architecture) or TransformersConfig
    if issubclass(section, LanguageModel) and tree.get("vocab_size") is not None:
        found["vocab_size"] = tree["vocab_size"]
    if issubclass(section, ImageClassifier | TextClassifier):
        labels = tree.get("id2label")
        found["outputs"] = len(labels) if isinstance(labels, dict) and labels else 2  # a default that is not written
    if issubclass(section, ImageClassifier):
        found["channels"] = tree.get("num_channels", 3)
    return found


def keys_of(kind: Any) -> set[str]:
    """The keys that a class of configs has."""
    known = {field.name for field in fields(kind)} | set(inspect.signature(kind.__init__).parameters)
    known |= set(kind.attribute_map)
    if "rope_parameters" in known:  # as config.json had them before version 5
        known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    return known - {"self", "args", "kwargs"}


def _config_class(kind: str, folder: Path) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # an extra

    try:
        return CONFIG_MAPPING[kind]
    except KeyError:
        raise ConfigError(f"{folder}: config.json: transformers knows no model_type {shown(kind)}") from None


def _describes(key: Any) -> bool:
    """Whether a key describes a network, as far as no other key of ours does."""
    if not isinstance(key, str) or key.startswith("_") or key == "model_type":
        return False
    return key not in SET_ELSEWHERE and key not in REFUSED and not is_random(key)


def _kept(value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict) and depth < 10:
        return {key: _kept(each, depth + 1) for key, each in value.items() if key == "model_type" or _describes(key)}
    return value
