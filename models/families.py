"""The table of model families. A plugin adds one with `FAMILIES["name"] = Family(...)`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config, ModelConfig
from configs.sections.families.graph import GnnConfig
from configs.sections.families.ode import LatentOdeConfig, NeuralOdeConfig
from configs.sections.family import SECTIONS, ModelSection, no_such
from configs.sections.pairs import FAMILY_ENDS, Ends, Words
from configs.sections.run import OURS

from .decoder.model import Decoder
from .generative import diffusion
from .generative.autoencoder import Autoencoder
from .generative.gan import Gan
from .hf.any_architecture import build_any
from .hf.any_folder import Loaded, load_folder, save_folder
from .hf.bidirectional import to_hf
from .hf.names import Architecture, architecture
from .mlp import Mlp
from .planning.cost import training_flops_per_token
from .sequence.encoder import encoder
from .sequence.encoder_decoder import encoder_decoder
from .sequence.recurrent import recurrent, training_flops
from .vision.convnet import ConvNet
from .vision.dual_encoder import DualEncoder
from .vision.mae import Mae
from .vision.vit import Vit


@dataclass(frozen=True)
class Family:
    """What muster needs to know about a model family.

    Attributes:
        build: builds the module on the default device, without initialising parameters. A decoder's has
            `init_weights(seed)`, `set_activation_checkpointing(every)`, `logits(batch)`, and called with a `Batch`
            returns a `LossOutput`; other families need only what their task calls (`init_weights` is called if there is
            one).
        section: its keys under `model:`. It also says how the network may be split.
        takes, gives: what the network does, in the words of `models.tasks.task.Task`; each one or several.
        hf: the Hugging Face architecture of a config, ConfigError if none matches; None: the family has none.
        to_hf: config.json and the weights of transformers' class, for a family other than the decoder that has one;
            raises ConfigError if the config computes something else.
    """

    build: Callable[[Any], nn.Module]
    section: type[ModelSection] = ModelConfig
    takes: Words = "tokens"
    gives: Words = "loss of tokens"
    hf: Callable[[ModelConfig], Architecture] | None = None
    load: Callable[[Any, Path], Loaded] | None = None
    """Reads a Hugging Face folder for a module; None: the family has none, or is the decoder."""
    save: Callable[[Any, Path, Mapping[str, int | None] | None, torch.dtype | None, int], None] | None = None
    """Writes a module as such a folder, with the ids of special tokens, in a dtype, in files of at most so many bytes.
    """
    to_hf: Callable[[Any, nn.Module], tuple[dict[str, Any], dict[str, Tensor]]] | None = None
    flops: Callable[[Config], float | None] | None = None
    """Training FLOPs per example, for a family with a formula; otherwise they are counted (`models.flops`), as where
    it gives None."""

    @property
    def exported(self) -> bool:
        """Whether there is a Hugging Face architecture for some of its networks."""
        return bool(self.hf or self.to_hf or self.save)


def _decoder_flops(config: Config) -> float:
    return training_flops_per_token(config.model, config.train.seq_len) * config.train.seq_len


def _gnn(config: GnnConfig) -> nn.Module:
    with torch.device("cpu"):  # not the one that the model is built on, such as the meta device
        from .graph.gnn import Gnn  # torch_geometric, an extra
    return Gnn(config)


def _neural_ode(config: NeuralOdeConfig) -> nn.Module:
    with torch.device("cpu"):  # for tables that torchdiffeq makes as it is imported
        from .continuous.ode import NeuralOde  # torchdiffeq, an extra
    return NeuralOde(config)


def _latent_ode(config: LatentOdeConfig) -> nn.Module:
    with torch.device("cpu"):
        from .continuous.latent import LatentOde  # torchdiffeq, an extra
    return LatentOde(config)


class Families(dict[str, Family]):
    """Registers with `configs` what it needs to know of a family when the family is added."""

    def __setitem__(self, name: str, family: Family) -> None:
        SECTIONS[name], FAMILY_ENDS[name] = family.section, Ends(family.takes, family.gives)
        super().__setitem__(name, family)


FAMILIES = Families()


def _add(name: str, build: Callable[[Any], nn.Module], **more: Any) -> None:
    """One of our own, whose section and ends `configs` knows already."""
    FAMILIES[name] = Family(build, OURS[name], *FAMILY_ENDS[name], **more)


FAMILIES["decoder"] = Family(build=Decoder, hf=architecture, flops=_decoder_flops)
_add("mlp", Mlp)
_add("convnet", ConvNet)
_add("encoder", encoder, to_hf=to_hf)
_add("vit", Vit, to_hf=to_hf)
_add("mae", Mae)
_add("autoencoder", Autoencoder)
_add("diffusion", diffusion.build)
_add("gan", Gan)
_add("recurrent", recurrent, flops=training_flops)
_add("transformers", build_any, load=load_folder, save=save_folder)
_add("encoder_decoder", encoder_decoder)
_add("gnn", _gnn)
_add("neural_ode", _neural_ode)
_add("latent_ode", _latent_ode)
_add("dual_encoder", DualEncoder)


def family_of(config: ModelSection) -> Family:
    """The entry of `config.family`.

    Raises:
        ConfigError: no such family.
    """
    if config.family not in FAMILIES:
        raise no_such("model.family", config.family, FAMILIES)
    return FAMILIES[config.family]


def parameter_count(config: ModelSection) -> int:
    """Parameters of the model of `config.family`, built without memory. Raises ConfigError as `family_of`."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


def build(config: ModelSection) -> nn.Module:
    """The model of `config.family`, to be initialised by `models.init.fill`. Raises ConfigError as `family_of`."""
    return family_of(config).build(config)
