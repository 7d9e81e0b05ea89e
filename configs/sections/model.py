"""Architecture of the decoder: sizes, attention, Mixture-of-Experts and its losses."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, ValidationInfo, field_validator, model_validator

from configs.base import Length, Section, Size

from .family import DECODER, ModelSection

MOST_LAYERS = 10_000
MOST_WIDTH = 2**24
MOST_WEIGHTS = 2**50
"""Most weights of one matrix, the experts of a layer stacked: the largest tensor that torch can describe."""
STRETCHED_FROM = ("llama3", "yarn")
"""Kinds of RopeScaling that depend on the original length."""


class RopeScaling(Section):
    """Scaling of rotary positions, by the formulas of Hugging Face `rope_scaling`, whose `rope_type` is `kind` here."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    """Scale all positions equally (linear), or by wavelength as in Llama 3.1 or YaRN."""
    factor: float = Field(ge=1)
    """How many times longer the context becomes; required."""
    original_max_positions: Length | None = None
    """llama3 and yarn: context length that the unscaled positions were trained for; if not given, that of the model in
    model.from or train.init_from. No default."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths over original_max_positions / low_freq_factor are divided by factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: those under original_max_positions / high_freq_factor are not scaled."""
    beta_fast: PositiveFloat = 32.0
    """yarn: dimensions with more turns than this over the original length are not scaled."""
    beta_slow: PositiveFloat = 1.0
    """yarn: those with fewer are divided by factor."""

    @model_validator(mode="before")
    @classmethod
    def _needed(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and (kind := value.get("kind")) in STRETCHED_FROM:
            needed = {
                "factor": "how many times longer the context becomes",
                "original_max_positions": "the context length that the model was trained for without scaling",
            }
            if missing := [f"{key} ({what})" for key, what in needed.items() if value.get(key) is None]:
                raise ValueError(f"kind {kind} needs {' and '.join(missing)}")
        return value

    @field_validator("original_max_positions")
    @classmethod
    def _of_no_use(cls, value: int | None, info: ValidationInfo) -> int | None:
        # Runs with linear scaling that began while this key had a default count as the same as those without it.
        return value if info.data.get("kind") in STRETCHED_FROM else None

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor:g}) should be above low_freq_factor "
                f"({self.low_freq_factor:g})"
            )
        return self


class BlockSparse(Section):
    """Attention to some blocks of earlier keys, counted from the start of a document (arXiv:1904.10509, 2007.14062)."""

    block: Size = 64
    """Tokens per block."""
    local_blocks: Size = 4
    """How many blocks a query sees, counting back from its own, which is included."""
    global_blocks: int = Field(1, ge=0, le=2**24)
    """How many of the document's first blocks every query sees."""
    stride: int = Field(0, ge=0, le=2**24)
    """A query also sees the blocks that are a multiple of this many before its own; 0: none."""


