"""Which Hugging Face architecture a decoder is, its config.json, and its tensors' names there (no torch)."""

from dataclasses import dataclass
from typing import Any

from configs import ConfigError, ModelConfig, RopeScaling


@dataclass(frozen=True)
class Architecture:
    """A transformers class and how it names a MoE block and an expert's gate, up and down projections."""

    name: str
    model_type: str
    moe_block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


LLAMA = Architecture("LlamaForCausalLM", "llama")
QWEN3 = Architecture("Qwen3ForCausalLM", "qwen3")
QWEN3_MOE = Architecture("Qwen3MoeForCausalLM", "qwen3_moe")
MIXTRAL = Architecture("MixtralForCausalLM", "mixtral", "block_sparse_moe", ("w1", "w3", "w2"))
ARCHITECTURES = {a.model_type: a for a in (LLAMA, QWEN3, QWEN3_MOE, MIXTRAL)}

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


def architecture(config: ModelConfig) -> Architecture:
    """The architecture that computes exactly what a decoder of this config does.

    Raises:
        ConfigError: there is none.
    """
    if config.block_sparse:
        raise ConfigError(
            "no Hugging Face export for model.block_sparse: Qwen3, Qwen3-MoE, Llama and Mixtral have full attention or "
            "a sliding window"
        )
    if not config.is_moe:
        if config.qk_norm:
            return QWEN3
        if config.sliding_window:
            raise ConfigError(
                "no Hugging Face export for a dense model with model.sliding_window and model.qk_norm=false: "
                "Qwen3 has both, Llama neither"
            )
        return LLAMA
    if config.shared_expert_size:
        raise ConfigError(
            f"no Hugging Face export for model.shared_expert_size={config.shared_expert_size}: Qwen3-MoE and Mixtral "
            "have no shared expert (set it to 0)"
        )
    if config.qk_norm:
        return QWEN3_MOE
    if config.norm_topk_prob and all(config.is_moe_layer(i) for i in range(config.num_layers)):
        return MIXTRAL
    raise ConfigError(
        "no Hugging Face export for experts with model.qk_norm=false unless, as in Mixtral, every layer is MoE and "
        "model.norm_topk_prob=true; with model.qk_norm=true it is Qwen3-MoE"
    )


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
    if arch is not LLAMA:
        tree["sliding_window"] = config.sliding_window
    if arch in (QWEN3, QWEN3_MOE):
        tree["use_sliding_window"] = config.sliding_window is not None
        tree["max_window_layers"] = 0 if config.sliding_window else config.num_layers
    if config.is_moe:
        tree["num_experts_per_tok"] = config.top_k
        tree["num_local_experts"] = config.num_experts
    if arch is QWEN3_MOE:
        tree["num_experts"] = config.num_experts
        tree["moe_intermediate_size"] = config.expert_size
        tree["norm_topk_prob"] = config.norm_topk_prob
        tree["decoder_sparse_step"] = config.moe_every
        tree["mlp_only_layers"] = list(range(config.first_dense_layers))
    return tree


