"""Hugging Face folders: write a trained model as one that `transformers` loads, read one as a warm start."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import ConfigError, ModelConfig

from .families import FAMILIES, build
from .hf_config import from_hf_config, to_hf_config
from .hf_names import BIAS, Architecture, bias_name, pieces
from .router import choosers

SHARD_BYTES = 5 * 10**9
END_OF_TEXT = "<|endoftext|>"


def export_hf(
    module: nn.Module,
    config: ModelConfig,
    to: Path,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, model*.safetensors (one shard's size of memory at a time) and the tokenizer's files.

    Args:
        config: resolved.
        tokenizer: a `tokenizer.json`.
        dtype: of the tensors written, but for balancing biases, which stay fp32; None: as they are.

    Raises:
        ConfigError: no architecture in transformers computes what this model does.
    """
    to_architecture = FAMILIES[config.family].hf
    if to_architecture is None:
        raise ConfigError(f"model.family={config.family} has no Hugging Face architecture")
    arch = to_architecture(config)
    to.mkdir(parents=True, exist_ok=True)
    tree = to_hf_config(config, arch)
    tree["torch_dtype"] = str(dtype or next(module.parameters()).dtype).removeprefix("torch.")
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, to, tree)
    _write_json(to / "config.json", tree)
    _write_tensors(to, _tensors(_state(module, config, arch), arch, dtype), shard_bytes)


def import_hf(folder: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Read a Hugging Face folder (Llama, Qwen3, Qwen3-MoE, Qwen2-MoE, Mixtral, GLM-4.5, dots1).

    Returns:
        The model's resolved config, and its weights under our names, each read from disk when it is looked up. Routers
        with a balancing bias have `router_bias_rate` 0, and the biases stand among the weights, see `bias_name`.

    Raises:
        ConfigError: not such a folder, an unsupported variant, tensors that are missing or unknown.
    """
    folder = Path(folder)
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, arch = from_hf_config(tree)
    except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder} is no Hugging Face model folder: {error!r}") from None
    return config, Weights(folder, config, arch)


class Weights(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder under our names, experts there stacked or one by one; lazy."""

    def __init__(self, folder: Path, config: ModelConfig, arch: Architecture):
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path} is not safetensors: {error}") from None
            self._files.update(dict.fromkeys(file.keys(), file))
        if not self._files:
            raise ConfigError(f"{folder} has no *.safetensors file")
        with torch.device("meta"):
            module = build(config)
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        if arch.bias:
            self._shapes.update({bias_name(c.layer): (config.num_experts,) for c in choosers(module)})
        self._arch = arch
        used = {"lm_head.weight"} if config.tie_embeddings else set()
        for name in self._shapes:
            used.update(self._parts(name))
        needed = used - {"lm_head.weight"} if config.tie_embeddings else used
        missing = sorted(needed - self._files.keys())
        unknown = sorted(name for name in self._files.keys() - used if not self._is_nothing(name))
        if missing or unknown:
            raise ConfigError(
                f"{folder}: its tensors are not those of its config.json: {len(missing)} missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]}"
            )

    def __getitem__(self, name: str) -> Tensor:
        shape, parts = self._shapes[name], self._parts(name)
        out = None
        for theirs, index in parts.items():
            tensor = self._files[theirs].get_tensor(theirs)
            out = torch.empty(shape, dtype=tensor.dtype) if out is None else out
            if tensor.shape != out[index].shape:
                raise ConfigError(
                    f"tensor {theirs} is {list(tensor.shape)}, but config.json makes it {list(out[index].shape)}"
                )
            out[index] = tensor
        assert out is not None
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _is_nothing(self, theirs: str) -> bool:
        """Whether a tensor can be left aside: computed from config.json, or empty, as a shared expert of width 0."""
        return theirs.endswith("rotary_emb.inv_freq") or 0 in self._files[theirs].get_slice(theirs).get_shape()

    def _parts(self, name: str) -> dict[str, tuple]:
        stacked = name.replace(".mlp.", f".{self._arch.moe_block}.") if ".mlp.experts." in name else name
        for candidate in (name, stacked):
            if candidate in self._files:
                return {candidate: (...,)}
        return dict(pieces(name, self._shapes[name], self._arch))


def _state(module: nn.Module, config: ModelConfig, arch: Architecture) -> dict[str, Tensor]:
    """Parameters, and what an architecture has beside them: balancing biases, a shared expert of width 0 for none."""
    state: dict[str, Tensor] = dict(module.named_parameters())
    if not arch.bias:
        return state
    hidden = config.hidden_size
    for chooser in choosers(module):
        state[bias_name(chooser.layer)] = torch.zeros(config.num_experts) if chooser.bias is None else chooser.bias
        if not config.shared_expert_size:
            expert = f"model.layers.{chooser.layer}.mlp.shared_expert"
            state |= {f"{expert}.{up}_proj.weight": torch.empty(0, hidden) for up in ("gate", "up")}
            state[f"{expert}.down_proj.weight"] = torch.empty(hidden, 0)
    return state


def _tensors(
    state: Mapping[str, Tensor], arch: Architecture, dtype: torch.dtype | None
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Name there, bytes, and how to get each tensor."""
    for name, tensor in state.items():
        # A bias in bf16 would choose other experts; transformers keeps it in fp32 too.
        kind = torch.float32 if name.endswith(BIAS) else dtype or tensor.dtype
        for theirs, index in pieces(name, tuple(tensor.shape), arch):
            part = tensor.detach()[index]
            size = part.numel() * kind.itemsize

            def get(part: Tensor = part, kind: torch.dtype = kind) -> Tensor:
                return part.to("cpu", kind, copy=True).contiguous()

            yield theirs, size, get


def _write_tensors(to: Path, tensors: Iterator[tuple[str, int, Callable[[], Tensor]]], shard_bytes: int) -> None:
    shards: list[dict[str, Callable[[], Tensor]]] = [{}]
    total = filled = 0
    for name, size, get in tensors:
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = get
        filled, total = filled + size, total + size
    where = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: get() for name, get in shard.items()}, to / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        _write_json(to / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _copy_tokenizer(tokenizer: Path, to: Path, tree: dict[str, Any]) -> None:
    """Copy tokenizer.json, tell transformers how to load it, and name the end of text in config.json."""
    shutil.copyfile(tokenizer, to / "tokenizer.json")
    added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens") or []
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_max_length"] = tree["max_position_embeddings"]
    for token in added:
        if token["content"] == END_OF_TEXT:
            settings["eos_token"] = settings["bos_token"] = END_OF_TEXT
            tree["eos_token_id"] = tree["bos_token_id"] = token["id"]
    _write_json(to / "tokenizer_config.json", settings)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