class ModelConfig(ModelSection):
    """A decoder-only Transformer; `num_experts: 0` is dense. `None` means: derived by `resolve()`."""

    default_task: ClassVar[str] = "language_modelling"
    cuts: ClassVar[frozenset[str]] = frozenset({"tp", "pp", "ep", "sp"})

    family: str = DECODER
    """Entry of the family table (`models/families.py`), or one that a plugin registers."""
    vocab_size: Size | None = None
    """Rows of the embedding; None: the tokenizer's size, rounded up to a multiple of 64."""
    num_layers: int = Field(4, gt=0, le=MOST_LAYERS)
    """Transformer blocks."""
    hidden_size: Size = 256
    """Width of the residual stream."""
    num_heads: Size = 8
    """Query heads."""
    num_kv_heads: Size | None = None
    """Key/value heads (grouped-query attention); None: num_heads."""
    head_dim: Size | None = None
    """Width of one head; None: hidden_size / num_heads."""
    intermediate_size: Size | None = None
    """Width of a dense SwiGLU layer; None: 8/3 hidden_size rounded up to a multiple of 64."""
    rope_theta: float = Field(10000.0, ge=1)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions; None: not scaled."""
    max_positions: Length | None = None
    """Longest position; None: train.seq_len."""
    qk_norm: bool = True
    """RMSNorm on each head of q and k (Qwen3)."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections (Qwen2)."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Tie the head to the embedding's weights."""
    sliding_window: Length | None = None
    """A query sees at most this many keys, itself included; None: all."""
    block_sparse: BlockSparse | None = None
    """Block-sparse attention: a query sees only some blocks of keys; None: all."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the output of each attention and MLP block and on the embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    loss_chunk: Size = 4096
    """Tokens per chunk of the cross-entropy: how many tokens' logits are in memory at once."""

    num_experts: int = Field(0, ge=0, le=2**20)
    """Experts per MoE layer; 0: dense."""
    top_k: Size = 2
    """Experts per token."""
    expert_size: Size | None = None
    """Width of one expert's SwiGLU; None: intermediate_size."""
    shared_expert_size: int = Field(0, ge=0, le=2**24)
    """Width of the shared expert's SwiGLU, which every token passes through; 0: none."""
    shared_expert_gate: bool = False
    """Weight the shared expert's output by a sigmoid gate of the token, as in Qwen2-MoE."""
    moe_every: Size = 1
    """Every k-th layer is MoE: layer i (from 0) if (i + 1) % k == 0."""
    first_dense_layers: int = Field(0, ge=0, le=MOST_LAYERS)
    """How many leading layers stay dense."""
    router: Literal["softmax", "sigmoid", "hash"] = "softmax"
    """Scores of the experts: softmax, independent sigmoids (DeepSeek-V3), or a hash of the token id."""
    norm_topk_prob: bool = True
    """Renormalise the chosen experts' scores to sum to 1."""
    router_scale: PositiveFloat = 1.0
    """Factor on the chosen experts' weights (DeepSeek's routed_scaling_factor)."""
    expert_groups: Size = 1
    """Group-limited routing: the experts form this many groups, and a token uses a few of them (DeepSeek-V2, V3)."""
    top_groups: Size = 1
    """How many groups a token's experts come from, ranked by their best score (softmax) or the sum of their best two
    (sigmoid)."""
    router_jitter: float = Field(0.0, ge=0, lt=1)
    """In training, multiply the router's input by uniform noise in [1 - jitter, 1 + jitter] (Switch)."""
    router_bias_rate: float | None = Field(None, ge=0)
    """Loss-free balancing (DeepSeek-V3): how far the bias on each expert's score, used for the choice only, moves after
    a step; None: no bias; 0: a bias that stays as loaded."""
    aux_loss_over: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    """What the load-balancing loss balances over: each micro-batch (Switch), each sequence (DeepSeek-V3), or the global
    batch (Qwen3), using the previous step's loads."""
    aux_loss_weight: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss (Switch Transformers, eq. 4), averaged over MoE layers."""
    z_loss_weight: float = Field(0.001, ge=0)
    """Weight of the router z-loss (ST-MoE, eq. 5), averaged over MoE layers."""
    capacity_factor: PositiveFloat | None = None
    """In training, an expert takes at most this many times its fair share of a micro-batch's assignments, first come in
    token order; the others are dropped. None: dropless."""
    pad_to_capacity: bool = False
    """Pad every expert's input with zeros to its exact capacity, for static shapes."""

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def num_moe_layers(self) -> int:
        """The number of MoE layers."""
        first = min(self.first_dense_layers, self.num_layers)
        return self.num_layers // self.moe_every - first // self.moe_every if self.is_moe else 0

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) is MoE."""
        return self.is_moe and index >= self.first_dense_layers and (index + 1) % self.moe_every == 0

    def capacity(self, tokens: int) -> int:
        """How many assignments one expert takes of a micro-batch of `tokens` tokens (GShard, arXiv:2006.16668, 2.2)."""
        assert self.capacity_factor
        return max(1, math.ceil(self.capacity_factor * tokens * self.top_k / self.num_experts))

    @model_validator(mode="after")
    def _check(self):
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k is {self.top_k} but model.num_experts is {self.num_experts}: set "
                f"model.top_k={self.num_experts} or lower"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) is not a multiple of model.num_kv_heads ({self.num_kv_heads}): "
                f"set model.num_kv_heads={math.gcd(self.num_heads, self.num_kv_heads)}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) is not a multiple of model.num_heads ({self.num_heads}): "
                f"set model.head_dim={max(self.hidden_size // self.num_heads // 2 * 2, 2)}"
            )
        if (width := self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"model.head_dim is {width}: rotary positions need an even number")
        if self.rope_scaling and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta is {self.rope_theta:g}: rope_scaling.kind=yarn needs a value above 1")
        if (width := self.num_heads * (self.head_dim or 1)) > MOST_WIDTH:
            raise ValueError(f"model.num_heads * model.head_dim is {width:,}: at most {MOST_WIDTH:,}")
        if (weights := self.num_experts * (self.expert_size or 1) * self.hidden_size) > MOST_WEIGHTS:
            raise ValueError(
                f"model.num_experts * model.expert_size * model.hidden_size is {weights:,}: at most {MOST_WEIGHTS:,}"
            )
        if self.sliding_window and self.block_sparse:
            raise ValueError(
                f"model.sliding_window ({self.sliding_window}) and model.block_sparse exclude each other: set one "
                "of them to null"
            )
        if self.is_moe and not self.num_moe_layers:
            raise ValueError(
                f"model.num_experts is {self.num_experts} but no layer is MoE: model.moe_every ({self.moe_every}) "
                f"and "
                f"model.first_dense_layers ({self.first_dense_layers}) leave none of the {self.num_layers} layers "
                f"for experts"
            )
        _check_router(self)
        return self


def _check_router(model: ModelConfig) -> None:
    experts, groups, top = model.num_experts, model.expert_groups, model.top_groups
    if model.is_moe and (experts % groups or top > groups or model.top_k > top * (experts // groups)):
        raise ValueError(
            f"model.expert_groups={groups} model.top_groups={top}: expert_groups must divide model.num_experts "
            f"({experts}), and the groups that a token uses must hold at least model.top_k ({model.top_k}) experts"
        )
    if model.is_moe and groups > 1 and model.router == "sigmoid" and experts // groups < 2:
        raise ValueError(
            f"model.expert_groups={groups} leaves one of {experts} experts per group, but model.router=sigmoid "
            f"ranks a group by its best two: lower model.expert_groups"
        )
    if model.router == "hash":
        unused = [
            f"model.{key}"
            for key, off in (("router_bias_rate", None), ("expert_groups", 1), ("router_jitter", 0.0))
            if getattr(model, key) != off
        ]
        if unused:
            raise ValueError(f"model.router=hash has no scores: {', '.join(unused)} would have no effect, leave it out")
    if model.pad_to_capacity and model.capacity_factor is None:
        raise ValueError("model.pad_to_capacity needs model.capacity_factor")
    if model.shared_expert_gate and not model.shared_expert_size:
        raise ValueError("model.shared_expert_gate needs model.shared_expert_size")