def from_hf_config(tree: dict[str, Any]) -> tuple[ModelConfig, Architecture]:
    """The config of a decoder that computes what this config.json describes.

    Raises:
        ConfigError: another architecture, or a variant of one that the decoder family lacks.
    """
    arch = ARCHITECTURES.get(tree.get("model_type", ""))
    if arch is None:
        raise ConfigError(f"config.json: model_type {tree.get('model_type')!r} is none of {', '.join(ARCHITECTURES)}")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if tree.get(key, only) != only:
            raise ConfigError(f"config.json: {key}={tree[key]!r} is not supported, only {only!r}")
    heads = tree["num_attention_heads"]
    positions = tree.get("max_position_embeddings", 2048)
    values: dict[str, Any] = {
        "vocab_size": tree["vocab_size"],
        "num_layers": tree["num_hidden_layers"],
        "hidden_size": tree["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": tree.get("num_key_value_heads") or heads,
        "head_dim": tree.get("head_dim") or tree["hidden_size"] // heads,
        "intermediate_size": tree["intermediate_size"],
        "max_positions": positions,
        "qk_norm": arch in (QWEN3, QWEN3_MOE),
        "norm_eps": tree.get("rms_norm_eps", 1e-5 if arch is MIXTRAL else 1e-6),
        "tie_embeddings": tree.get("tie_word_embeddings", False),
        "init_std": tree.get("initializer_range", 0.02),
        "sliding_window": _window(tree, arch),
        **_rope(tree, positions, 1e6 if arch is MIXTRAL else 1e4),
    }
    if arch in (QWEN3_MOE, MIXTRAL):
        values["num_experts"] = tree.get("num_local_experts") or tree["num_experts"]
        values["top_k"] = tree["num_experts_per_tok"]
        values["expert_size"] = tree["intermediate_size"] if arch is MIXTRAL else tree["moe_intermediate_size"]
        values["norm_topk_prob"] = arch is MIXTRAL or tree.get("norm_topk_prob", False)
        values.update(_moe_layers(tree))
    return ModelConfig(**values), arch


def pieces(name: str, shape: tuple[int, ...], arch: Architecture) -> list[tuple[str, tuple]]:
    """The tensors that make up our parameter `name` there: `(name, index into ours)`, one per expert where stacked."""
    before, moe, after = name.rpartition(".mlp.experts.")
    if not moe:
        return [(name.replace(".mlp.gate.weight", f".{arch.moe_block}.gate.weight"), (...,))]
    gate, up, down = arch.expert
    found: list[tuple[str, tuple]] = []
    for expert in range(shape[0]):
        prefix, half = f"{before}.{arch.moe_block}.experts.{expert}", shape[1] // 2
        if after == "down_proj":
            found.append((f"{prefix}.{down}.weight", (expert,)))
        else:
            found.append((f"{prefix}.{gate}.weight", (expert, slice(0, half))))
            found.append((f"{prefix}.{up}.weight", (expert, slice(half, None))))
    return found


def _rope(tree: dict[str, Any], positions: int, default_theta: float) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of 4."""
    given = {**(tree.get("rope_scaling") or {}), **(tree.get("rope_parameters") or {})}
    theta = given.get("rope_theta", tree.get("rope_theta", default_theta))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in _ROPE_KEYS:
        raise ConfigError(f"config.json: rope_type {kind!r} is none of default, {', '.join(_ROPE_KEYS)}")
    extra = [k for k in ("attention_factor", "mscale", "mscale_all_dim") if given.get(k) is not None]
    if extra or given.get("truncate") is False or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config.json: rope scaling {given} has parts that model.rope_scaling does not know")
    given.setdefault("original_max_position_embeddings", positions)
    values = {ours: given[theirs] for ours, theirs in _ROPE_KEYS[kind].items() if given.get(theirs) is not None}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind=kind, **values)}


def _window(tree: dict[str, Any], arch: Architecture) -> int | None:
    if arch is LLAMA or (arch in (QWEN3, QWEN3_MOE) and not tree.get("use_sliding_window", False)):
        return None
    layers = tree["num_hidden_layers"]
    if arch is QWEN3:
        first = tree.get("max_window_layers", 28)
        kinds = tree.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        if set(kinds[:layers]) == {"full_attention"}:
            return None
        if set(kinds[:layers]) != {"sliding_attention"}:
            raise ConfigError("config.json: sliding window in some layers only; model.sliding_window is for all")
    return tree.get("sliding_window")


def _moe_layers(tree: dict[str, Any]) -> dict[str, int]:
    layers, step, dense = (
        tree["num_hidden_layers"],
        tree.get("decoder_sparse_step", 1),
        tree.get("mlp_only_layers") or [],
    )
    first = next((i for i in range(layers) if i not in dense), layers)
    if any(first <= i < layers and (i + 1) % step == 0 for i in dense):
        raise ConfigError(f"config.json: mlp_only_layers={dense} are not the first layers, as model.first_dense_layers")
    return {"moe_every": step, "first_dense_layers": first}
