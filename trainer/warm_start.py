"""Begin a run from the weights of another: a run, one of its checkpoints, or a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from configs import ConfigError
from models.hf import import_hf

from . import checkpoint
from .checkpoint import CheckpointError, Reader


def load_weights(module: nn.Module, source: str) -> None:
    """Fill a plain module with the weights that `train.init_from` names; moments, step and cursor stay behind.

    Raises:
        ConfigError: nothing of the three kinds is there, it is damaged, or its parameters are not the model's.
    """
    weight = _open(Path(source).expanduser())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            try:
                value = weight(name)
            except (KeyError, CheckpointError):
                raise ConfigError(f"train.init_from={source} has no {name}: model.* is another architecture") from None
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"train.init_from={source}: {name} is {list(value.shape)}, the model's is {list(parameter.shape)}: "
                    f"set model.* to the sizes of what is loaded"
                )
            parameter.copy_(value)


def _open(source: Path) -> Callable[[str], Tensor]:
    if (source / "config.json").is_file():
        _, weights = import_hf(source)
        return weights.__getitem__
    if (steps := checkpoint.committed(source)) and not (source / checkpoint.MANIFEST).is_file():
        source = checkpoint.folder(source, steps[-1])
    if (source / checkpoint.MANIFEST).is_file():
        if problems := checkpoint.verify(source):
            raise ConfigError(f"train.init_from: {problems[0]}")
        return Reader(source).weight
    raise ConfigError(
        f"train.init_from={source} is neither a run with checkpoints, nor a checkpoint, nor a Hugging Face folder"
    )
