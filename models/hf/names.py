"""The Hugging Face architecture that a decoder matches, and its tensors' names there (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs import ConfigError, ModelConfig

BIAS = "e_score_correction_bias"


@dataclass(frozen=True, eq=False)
class Architecture:
    """A transformers class and how it names a MoE block, an expert's gate, up and down projections, a shared expert.

    Attributes:
        bias: its routers have a balancing bias, named by `bias_name`. defaults: defaults of missing config.json keys,
            where architectures differ.
    """

    name: str
    model_type: str
    moe_block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = "shared_expert"
    bias: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


LLAMA = Architecture("LlamaForCausalLM", "llama")
_QWEN = {"sliding_window": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 32}
MISTRAL = Architecture(
    "MistralForCausalLM",
    "mistral",
    defaults={"sliding_window": 4096, "max_position_embeddings": 131072, "num_key_value_heads": 8},
)
QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2", defaults={**_QWEN, "qkv_bias": True})
QWEN3 = Architecture("Qwen3ForCausalLM", "qwen3", defaults={**_QWEN, "head_dim": 128})
QWEN3_MOE = Architecture("Qwen3MoeForCausalLM", "qwen3_moe", defaults={**_QWEN, "num_key_value_heads": 4})
QWEN2_MOE = Architecture(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    defaults={**_QWEN, "num_key_value_heads": 16, "qkv_bias": True, "shared_expert_intermediate_size": 5632},
)
MIXTRAL = Architecture(
    "MixtralForCausalLM",
    "mixtral",
    "block_sparse_moe",
    ("w1", "w3", "w2"),
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "norm_topk_prob": True,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
)
# The experts of DeepSeek-V3 with an attention that the decoder has.
GLM4_MOE = Architecture(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    shared_expert="shared_experts",
    bias=True,
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "num_key_value_heads": 8,
        "first_k_dense_replace": 1,
    },
)
DOTS1 = Architecture(
    "Dots1ForCausalLM",
    "dots1",
    shared_expert="shared_experts",
    bias=True,
    defaults={"sliding_window": 4096, "max_window_layers": 62, "num_key_value_heads": 32},
)
DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3)
ARCHITECTURES = {a.model_type: a for a in (*DENSE, QWEN3_MOE, QWEN2_MOE, MIXTRAL, GLM4_MOE, DOTS1)}


def architecture(config: ModelConfig) -> Architecture:
    """The architecture that computes exactly what a decoder of this config does.

    Raises:
        ConfigError: there is none.
    """
    if config.block_sparse:
        raise _no_export(
            "model.block_sparse", "set it to null; architectures there have full attention or a sliding window"
        )
    if config.qkv_bias and (config.qk_norm or (config.is_moe and not config.shared_expert_gate)):
        raise _no_export(
            f"model.qkv_bias=true with model.qk_norm={str(config.qk_norm).lower()} "
            f"model.num_experts={config.num_experts}",
            "Qwen2 (dense) and Qwen2-MoE (shared_expert_gate=true) have that bias, and no qk_norm",
        )
    if not config.is_moe:
        if config.qk_norm or config.qkv_bias:
            return QWEN3 if config.qk_norm else QWEN2
        return MISTRAL if config.sliding_window else LLAMA
    if config.router == "hash":
        raise _no_export("model.router=hash", "set it to softmax or sigmoid")
    return _of_sigmoid(config) if config.router == "sigmoid" else _of_softmax(config)


def _of_softmax(config: ModelConfig) -> Architecture:
    groups, top, shared = config.expert_groups, config.top_groups, config.shared_expert_size
    for asked, keys, plain in (
        (config.router_scale != 1.0, f"model.router_scale={config.router_scale}", "router_scale to 1.0"),
        (config.router_bias_rate is not None, f"model.router_bias_rate={config.router_bias_rate}", "it to null"),
        (top < groups, f"model.expert_groups={groups} model.top_groups={top}", "both to 1"),
    ):
        if asked:
            raise _no_export(f"{keys} with model.router=softmax", f"set {plain}, or router to sigmoid (GLM-4.5)")
    if config.shared_expert_gate:
        if not config.qk_norm and not config.sliding_window:
            return QWEN2_MOE
        key = "qk_norm=true" if config.qk_norm else f"sliding_window={config.sliding_window}"
        raise _no_export(
            f"model.shared_expert_gate=true with model.{key}",
            "in Qwen2-MoE, which has that gate, qk_norm is false and sliding_window null",
        )
    if shared:
        raise _no_export(
            f"model.shared_expert_size={shared} with model.router=softmax and no gate",
            "set shared_expert_size to 0 (Qwen3-MoE), shared_expert_gate to true and qk_norm to false (Qwen2-MoE), or "
            "router to sigmoid (GLM-4.5)",
        )
    if config.qk_norm:
        return QWEN3_MOE
    if config.norm_topk_prob and dense_layers(config) == 0:
        return MIXTRAL
    raise _no_export(
        f"model.qk_norm=false with model.norm_topk_prob={str(config.norm_topk_prob).lower()} "
        f"model.moe_every={config.moe_every} model.first_dense_layers={config.first_dense_layers}",
        "set them to true, 1 and 0 (Mixtral), qk_norm to true (Qwen3-MoE), or shared_expert_size and "
        "shared_expert_gate (Qwen2-MoE)",
    )


def _of_sigmoid(config: ModelConfig) -> Architecture:
    shared, size = config.shared_expert_size, config.expert_size
    assert size, "resolve() fills model.expert_size"
    if config.shared_expert_gate:
        raise _no_export(
            "model.shared_expert_gate=true with model.router=sigmoid",
            "set it to false (GLM-4.5), or router=softmax and qk_norm=false (Qwen2-MoE)",
        )
    if shared % size:
        raise _no_export(
            f"model.shared_expert_size={shared} with model.router=sigmoid",
            f"in GLM-4.5 it is a multiple of model.expert_size ({size}): {shared // size * size} or "
            f"{(shared // size + 1) * size}",
        )
    if dense_layers(config) is None:
        raise _no_export(
            f"model.moe_every={config.moe_every} with model.router=sigmoid",
            "in GLM-4.5 every layer after the first dense ones is MoE: set moe_every to 1",
        )
    if config.num_experts == 1:
        raise _no_export("model.num_experts=1 with model.router=sigmoid", "GLM-4.5 takes the best two of a group")
    if not config.sliding_window:
        return GLM4_MOE
    if config.qk_norm:
        return DOTS1
    raise _no_export(
        f"model.sliding_window={config.sliding_window} model.qk_norm=false with model.router=sigmoid",
        "set sliding_window to null (GLM-4.5) or qk_norm to true (dots1)",
    )


def dense_layers(config: ModelConfig) -> int | None:
    """The number of layers before the first MoE layer; None: there are dense layers after it too."""
    moe = [config.is_moe_layer(i) for i in range(config.num_layers)]
    return None if False in moe[moe.index(True) :] else moe.index(True)


def _no_export(what: str, instead: str) -> ConfigError:
    return ConfigError(f"no Hugging Face export for {what}: {instead}")


def bias_name(layer: int) -> str:
    """Name of the bias of a layer's `Chooser` among a model's tensors."""
    return f"model.layers.{layer}.mlp.gate.{BIAS}"


def pieces(name: str, shape: tuple[int, ...], arch: Architecture) -> list[tuple[str, tuple]]:
    """The tensors of a Hugging Face folder that make up our parameter `name`: `(their name, index into ours)`, one or
    two per expert if ours is stacked."""
    before, moe, after = name.rpartition(".mlp.experts.")
    if not moe:
        name = name.replace(".mlp.gate.weight", f".{arch.moe_block}.gate.weight")
        return [(name.replace(".mlp.shared_expert.", f".mlp.{arch.shared_expert}."), (...,))]
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
