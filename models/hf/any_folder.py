"""Hugging Face folders of any architecture: weights for a network, and a network written as one."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from configs import ConfigError
from configs.explain import shown
from configs.reading.parse import clip

from .any_architecture import AnyArchitecture, AnySequenceToSequence, AnyTextClassifier, config_of
from .any_keys import keys_of_folder
from .config_json import read_hf_config
from .weight_files import open_tensors


class Loaded(NamedTuple):
    """What a folder holds for a network."""

    weights: Mapping[str, Tensor]
    """Parameters by their names in our module, on the CPU; without those that are to keep their initial values."""
    memory: dict[str, list[list[float]]]
    """BatchNorm's running statistics."""
    differs: dict[str, list[Any]]
    """{what: [there, here]}: keys of the config that make the same weights compute something else, and parameters
    outside the base model that only one of the two has."""


def load_folder(module: AnyArchitecture, folder: Path) -> Loaded:
    """The weights of a folder for a network, converted as transformers does. Heads may differ from the folder's: a new
    one keeps its initial weights. The base model must be whole.

    Raises:
        ConfigError: not such a folder, or its tensors do not fit.
    """
    network = module.network
    files = open_tensors(folder)
    try:
        state = {name: file.get_tensor(name) for name, file in files.items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: its tensors cannot be read: {clip(error, 200)}") from None
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"{folder}: tensor {shown(name)} has values that are not finite")
    how: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        with _quiet():
            found, said = type(network).from_pretrained(
                None, config=copy.deepcopy(network.config), state_dict=state, **how
            )
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: its tensors do not fit {type(network).__name__}: {clip(error, 300)}") from None
    other = {name: f"{name} in another shape" for name, *_ in said["mismatched_keys"]}
    new = other | {name: f"no {name}" for name in said["missing_keys"]}
    unknown = {name: f"{name}, which the model lacks" for name in said["unexpected_keys"]}
    if of_base := sorted(name for name in new | unknown if name.startswith(f"{network.base_model_prefix}.")):
        what = (new | unknown)[of_base[0]]
        raise ConfigError(f"{folder} has {what}: set model.architecture and model.config to match it")
    differs = _differences(module, folder)
    differs |= {name: ["other shape" if name in other else "missing", "new"] for name in sorted(new)}
    differs |= {name: ["not used", "missing"] for name in sorted(unknown)}
    statistics = {name: x for name, x in found.named_buffers() if name.endswith((".running_mean", ".running_var"))}
    return Loaded(
        {f"network.{name}": parameter.detach() for name, parameter in found.named_parameters() if name not in new},
        {f"network.{name}": [value.double().tolist()] for name, value in statistics.items()},
        differs,
    )


def _differences(module: AnyArchitecture, folder: Path) -> dict[str, list[Any]]:
    ours = module.config
    there = keys_of_folder(read_hf_config(folder), {"architecture": ours.architecture}, folder)
    section = type(ours).model_validate(there)
    one, other = (config_of(each, type(module.network)).to_dict() for each in (section, ours))
    of_a_head = {"architectures", "id2label", "label2id", "vocab_size", "num_labels", "dtype", "transformers_version"}
    return {
        f"model.config.{key}": [one.get(key), other.get(key)]
        for key in sorted(one.keys() | other.keys())
        if key not in of_a_head and not key.endswith("_token_id") and one.get(key) != other.get(key)
    }


def save_folder(
    module: AnyArchitecture,
    to: Path,
    special_tokens: Mapping[str, int | None] | None,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    """Write config.json and model*.safetensors, as `models.hf.folder.export_hf`. The module is not for use after it."""
    network, tokens = module.network, dict(special_tokens or {})
    if tokens and isinstance(module, AnyTextClassifier) and module.pad is not None:
        tokens["pad_token_id"] = module.pad
    if tokens and isinstance(module, AnySequenceToSequence):  # a target begins after it, and it pads
        tokens = {"decoder_start_token_id": tokens["eos_token_id"], **tokens}
        tokens["pad_token_id"] = tokens["eos_token_id"] if module.pad is None else module.pad
    for key, value in tokens.items():
        for config in filter(None, (network.config, getattr(network, "generation_config", None))):
            setattr(config, key, value)
    if dtype:
        network.to(dtype)
    with _quiet():
        network.save_pretrained(to, max_shard_size=shard_bytes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and reports."""
    from transformers.utils import logging  # an extra

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
