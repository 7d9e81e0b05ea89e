"""A decoder's config as config.json of a Hugging Face folder, and back (no torch)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from configs import Config, ConfigError, ModelConfig
from configs.base import MOST_FLOAT, Length, Size
from configs.explain import shown
from configs.load import read_mapping, validated
from configs.reading.parse import MAX_JSON_BYTES, is_file, is_folder, parse_json, read_text
from configs.sections.model import MOST_LAYERS

from .any_keys import keys_of_folder
from .names import (
    ARCHITECTURES,
    DENSE,
    DOTS1,
    GLM4_MOE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    Architecture,
    dense_layers,
)

CONFIG, RUN_CONFIG = "config.json", "config.yaml"
ANY = "transformers"
"""The family of any architecture."""
_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "original_max_positions": "original_max_position_embeddings",
    },
}


YARN_SINCE = "4.57.0"
"""First version that computes YaRN as trained. Older ones use the ratio of max_position_embeddings to
original_max_position_embeddings in place of the factor, and before that took max_position_embeddings as the original
length."""


def to_hf_config(config: ModelConfig, arch: Architecture) -> dict[str, Any]:
    """config.json of a resolved config, in keys that transformers 4 and 5 both read."""
    tree: dict[str, Any] = {
        "architectures": [arch.name],
        "model_type": arch.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size if arch is MIXTRAL else config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if config.rope_scaling:
        keys = _ROPE_KEYS[config.rope_scaling.kind]
        scaling = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in keys.items()}
        tree["rope_scaling"] = {"rope_type": config.rope_scaling.kind, **scaling}
        if config.rope_scaling.kind == "yarn":
            tree["transformers_version"] = YARN_SINCE
    if arch not in (LLAMA, GLM4_MOE):
        tree["sliding_window"] = config.sliding_window
    if arch in (QWEN3, QWEN3_MOE, QWEN2, QWEN2_MOE, DOTS1):
        tree["use_sliding_window"] = config.sliding_window is not None
        tree["max_window_layers"] = 0 if config.sliding_window else config.num_layers
    if config.is_moe:
        tree["num_experts_per_tok"] = config.top_k
    if arch in (MIXTRAL, QWEN3_MOE, QWEN2_MOE):
        tree["num_local_experts"] = config.num_experts
    if config.is_moe and arch is not MIXTRAL:
        tree["moe_intermediate_size"] = config.expert_size
        tree["norm_topk_prob"] = config.norm_topk_prob
    if arch in (QWEN3_MOE, QWEN2_MOE):
        tree["num_experts"] = config.num_experts
        tree["decoder_sparse_step"] = config.moe_every
        tree["mlp_only_layers"] = list(range(config.first_dense_layers))
    if arch is QWEN2_MOE:
        tree["qkv_bias"] = config.qkv_bias
        tree["shared_expert_intermediate_size"] = config.shared_expert_size
    if arch in (GLM4_MOE, DOTS1):
        assert config.expert_size
        tree["n_routed_experts"] = config.num_experts
        tree["n_shared_experts"] = config.shared_expert_size // config.expert_size
        tree["n_group"] = config.expert_groups
        tree["topk_group"] = config.top_groups
        tree["routed_scaling_factor"] = config.router_scale
        tree["first_k_dense_replace"] = dense_layers(config)
    if arch is GLM4_MOE:
        tree["use_qk_norm"] = config.qk_norm
        tree["partial_rotary_factor"] = 1.0
        tree["num_nextn_predict_layers"] = 0
    return tree


Positive = Annotated[float, Field(gt=0, le=MOST_FLOAT)]
AtLeastOne = Annotated[float, Field(ge=1, le=MOST_FLOAT)]
Count = Annotated[int, Field(ge=0, le=2**20)]


class _Strict(BaseModel):
    """Strict JSON types: no "3" for 3, no 1 for true. Unlisted keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Rope(_Strict):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: AtLeastOne | None = None
    partial_rotary_factor: Positive | None = None
    factor: AtLeastOne | None = None
    original_max_position_embeddings: Length | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    truncate: bool | None = None
    attention_factor: Any = None
    mscale: Any = None
    mscale_all_dim: Any = None
    full_attention: Any = None
    sliding_attention: Any = None


