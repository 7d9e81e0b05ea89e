"""A plain module from a run's checkpoint, for evaluation, generation and the Hugging Face folder."""

from pathlib import Path

import torch
from torch import nn

from configs import Config, ConfigError
from models.families import build
from models.hf import export_hf
from models.router import choosers

from . import checkpoint
from .checkpoint import CheckpointError, Reader
from .data.manifest import TOKENIZER, sources_of
from .plugins import load_plugins
from .routers import on_device, tell
from .run import read_config


def load_module(run_dir: Path, step: int | None = None) -> tuple[nn.Module, Config, int]:
    """The model of a run in fp32 on the CPU, from the newest checkpoint that verifies, or from that of `step`.

    Returns:
        (module in evaluation mode, the run's config, the checkpoint's step).

    Raises:
        ConfigError: not a run, no such checkpoint, or one that is damaged.
    """
    config = read_config(run_dir)
    load_plugins(config.plugins)
    steps = checkpoint.committed(run_dir)
    wanted = steps[::-1] if step is None else [step]
    if not steps or (step is not None and step not in steps):
        have = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise ConfigError(f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}: {have}")
    problems: list[str] = []
    for candidate in wanted:
        path = checkpoint.folder(run_dir, candidate)
        if not (found := checkpoint.verify(path)):
            break
        problems += found
    else:
        raise ConfigError(f"no checkpoint of {run_dir} can be used: {problems[0]}")
    module = build(config.model)
    try:
        reader = Reader(path)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(reader.weight(name))
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    routers = on_device(reader.manifest["state"].get("routers", {}), torch.device("cpu"))
    tell(choosers(module), routers, config.model)
    return module.eval(), config, candidate


def export(run_dir: Path, to: Path, step: int | None = None) -> int:
    """Write the model and tokenizer of a run as a Hugging Face folder. Returns the checkpoint's step.

    Raises:
        ConfigError: as `load_module`; a model that no Hugging Face architecture describes; `to` is not empty.
    """
    if to.exists() and any(to.iterdir()):
        raise ConfigError(f"--to {to}: the folder is not empty")
    module, config, found = load_module(run_dir, step)
    export_hf(module, config.model, to, tokenizer=Path(sources_of(config.data)[0].path) / TOKENIZER)
    return found
