"""Identity of a run, and the whole config in one object."""

import re
from typing import Annotated

from pydantic import Field, PrivateAttr, SerializeAsAny, ValidationInfo, WrapValidator, field_validator

from configs.base import Section, file_path

from .checkpoint import CheckpointConfig
from .cluster import ClusterConfig
from .data import DataConfig
from .families.convnet import ConvNetConfig
from .families.encoder import DualEncoderConfig, EncoderConfig, MaeConfig, VitConfig
from .families.generative import AutoencoderConfig, DiffusionConfig, GanConfig
from .families.graph import GnnConfig
from .families.hf import TransformersConfig
from .families.mlp import MlpConfig
from .families.ode import LatentOdeConfig, NeuralOdeConfig
from .families.recurrent import RecurrentConfig
from .families.seq2seq import EncoderDecoderConfig
from .family import SECTIONS, ModelSection, by_family
from .model import ModelConfig
from .optim import OptimConfig
from .parallel import ParallelConfig
from .tracking import TrackingConfig
from .train import TrainConfig

OURS: dict[str, type[ModelSection]] = {
    "mlp": MlpConfig,
    "convnet": ConvNetConfig,
    "encoder": EncoderConfig,
    "vit": VitConfig,
    "mae": MaeConfig,
    "autoencoder": AutoencoderConfig,
    "diffusion": DiffusionConfig,
    "gan": GanConfig,
    "recurrent": RecurrentConfig,
    "transformers": TransformersConfig,
    "encoder_decoder": EncoderDecoderConfig,
    "gnn": GnnConfig,
    "neural_ode": NeuralOdeConfig,
    "latent_ode": LatentOdeConfig,
    "dual_encoder": DualEncoderConfig,
}
"""Families of this project other than the decoder; a plugin may replace one."""
SECTIONS |= OURS

LONGEST = 200
"""Longest name of a run or a sweep: the names of files derived from it are longer."""


def folder_name(name: str) -> str:
    """The name, if it is valid as a folder name on every system. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError("letters, digits, '.', '_' and '-' only, as it names a folder")
    if len(name) > LONGEST:
        raise ValueError(f"at most {LONGEST} characters, as it names a folder")
    return name


class RunConfig(Section):
    name: str = "run"
    """Name of the run's folder; the same name again continues the run."""
    root: str = "runs"
    """Parent folder of all runs."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, and dropout."""

    _plain = field_validator("name")(folder_name)
    _path = field_validator("root")(file_path)


class Config(Section):
    """The whole config of a run. No torch: a laptop can load, check and plan it."""

    run: RunConfig = RunConfig()
    model: Annotated[SerializeAsAny[ModelConfig], WrapValidator(by_family)] = ModelConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    task: str = ""
    """What is learned: an entry of the task table (`models/tasks/table.py`), or a plugin's; empty: the family's
    default."""
    plugins: tuple[str, ...] = Field(())
    """Python modules (`package.module`) or files (`path/to/file.py`) imported before the model is built."""

    @field_validator("task")
    @classmethod
    def _of_the_family(cls, task: str, info: ValidationInfo) -> str:
        return task or getattr(info.data.get("model"), "default_task", "")

    _defaults: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def defaults(self) -> dict[str, str]:
        """The keys chosen by a preset and not by the user, and the reason if the value differs from the preset's."""
        return self._defaults

    def __eq__(self, other: object) -> bool:
        """Equality by the values alone, whoever chose them."""
        return isinstance(other, Config) and super().__eq__(other.with_defaults(self._defaults))

    def with_defaults(self, defaults: dict[str, str]) -> "Config":
        """The same config, with these keys marked as a preset's choice."""
        config = self.model_copy()
        config._defaults = defaults
        return config

    @field_validator("plugins")
    @classmethod
    def _paths(cls, plugins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(file_path, plugins))
