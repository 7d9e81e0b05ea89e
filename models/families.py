"""The table of model families. A plugin adds one with `FAMILIES["name"] = Family(...)`."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from configs import ConfigError, ModelConfig

from .decoder.model import Decoder
from .hf.names import Architecture, architecture


@dataclass(frozen=True)
class Family:
    """What muster needs to know of a family of models.

    Attributes:
        build: makes the module on the default device, parameters not yet filled. The module has `init_weights(seed)`,
            `set_activation_checkpointing(every)`, `logits(batch)`, and called with a `Batch` returns a `LossOutput`.
        hf: the Hugging Face architecture of a config, ConfigError if none fits it; None: the family has none.
    """

    build: Callable[[ModelConfig], nn.Module]
    hf: Callable[[ModelConfig], Architecture] | None = None


FAMILIES: dict[str, Family] = {"decoder": Family(build=Decoder, hf=architecture)}


def build(config: ModelConfig) -> nn.Module:
    """The model of `config.family`; call its `init_weights(seed)` next.

    Raises:
        ConfigError: no such family.
    """
    if config.family not in FAMILIES:
        near = difflib.get_close_matches(config.family, FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(FAMILIES))}"
        raise ConfigError(f"model.family={config.family}: no such family; {hint}")
    return FAMILIES[config.family].build(config)