class _HFConfig(_Strict):
    """The supported keys of config.json, in the terms of transformers; None: the key is null or missing."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Length = 2048
    rms_norm_eps: Positive = 1e-6
    initializer_range: Positive = 0.02
    tie_word_embeddings: bool = False
    use_qk_norm: bool = False
    qkv_bias: bool = False
    num_nextn_predict_layers: Count | None = None

    rope_theta: AtLeastOne = 1e4
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: Length | None = None

    sliding_window: Annotated[int, Field(ge=0, le=2**30)] | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: Annotated[list[str], Field(max_length=MOST_LAYERS)] | None = None

    num_experts: Count | None = None
    num_local_experts: Count | None = None
    n_routed_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Size | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: Annotated[list[int], Field(max_length=MOST_LAYERS)] | None = None
    shared_expert_intermediate_size: Annotated[int, Field(ge=0, le=2**24)] | None = None
    n_shared_experts: Count | None = None
    first_k_dense_replace: Count | None = None
    n_group: Size | None = None
    topk_group: Size | None = None
    routed_scaling_factor: Positive = 1.0


_UNSUPPORTED: tuple[tuple[str, Any, str], ...] = (
    ("attention_bias", False, " (biases of q, k and v without one of o are read from qwen2 and qwen2_moe)"),
    ("mlp_bias", False, ""),
    ("hidden_act", "silu", ""),
    ("transformers_weights", None, ""),
)
"""Keys, the only value that the decoder supports, and a supported alternative."""


def read_hf_config(folder: Path) -> Any:
    """The raw config.json of a folder, not validated. Raises ConfigError."""
    path = folder / CONFIG
    if not is_folder(folder):
        raise ConfigError(f"{folder}: no such folder")
    if not is_file(path):
        raise ConfigError(
            f"{folder} is not a Hugging Face model folder: it has no {CONFIG}; supported are {', '.join(ARCHITECTURES)}"
        )
    try:
        return parse_json(read_text(path, MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None


def model_keys(folder: Path, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keys of model.* for the model in a folder: a run of ours, or Hugging Face's.

    Args:
        own: keys that will be put on top, whose family decides how a folder of Hugging Face's is read.

    Raises:
        ConfigError: it cannot be read.
    """
    if is_file(folder / RUN_CONFIG):
        model = validated(Config, read_mapping(folder / RUN_CONFIG), str(folder / RUN_CONFIG)).model
    elif own and own.get("family") == ANY:
        return keys_of_folder(read_hf_config(folder), own, folder)
    else:
        model, _ = from_hf_config(read_hf_config(folder), str(folder / CONFIG))
    return model.model_dump(mode="json")


def from_hf_config(tree: Any, where: str = "config.json") -> tuple[ModelConfig, Architecture]:
    """The config of a decoder that computes what this config.json describes.

    Args:
        tree: the parsed JSON.
        where: the file's name, for messages.

    Raises:
        ConfigError: an unsupported architecture, a variant that the decoder family lacks, or an invalid value.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} holds {shown(tree)}, not the keys of a model")
    kind = tree.get("model_type")
    arch = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if arch is None and tree.get("kv_lora_rank"):
        raise ConfigError(
            f"{where}: model_type {shown(kind)} has multi-head latent attention "
            f"(kv_lora_rank={shown(tree['kv_lora_rank'])}), but the decoder has grouped-query attention; experts "
            "like DeepSeek-V3's can be read from glm4_moe and dots1"
        )
    if arch is None:
        raise ConfigError(
            f"{where}: model_type {shown(kind)} is not supported: should be one of {', '.join(ARCHITECTURES)}; "
            f"model.family={ANY} takes others"
        )
    tree = {**arch.defaults, **tree}
    for key, only, instead in _UNSUPPORTED:
        if tree.get(key, only) != only:
            raise ConfigError(f"{where}: {key}={shown(tree[key])} is not supported, only {shown(only)}{instead}")
    given = validated(_HFConfig, tree, where)
    try:
        return validated(ModelConfig, _values(given, arch), where), arch
    except _NotSupported as error:
        raise ConfigError(f"{where}: {error}") from None


class _NotSupported(ValueError):
    """Features of config.json that the decoder lacks."""


def _values(given: _HFConfig, arch: Architecture) -> dict[str, Any]:
    """Keys of our model config."""
    heads = given.num_attention_heads
    values: dict[str, Any] = {
        "vocab_size": given.vocab_size,
        "num_layers": given.num_hidden_layers,
        "hidden_size": given.hidden_size,
        "num_heads": heads,
        "num_kv_heads": given.num_key_value_heads or heads,
        "head_dim": given.head_dim or given.hidden_size // heads,
        "intermediate_size": given.intermediate_size,
        "max_positions": given.max_position_embeddings,
        "qk_norm": arch in (QWEN3, QWEN3_MOE, DOTS1) or given.use_qk_norm,
        "qkv_bias": given.qkv_bias,
        "norm_eps": given.rms_norm_eps,
        "tie_embeddings": given.tie_word_embeddings,
        "init_std": given.initializer_range,
        "sliding_window": _window(given, arch),
        **_rope(given),
    }
    if arch not in DENSE:
        values["top_k"] = _needed(given, "num_experts_per_tok")
        values["expert_size"] = given.intermediate_size if arch is MIXTRAL else _needed(given, "moe_intermediate_size")
        values["norm_topk_prob"] = given.norm_topk_prob
    if arch in (MIXTRAL, QWEN3_MOE, QWEN2_MOE):
        values["num_experts"] = given.num_local_experts or _needed(given, "num_experts")
        values.update(_moe_layers(given))
    if arch is QWEN2_MOE:
        values["shared_expert_size"] = _needed(given, "shared_expert_intermediate_size")
        values["shared_expert_gate"] = True
    if arch in (GLM4_MOE, DOTS1):
        values["num_experts"] = given.n_routed_experts or _needed(given, "num_local_experts")
        values["shared_expert_size"] = (given.n_shared_experts or 0) * values["expert_size"]
        values["first_dense_layers"] = given.first_k_dense_replace or 0
        values["expert_groups"] = given.n_group or 1
        values["top_groups"] = given.topk_group or 1
        values["router_scale"] = given.routed_scaling_factor
        values["router"], values["router_bias_rate"] = "sigmoid", 0.0
    return values


def _needed(given: _HFConfig, key: str) -> Any:
    if (value := getattr(given, key)) is None:
        raise _NotSupported(f"{key} is missing")
    return value


def _rope(given: _HFConfig) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of version 4."""
    old, new = ((rope or _Rope()).model_dump(exclude_none=True) for rope in (given.rope_scaling, given.rope_parameters))
    if old and new and _spelt_out(old, given) != _spelt_out(new, given):
        raise _NotSupported(
            f"rope_scaling={shown(old)} and rope_parameters={shown(new)} differ: keep one, with rope_theta in it"
        )
    said = old or new
    if own := [kind for kind in ("full_attention", "sliding_attention") if kind in said]:
        raise _NotSupported(f"separate rope parameters for {' and '.join(own)} are not supported")
    theta = said.get("rope_theta", given.rope_theta)
    partial = said.get("partial_rotary_factor", given.partial_rotary_factor)
    if partial not in (None, 1.0):
        raise _NotSupported(f"partial_rotary_factor={partial} is not supported, only 1.0")
    kind = said.get("rope_type", said.get("type"))
    if kind is None and said.keys() - {"rope_theta", "partial_rotary_factor"}:
        raise _NotSupported(f"rope scaling {shown(said)} lacks rope_type: default, linear, llama3 or yarn")
    kind = kind or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in _ROPE_KEYS:
        raise _NotSupported(f"rope_type {shown(kind)} is not supported: should be default, {', '.join(_ROPE_KEYS)}")
    extra = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if key in said]
    if extra or said.get("truncate") is False:
        raise _NotSupported(f"rope scaling {shown(said)} has keys that model.rope_scaling does not support")
    if given.original_max_position_embeddings:  # at the top level it overrides the scaling's own
        said["original_max_position_embeddings"] = given.original_max_position_embeddings
    said.setdefault("original_max_position_embeddings", given.max_position_embeddings)
    for key in ("factor", *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ())):
        if key not in said:
            least = "of at least 1" if key == "factor" else "above 0"
            raise _NotSupported(f"rope_type {kind!r} needs {key}, a number {least}")
    values = {ours: said[theirs] for ours, theirs in _ROPE_KEYS[kind].items() if theirs in said}
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **values}}


