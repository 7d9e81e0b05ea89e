"""Hugging Face folders: export a trained model so that `transformers` loads it; read one for a warm start."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import ConfigError, ModelConfig, counted
from configs.explain import shown
from configs.reading.parse import shortened
from models.families import FAMILIES, build
from models.moe.router import choosers

from .config_json import CONFIG, YARN_SINCE, from_hf_config, read_hf_config, to_hf_config
from .names import BIAS, GLM4_MOE, Architecture, bias_name, pieces
from .weight_files import open_tensors, same_values

SHARD_BYTES = 5 * 10**9
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OF_QUANTIZATION = (
    "weight_scale", "weight_scale_inv", "input_scale", "qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map",
    "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "SCB", "weight_format", "weight_packed",
    "weight_shape", "weight_zero_point",
)  # fmt: skip
"""Name suffixes of the tensors that accompany quantized weights."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Supported tensor dtypes, as safetensors names them; other dtypes are quantized codes, which need scales."""


def export_hf(
    module: nn.Module,
    config: ModelConfig,
    to: Path,
    special_tokens: Mapping[str, int | None] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and model*.safetensors (one shard's size of memory at a time).

    Args:
        config: resolved.
        special_tokens: {"bos_token_id", "eos_token_id", "pad_token_id": id, or None for none}; None: unknown.
        dtype: dtype of the tensors written, except balancing biases, which stay fp32; None: unchanged.

    Raises:
        ConfigError: no architecture in transformers computes the same as this model.
    """
    family = FAMILIES[config.family]
    if family.to_hf:
        tree, state = family.to_hf(config, module)
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_json(to / "config.json", {**tree, **(special_tokens or {})})
        _write_tensors(
            to, (_to_write(name, tensor, dtype or tensor.dtype) for name, tensor in state.items()), shard_bytes
        )
        return
    to_architecture = family.hf
    if to_architecture is None:
        raise ConfigError(f"model.family={config.family} has no Hugging Face architecture")
    arch = to_architecture(config)
    to.mkdir(mode=0o700, parents=True, exist_ok=True)
    tree = to_hf_config(config, arch)
    if config.rope_scaling and config.rope_scaling.kind == "yarn":
        print(
            f"muster: {to} has YaRN positions, which transformers computes as trained from version {YARN_SINCE} "
            "on; older versions differ",
            file=sys.stderr,
        )
    tree["torch_dtype"] = str(dtype or next(module.parameters()).dtype).removeprefix("torch.")
    if special_tokens is not None:
        # None is written too: transformers' defaults are ids of Llama's tokenizer.
        tree |= special_tokens
        _write_json(to / "generation_config.json", dict(special_tokens))
    _write_json(to / "config.json", tree)
    _write_tensors(to, _tensors(_state(module, config, arch), arch, dtype), shard_bytes)


def import_hf(folder: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Read a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Qwen2-MoE, Mixtral, GLM-4.5, dots1).

    Multi-token prediction layers (GLM-4.5), which come after the model's own, are ignored, as transformers does.

    Returns:
        The model's resolved config, and its weights under our names, each read from disk on access. Routers with a
        balancing bias have `router_bias_rate` 0, and the biases are among the weights, see `bias_name`.

    Raises:
        ConfigError: not such a folder, an unsupported variant, or tensors that are missing, unknown, or of the wrong
            shape or dtype. This is checked before any tensor is read, except two that should be equal.
    """
    folder = Path(folder)
    tree = read_hf_config(folder)
    config, arch = from_hf_config(tree, str(folder / CONFIG))
    beyond = tree.get("num_nextn_predict_layers") or 0 if arch is GLM4_MOE else 0
    return config, Weights(folder, config, arch, beyond, _quantization(tree))


def _quantization(tree: dict[str, Any]) -> str:
    """What config.json says about quantization, such as `fp8`; empty: nothing."""
    said = tree.get("quantization_config")
    return shortened(str(said.get("quant_method", "")), 60) if isinstance(said, dict) else ""


class Weights(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder under our names, in fp32, with experts stacked or separate there; lazy."""

    def __init__(
        self, folder: Path, config: ModelConfig, arch: Architecture, beyond: int = 0, quantization: str = ""
    ) -> None:
        self._beyond = tuple(f"model.layers.{config.num_layers + index}." for index in range(beyond))
        self._files = open_tensors(folder)
        if len(self._files) < config.num_layers:
            raise ConfigError(
                f"{folder} has {counted(len(self._files), 'tensor')}, too few for the "
                f"num_hidden_layers={config.num_layers} of its config.json"
            )
        with torch.device("meta"):
            module = build(config)
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        if arch.bias:
            self._shapes.update({bias_name(c.layer): (config.num_experts,) for c in choosers(module)})
        self._arch = arch
        self._folder, self._tied = folder, config.tie_embeddings
        used = {HEAD} if config.tie_embeddings else set()
        for name, shape in self._shapes.items():
            # Missing experts are not all listed.
            of_experts = ".mlp.experts." in name and not self._whole(name)
            if len(used) + (shape[0] if of_experts else 0) > 4 * len(self._files) + len(self._shapes):
                raise ConfigError(
                    f"{folder} has {counted(len(self._files), 'tensor')}, too few for the experts of its config.json"
                )
            used.update(self._parts(name))
        needed = used - {HEAD} if config.tie_embeddings else used
        missing = sorted(needed - self._files.keys())
        unknown = sorted(name for name in self._files.keys() - used if not self._is_nothing(name))
        scales = [name for name in unknown if name.endswith(OF_QUANTIZATION)]
        if scales:
            kind = quantization or f"it has tensors such as {shown(scales[0])}"
            raise ConfigError(
                f"{folder} is quantized ({kind}), which is not supported: convert its weights to bf16 first"
            )
        if missing or unknown:
            raise ConfigError(
                f"{folder}: its tensors do not match its config.json: {len(missing)} missing {shown(missing[:3])}, "
                f"{len(unknown)} unknown {shown(unknown[:3])}"
            )
        for name in self._shapes:
            self._check(name)
        both = config.tie_embeddings and {EMBEDDING, HEAD} <= self._files.keys()
        if both and not same_values(self._files[EMBEDDING], EMBEDDING, self._files[HEAD], HEAD):
            raise ConfigError(
                f"{folder}: config.json has tie_word_embeddings=true, but {HEAD} and {EMBEDDING} differ: set it to "
                "false, or remove the tensor that should not be there"
            )

    def __getitem__(self, name: str) -> Tensor:
        shape, parts = self._shapes[name], self._parts(name)
        out = None if len(parts) == 1 else torch.empty(shape)
        for theirs, index in parts.items():
            try:
                tensor = self._files[theirs].get_tensor(theirs).float()  # where 1e300 in F64 becomes infinite
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{self._folder}: tensor {theirs} cannot be read: {error}") from None
            if not tensor.isfinite().all():
                raise ConfigError(f"{self._folder}: tensor {theirs} has values that are not finite")
            if out is None:
                return tensor.view(shape)
            out[index] = tensor
        assert out is not None
        return out

    def _check(self, name: str) -> None:
        """Compare the header of a parameter's tensors with the expected shapes. Raises ConfigError."""
        whole = torch.empty(self._shapes[name], device="meta")
        for theirs, index in self._parts(name).items():
            found = self._files[theirs].get_slice(theirs)
            if found.get_dtype() not in FLOATS:
                raise ConfigError(
                    f"{self._folder}: tensor {theirs} has dtype {found.get_dtype()}: should be one of "
                    f"{', '.join(FLOATS)}"
                )
            if found.get_shape() != list(whole[index].shape):
                raise ConfigError(
                    f"{self._folder}: tensor {theirs} has shape {shown(found.get_shape())}, but config.json "
                    f"implies {list(whole[index].shape)}"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _is_nothing(self, theirs: str) -> bool:
        """Whether a tensor can be ignored: it belongs to a layer beyond the model's, is computed from config.json, or
        is empty, such as a shared expert of width 0."""
        if theirs.startswith(self._beyond) or theirs.endswith("rotary_emb.inv_freq"):
            return True
        return 0 in self._files[theirs].get_slice(theirs).get_shape()

    def _parts(self, name: str) -> dict[str, tuple]:
        if stacked := self._whole(name):
            return {stacked: (...,)}
        return dict(pieces(name, self._shapes[name], self._arch))

    def _whole(self, name: str) -> str | None:
        """The parameter's name in the folder, if it is a single tensor there."""
        stacked = name.replace(".mlp.", f".{self._arch.moe_block}.") if ".mlp.experts." in name else name
        tied = HEAD if self._tied and name == EMBEDDING else name  # as transformers does if the embedding is missing
        return next((candidate for candidate in (name, stacked, tied) if candidate in self._files), None)


def _state(module: nn.Module, config: ModelConfig, arch: Architecture) -> dict[str, Tensor]:
    """Parameters, and what an architecture has in addition: balancing biases; without shared experts one of width 0."""
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
    """For each tensor its name in the folder, its size in bytes, and a function that returns it."""
    for name, tensor in state.items():
        # A bf16 bias would choose different experts; transformers keeps it in fp32 too.
        kind = torch.float32 if name.endswith(BIAS) else dtype or tensor.dtype
        for theirs, index in pieces(name, tuple(tensor.shape), arch):
            yield _to_write(theirs, tensor.detach()[index], kind)


def _to_write(name: str, tensor: Tensor, kind: torch.dtype) -> tuple[str, int, Callable[[], Tensor]]:
    return name, tensor.numel() * kind.itemsize, lambda: tensor.to("cpu", kind, copy=True).contiguous()


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


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
