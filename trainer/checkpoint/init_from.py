"""Start a run from the weights of another: a run, one of its checkpoints, or a Hugging Face folder."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config, ConfigError, ModelConfig, counted
from configs.load import validated
from configs.reading.parse import is_file
from models.families import build
from models.hf.folder import import_hf
from models.hf.names import ARCHITECTURES, bias_name
from models.moe.upcycle import block_of, granularity, upcycle
from models.tasks.language_modelling import BIAS
from trainer.data.manifest import TOKENIZER, read_manifests
from trainer.data.tokenizer.tokenizer import tokenizer_file

from . import same_family, store
from .manifest import MANIFEST, MASTER, CheckpointError, committed, folder
from .store import Reader

Shapes = Mapping[str, Sequence[int]]
"""Shapes of parameters by name."""


@dataclass(frozen=True)
class _Source:
    """What `train.init_from` points to, with the plain model's parameter names."""

    shapes: Shapes
    weight: Callable[[str], Tensor]
    """Reads one parameter by name."""
    bias: Mapping[int, list[float]]
    """MoE layer -> its router's balancing bias, one number per expert; for the layers that have one."""
    model: ModelConfig


SHOWN_BY_NAMES_AND_SHAPES = {
    "vocab_size", "num_layers", "hidden_size", "num_kv_heads", "head_dim", "intermediate_size", "qk_norm", "qkv_bias",
    "tie_embeddings", "num_experts", "expert_size", "shared_expert_size", "shared_expert_gate", "moe_every",
    "first_dense_layers",
}  # fmt: skip
OF_TRAINING = {
    "dropout", "init_std", "loss_chunk", "router_jitter", "router_bias_rate", "aux_loss_over", "aux_loss_weight",
    "z_loss_weight", "capacity_factor", "pad_to_capacity",
}  # fmt: skip
OF_EXPERTS = {"top_k", "router", "norm_topk_prob", "router_scale", "expert_groups", "top_groups"}
"""Keys of model.*. For the same weights, those in the first two sets do not change the output; all others change the
output but no shape."""


def check_source(config: Config) -> dict[str, list[Any]]:
    """Check whether `train.init_from` fits the whole model; only names and shapes are read.

    Returns:
        {key: [there, here]} of settings that make the same weights compute something else, though no name or shape
        differs. That may be intended (longer contexts, more experts per token), and the user should see it. Values
        are JSON values.

    Raises:
        ConfigError: as from `load_weights`; it has parameters that the model lacks; `train.upcycle` has nothing to do.
    """
    if not isinstance(config.model, ModelConfig):
        return same_family.check_same(config)
    with torch.device("meta"):
        wanted = _shapes(build(config.model))
    source = _open(config, digests=False)
    blocks = _fit(source, wanted, config)
    if config.train.upcycle and not blocks:
        if config.model.is_moe:
            why = f"train.init_from={config.train.init_from} already has experts: set train.upcycle=null"
        else:
            why = "model.num_experts is 0: set it, or train.upcycle=null"
        raise ConfigError(f"train.upcycle turns a dense model's MLPs into experts, but {why}")
    if unused := [name for name in source.shapes if name not in wanted and name.rsplit(".", 2)[0] not in blocks]:
        more = f" and {counted(len(unused) - 1, 'more parameter')}" if unused[1:] else ""
        raise ConfigError(
            f"train.init_from={config.train.init_from} has {unused[0]}{more}, which this model lacks: "
            f"{_settings(source.model, config)}"
        )
    return _differences(source, config.model) | _other_tokenizer(config)


def other_function(checkpoint_dir: Path, model: ModelConfig) -> dict[str, list[Any]]:
    """`check_source`'s result for keys of model.*, for a checkpoint whose weights fit; empty if it is unreadable."""
    reader, _ = store.examine(checkpoint_dir, digests=False)
    if not isinstance(model, ModelConfig):
        return same_family.other_keys(reader, model) if reader else {}
    with contextlib.suppress(ConfigError):  # it does not describe its model
        return _differences(_checkpoint(reader), model) if reader else {}
    return {}


def _differences(source: _Source, model: ModelConfig) -> dict[str, list[Any]]:
    there, here = source.model.model_dump(mode="json"), model.model_dump(mode="json")
    keys = there.keys() - SHOWN_BY_NAMES_AND_SHAPES - OF_TRAINING - {"max_positions"}
    keys -= set() if source.model.is_moe and model.is_moe else OF_EXPERTS
    found = {key: [there[key], here[key]] for key in there if key in keys and there[key] != here[key]}
    if (here["max_positions"] or 0) > (there["max_positions"] or math.inf):
        found["max_positions"] = [there["max_positions"], here["max_positions"]]
    if model.router_bias_rate is None and any(map(any, source.bias.values())):
        found["router_bias_rate"] = [there["router_bias_rate"], None]
    return {f"model.{key}": pair for key, pair in found.items()}


def _other_tokenizer(config: Config) -> dict[str, list[Any]]:
    """The digests of the tokenizer.json beside the weights and of the data's tokenizer, if both exist and differ."""
    assert config.train.init_from
    file = Path(config.train.init_from).expanduser() / TOKENIZER
    with contextlib.suppress(ConfigError):  # the data have not been prepared
        here = read_manifests(config.data)[0].tokenizer.sha256
        if is_file(file) and (there := hashlib.sha256(tokenizer_file(file).read_bytes()).hexdigest()) != here:
            return {"tokenizer": [f"sha256 {digest[:12]}" for digest in (there, here)]}
    return {}


