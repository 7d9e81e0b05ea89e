"""What a run is: validated configuration without torch, ray or deepspeed."""

from . import interrupt as interrupt  # before anything that takes time
from . import search_path as search_path  # first, before any library is imported
from .base import ConfigError, ExitCode, Section
from .credentials import MASK, mask, mask_all
from .load import flatten, from_dict, load, preset_names, to_yaml
from .private import private_files, private_folder
from .resolve import differences, resolve, with_workers, worker_counts
from .sections.model import BlockSparse, ModelConfig, RopeScaling
from .sections.run import Config
from .units import counted

__all__ = [
    "MASK",
    "BlockSparse",
    "Config",
    "ConfigError",
    "ExitCode",
    "ModelConfig",
    "RopeScaling",
    "Section",
    "counted",
    "differences",
    "flatten",
    "from_dict",
    "load",
    "mask",
    "mask_all",
    "preset_names",
    "private_files",
    "private_folder",
    "resolve",
    "to_yaml",
    "with_workers",
    "worker_counts",
]