def _spelt_out(rope: dict[str, Any], given: _HFConfig) -> dict[str, Any]:
    """Rope parameters, with missing keys filled from the rest of config.json or from defaults."""
    elsewhere = {
        "rope_type": "default",
        "rope_theta": given.rope_theta,
        "partial_rotary_factor": given.partial_rotary_factor or 1.0,
        "original_max_position_embeddings": given.original_max_position_embeddings or given.max_position_embeddings,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    own = {"rope_type" if key == "type" else key: value for key, value in rope.items() if value is not None}
    return elsewhere | own | ({"rope_type": rope["rope_type"]} if "rope_type" in rope else {})


def _window(given: _HFConfig, arch: Architecture) -> int | None:
    window, layers = given.sliding_window, given.num_hidden_layers
    used = window if arch in (MISTRAL, MIXTRAL, DOTS1) else given.use_sliding_window
    if arch in (LLAMA, GLM4_MOE) or not used:
        return None
    if arch in (QWEN2, QWEN3, QWEN2_MOE, DOTS1):
        first = given.max_window_layers
        slides = [(i < first and i % 2 == 0) if arch is QWEN2_MOE else i >= first for i in range(layers)]
        kinds = given.layer_types or ["sliding_attention" if slide else "full_attention" for slide in slides]
        if set(kinds[:layers]) == {"full_attention"}:
            return None
        if set(kinds[:layers]) != {"sliding_attention"}:
            raise _NotSupported(
                "sliding window in some layers only is not supported: model.sliding_window applies to all layers"
            )
    return window


def _moe_layers(given: _HFConfig) -> dict[str, int]:
    layers, step, dense = given.num_hidden_layers, given.decoder_sparse_step, set(given.mlp_only_layers or [])
    first = next((i for i in range(layers) if i not in dense), layers)
    if any(first <= i < layers and (i + 1) % step == 0 for i in dense):
        raise _NotSupported(
            f"mlp_only_layers={shown(sorted(dense))} should be the first layers, as model.first_dense_layers counts"
        )
    return {"moe_every": step, "first_dense_layers": first}