def load_weights(module: nn.Module, config: Config) -> dict[str, list[list[float]]]:
    """Fill a module, the plain model or a part of it, from `train.init_from`, upcycled as `train.upcycle` says.

    Moments, step and cursor are not taken over. One parameter at a time is in memory.

    Args:
        config: resolved, with `train.init_from`.

    Returns:
        The part of the task's memory that belongs to the weights: balancing biases of all the model's routers, running
        statistics; empty if there is none.

    Raises:
        ConfigError: there is no run, checkpoint or Hugging Face folder, it is damaged, or its parameters do not fit.
    """
    if not isinstance(config.model, ModelConfig):
        return same_family.load_same(module, config)
    source, model, how = _open(config, digests=True), config.model, config.train.upcycle
    blocks = _fit(source, _shapes(module), config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            try:
                if width := blocks.get(block_of(name)):
                    assert how
                    upcycle(parameter, name, source.weight, width, model, how, config.run.seed)
                else:
                    parameter.copy_(source.weight(name))
            except CheckpointError as error:
                raise ConfigError(f"train.init_from: {error}") from None
    moe_layers = [i for i in range(model.num_layers) if model.is_moe_layer(i)]
    unbiased = [0.0] * model.num_experts
    return {BIAS: [source.bias.get(i, unbiased) for i in moe_layers]} if source.bias else {}


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _fit(start: _Source, wanted: Shapes, config: Config) -> dict[str | None, int]:
    """{MoE block: width of the source's MLP} for the blocks that are dense in the source. Raises ConfigError."""
    given, source, experts = start.shapes, config.train.init_from, config.model.num_experts
    places = {block: f"{block}.gate_proj.weight" for block in map(block_of, wanted) if block}
    blocks: dict[str | None, int] = {
        block: given[gate][0] for block, gate in places.items() if any(given.get(gate, ())[:1])
    }
    if blocks and config.train.upcycle is None:
        raise ConfigError(
            f"train.init_from={source} is dense in {next(iter(blocks))}, but the model has {experts} experts: "
            "set train.upcycle={} to copy its MLPs into them, or model.num_experts=0"
        )
    hidden = config.model.hidden_size
    dense = {
        f"{block}.{part}_proj.weight": (width, hidden) for block, width in blocks.items() for part in ("gate", "up")
    }
    dense |= {f"{block}.down_proj.weight": (hidden, width) for block, width in blocks.items()}
    for name, shape in {**wanted, **dense}.items():
        if name not in dense and block_of(name) in blocks:
            continue
        if name not in given:
            raise ConfigError(
                f"train.init_from={source} has no {name}, which this model has: {_settings(start.model, config)}"
            )
        if tuple(given[name]) != tuple(shape):
            raise ConfigError(
                f"train.init_from={source}: {name} has shape {list(given[name])}, the model's is {list(shape)}: "
                f"{_settings(start.model, config)}"
            )
    for width in blocks.values():
        granularity(width, config.model)
    if any(len(bias) != experts for bias in start.bias.values()):
        raise ConfigError(
            f"train.init_from={source}: its router bias does not have one number for each of the {experts} experts"
        )
    return blocks


def _settings(there: ModelConfig, config: Config) -> str:
    """End of a message: the keys to set so that the model gets the names and shapes of `there`."""
    here = config.model
    keys = SHOWN_BY_NAMES_AND_SHAPES | {"num_heads"}
    if config.train.upcycle or not (there.is_moe or here.is_moe):
        keys -= {key for key in keys if "expert" in key or key in ("moe_every", "first_dense_layers")}
    if there.num_moe_layers == there.num_layers:
        keys -= {"intermediate_size"}
    differ = [key for key in ModelConfig.model_fields if key in keys and getattr(there, key) != getattr(here, key)]
    layers = ""
    if "num_layers" in differ:
        layers = f"it has {counted(there.num_layers, 'layer')}, but model.num_layers is {here.num_layers}: "
    settings = " ".join(f"model.{key}={json.dumps(getattr(there, key))}" for key in differ)
    return f"{layers}set {settings or 'model.* to its architecture'}"


def _open(config: Config, digests: bool) -> _Source:
    assert config.train.init_from
    source = Path(config.train.init_from).expanduser()
    if (source / "config.json").is_file():
        return _hugging_face(source)
    if (steps := committed(source)) and not (source / MANIFEST).is_file():
        source = folder(source, steps[-1])
    if (source / MANIFEST).is_file():
        reader, problems = store.examine(source, digests=digests)
        if not reader:
            raise ConfigError(f"train.init_from: {problems[0]}")
        return _checkpoint(reader)
    raise ConfigError(
        f"train.init_from={source} is neither a run with checkpoints, nor a checkpoint, nor a Hugging Face folder "
        f"(config.json and *.safetensors of {', '.join(ARCHITECTURES)})"
    )


def _checkpoint(reader: Reader) -> _Source:
    manifest = reader.manifest
    shapes = manifest.shapes[MASTER]
    tree, where = manifest.config.get("model"), f"train.init_from: {reader.path}: config.model"
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} is missing: it describes the model that the weights belong to")
    model = validated(ModelConfig, tree, where)
    bias = manifest.state.memory.get(BIAS, [])
    return _Source(shapes, reader.weight, dict(zip(_moe_layers(shapes), bias, strict=False)), model)


def _hugging_face(source: Path) -> _Source:
    model, weights = import_hf(source)
    with torch.device("meta"):
        shapes = _shapes(build(model))
    bias = {i: weights[bias_name(i)].float().tolist() for i in _moe_layers(shapes) if bias_name(i) in weights}
    return _Source(shapes, weights.__getitem__, bias, model)


def _moe_layers(shapes: Shapes) -> list[int]:
    found = (re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.down_proj", name) for name in shapes)
    return sorted(int(match[1]) for match in found if match)
