"""Start a run of a family other than the decoder: from a checkpoint of that family, whose parameters and memory have
the same names, or from a Hugging Face folder that the family reads."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import Config, ConfigError
from configs.reading.parse import clip, is_file, shortened
from configs.sections.family import ModelSection
from models.families import build, family_of
from models.tasks.task import AVERAGED

from . import manifest, store
from .manifest import CheckpointError
from .store import Reader

Rows = dict[str, list[list[float]]]


def check_same(config: Config) -> dict[str, list[Any]]:
    """As `init_from.check_source`: every key of `model` that differs, since shapes may not show the difference."""
    if _is_folder(config):
        return _loaded(build(config.model), config).differs
    with torch.device("meta"):
        module = build(config.model)
    return other_keys(_open(module, config, digests=False), config.model)


def other_keys(reader: Reader, model: ModelSection) -> dict[str, list[Any]]:
    """{key: [there, here]} of the keys of `model` that differ from those of a checkpoint's run."""
    found, here = reader.manifest.config.get("model"), model.model_dump(mode="json")
    there = found if isinstance(found, dict) else {}
    return {f"model.{key}": [_short(there[key]), here[key]] for key in here if there.get(key, here[key]) != here[key]}


def load_same(module: nn.Module, config: Config) -> Rows:
    """As `init_from.load_weights`. Returns the checkpoint's memory."""
    if _is_folder(config):
        found = _loaded(module, config)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in found.weights:
                    parameter.copy_(found.weights[name])
        return found.memory
    reader = _open(module, config, digests=True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            try:
                parameter.copy_(reader.weight(name))
            except CheckpointError as error:
                raise ConfigError(f"train.init_from: {error}") from None
    return {name: rows for name, rows in reader.manifest.state.memory.items() if not name.startswith(AVERAGED)}


def _is_folder(config: Config) -> bool:
    """Whether the run starts from a Hugging Face folder that its family can read."""
    assert config.train.init_from
    folder = Path(config.train.init_from).expanduser()
    return family_of(config.model).load is not None and is_file(folder / "config.json")


def _loaded(module: nn.Module, config: Config) -> Any:
    """What such a folder holds for the module. Raises ConfigError."""
    load, source = family_of(config.model).load, config.train.init_from
    assert load
    assert source
    try:
        return load(module, Path(source).expanduser())
    except ConfigError as error:
        raise ConfigError(f"train.init_from={source}: {error}") from None


def _open(module: nn.Module, config: Config, digests: bool) -> Reader:
    """Raises ConfigError if there is no checkpoint, or it is damaged, of another family, or has other shapes."""
    assert config.train.init_from
    given, family = config.train.init_from, config.model.family
    path = Path(given).expanduser()
    if config.train.upcycle:
        raise ConfigError(f"train.upcycle makes experts of a decoder's MLPs, but model.family={family}: leave it out")
    if (steps := manifest.committed(path)) and not (path / manifest.MANIFEST).is_file():
        path = manifest.folder(path, steps[-1])
    if not (path / manifest.MANIFEST).is_file():
        raise ConfigError(
            f"train.init_from={given} is neither a run with checkpoints nor a checkpoint, and model.family={family} "
            "can start only from one of these"
        )
    reader, problems = store.examine(path, digests=digests)
    if not reader:
        raise ConfigError(f"train.init_from: {problems[0]}")
    model = reader.manifest.config.get("model")
    there = model.get("family") if isinstance(model, dict) else None
    if there != family:
        raise ConfigError(
            f"train.init_from={given} has model.family={shortened(there)}, but this run has {family}: name a run of "
            "the same family"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if problem := reader.misfit(shapes):
        keys = [f"{key}={clip(there, 40)}" for key, (there, _) in other_keys(reader, config.model).items()]
        raise ConfigError(f"train.init_from: {problem}: set {' '.join(keys) or 'model.* to its architecture'}")
    return reader


def _short(value: Any) -> Any:
    return value if isinstance(value, int | float | bool | None) else clip(value, 200)
