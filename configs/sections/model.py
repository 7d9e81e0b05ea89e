"""Architecture of the model: sizes, attention, Mixture-of-Experts and its losses."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, ValidationInfo, field_validator, model_validator

from configs.base import Length, Section, Size

from .family import DECODER, ModelSection

MOST_LAYERS = 10_000
MOST_WIDTH = 2**24
MOST_WEIGHTS = 2**50
"""Of one matrix, the experts of a layer stacked: tensors of that size can be described."""
STRETCHED_FROM = ("llama3", "yarn")
"""Kinds of RopeScaling that depend on the original length."""


class RopeScaling(Section):
    """Stretch of rotary positions, by the formulas of Hugging Face `rope_scaling`, whose `rope_type` is `kind` here."""

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    """All positions stretched alike, or by wavelength as in Llama 3.1 or YaRN."""
    factor: float = Field(ge=1)
    """How many times longer the positions get; it has no default."""
    original_max_positions: Length | None = None
    """llama3 and yarn: length that the unscaled positions were trained for; without one, that of the model in
    model.from or train.init_from. It has no default."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths over original_max_positions / low_freq_factor are divided by factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: those under original_max_positions / high_freq_factor stay as they are."""
    beta_fast: PositiveFloat = 32.0
    """yarn: dimensions with more turns than this over the original length stay."""
    beta_slow: PositiveFloat = 1.0
    """yarn: those with fewer are divided by factor."""

    @model_validator(mode="before")
    @classmethod
    def _needed(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and (kind := value.get("kind")) in STRETCHED_FROM:
            needed = {
                "factor": "how many times longer the positions get",
                "original_max_positions": "the length that the model was trained for without it",
            }
            if missing := [f"{key} ({what})" for key, what in needed.items() if value.get(key) is None]:
                raise ValueError(f"kind {kind} needs {' and '.join(missing)}")
        return value

    @field_validator("original_max_positions")
    @classmethod
    def _of_no_use(cls, value: int | None, info: ValidationInfo) -> int | None:
        # Runs of linear positions that began while it had a default are the same as those without one.
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
    """Attention to some blocks of earlier keys, counted from a document's start (arXiv:1904.10509, 2007.14062)."""

    block: Size = 64
    """Tokens of a block."""
    local_blocks: Size = 4
    """Blocks up to a query's own, itself included, that it sees."""
    global_blocks: int = Field(1, ge=0, le=2**24)
    """First blocks of the document, which every query sees."""
    stride: int = Field(0, ge=0, le=2**24)
    """Every block this many, or a multiple of it, before the query's own is seen too; 0: none."""


class ModelConfig(ModelSection):
    """A decoder-only Transformer; `num_experts: 0` is dense. `None` means: derived by `resolve()`."""

    default_task: ClassVar[str] = "language_modelling"
    cuts: ClassVar[frozenset[str]] = frozenset({"tp", "pp", "ep", "sp"})

    family: str = DECODER
    """Entry of the family table (`models/families.py`) or one that a plugin registers."""
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
    """None: hidden_size / num_heads."""
    intermediate_size: Size | None = None
    """Width of a dense SwiGLU layer; None: 8/3 hidden_size rounded up to a multiple of 64."""
    rope_theta: float = Field(10000.0, ge=1)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """None: positions as they are."""
    max_positions: Length | None = None
    """Longest position; None: train.seq_len."""
    qk_norm: bool = True
    """RMSNorm on each head of q and k (Qwen3)."""
    qkv_bias: bool = False
    """The projections to q, k and v add a bias (Qwen2)."""
    norm_eps: PositiveFloat = 1e-6
    """Of every RMSNorm."""
    tie_embeddings: bool = False
    """The head uses the embedding's weights."""
    sliding_window: Length | None = None
    """A query sees at most this many keys, itself included; None: all."""
    block_sparse: BlockSparse | None = None
    """A query sees some blocks of keys only; None: all."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the output of each attention and MLP block and on the embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    loss_chunk: Size = 4096
    """Tokens whose logits stand in memory at once in the cross-entropy."""

    num_experts: int = Field(0, ge=0, le=2**20)
    """Experts of a MoE layer; 0: dense."""
    top_k: Size = 2
    """Experts per token."""
    expert_size: Size | None = None
    """Width of one expert's SwiGLU; None: intermediate_size."""
    shared_expert_size: int = Field(0, ge=0, le=2**24)
    """Width of the SwiGLU every token passes beside its experts; 0: none."""
    shared_expert_gate: bool = False
    """The shared expert's output is weighted by a sigmoid of the token, as in Qwen2-MoE."""
    moe_every: Size = 1
    """Every k-th layer is MoE: layer i (from 0) when (i + 1) % moe_every == 0."""
    first_dense_layers: int = Field(0, ge=0, le=MOST_LAYERS)
    """Leading layers that stay dense."""
    router: Literal["softmax", "sigmoid", "hash"] = "softmax"
    """Scores of the experts: probabilities, independent sigmoids (DeepSeek-V3), or a hash of the token's id."""
    norm_topk_prob: bool = True
    """Renormalise the chosen experts' scores to sum to 1."""
    router_scale: PositiveFloat = 1.0
    """What the chosen experts' weights are multiplied by (DeepSeek's routed_scaling_factor)."""
    expert_groups: Size = 1
    """Group-limited routing: experts lie in this many groups, of which a token uses a few (DeepSeek-V2, V3)."""
    top_groups: Size = 1
    """Groups a token's experts come from: the best by their best score (softmax), or the sum of their best two."""
    router_jitter: float = Field(0.0, ge=0, lt=1)
    """In training the router's input is multiplied by uniform noise in [1 - jitter, 1 + jitter] (Switch)."""
    router_bias_rate: float | None = Field(None, ge=0)
    """Loss-free balancing (DeepSeek-V3): by how much a bias on each expert's score, used for the choice only, moves
    after a step; None: no bias, 0: one that stays as it is loaded."""
    aux_loss_over: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    """What the load-balancing loss balances: each micro-batch (Switch), each sequence (DeepSeek-V3), or the global
    batch (Qwen3), by the loads of the step before."""
    aux_loss_weight: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss (Switch Transformers, eq. 4), mean over MoE layers."""
    z_loss_weight: float = Field(0.001, ge=0)
    """Weight of the router z-loss (ST-MoE, eq. 5), mean over MoE layers."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes at most this many times its fair share of a micro-batch's assignments, the first in
    token order; the others are dropped. None: dropless."""
    pad_to_capacity: bool = False
    """Every expert computes exactly its capacity, padded with zeros: shapes that never change."""

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def num_moe_layers(self) -> int:
        """How many layers `is_moe_layer` is true for."""
        first = min(self.first_dense_layers, self.num_layers)
        return self.num_layers // self.moe_every - first // self.moe_every if self.is_moe else 0

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) holds experts."""
        return self.is_moe and index >= self.first_dense_layers and (index + 1) % self.moe_every == 0

    def capacity(self, tokens: int) -> int:
        """Assignments that one expert takes of a micro-batch of so many tokens (GShard, arXiv:2006.16668, 2.2)."""
        assert self.capacity_factor
        return max(1, math.ceil(self.capacity_factor * tokens * self.top_k / self.num_experts))

    @model_validator(mode="after")
    def _check(self):
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(
                f"model.top_k is {self.top_k} but model.num_experts is {self.num_experts}: "
                f"set model.top_k={self.num_experts} or lower"
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
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}: rotary positions need an even one")
        if self.rope_scaling and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta is {self.rope_theta:g}: rope_scaling.kind=yarn needs one above 1")
        if (width := self.num_heads * (self.head_dim or 1)) > MOST_WIDTH:
            raise ValueError(f"model.num_heads * model.head_dim is {width:,}: at most {MOST_WIDTH:,}")
        if (weights := self.num_experts * (self.expert_size or 1) * self.hidden_size) > MOST_WEIGHTS:
            raise ValueError(
                f"model.num_experts * model.expert_size * model.hidden_size is {weights:,}: at most {MOST_WEIGHTS:,}"
            )
        if self.sliding_window and self.block_sparse:
            raise ValueError(
                f"model.sliding_window ({self.sliding_window}) and model.block_sparse are two patterns of attention: "
                "set one of them to null"
            )
        if self.is_moe and not self.num_moe_layers:
            raise ValueError(
                f"model.num_experts is {self.num_experts} but no layer is MoE: model.moe_every ({self.moe_every}) and "
                f"model.first_dense_layers ({self.first_dense_layers}) leave none of {self.num_layers} layers"
            )
        _check_router(self)
        return self


def _check_router(model: ModelConfig) -> None:
    experts, groups, top = model.num_experts, model.expert_groups, model.top_groups
    if model.is_moe and (experts % groups or top > groups or model.top_k > top * (experts // groups)):
        raise ValueError(
            f"model.expert_groups={groups} model.top_groups={top}: groups divide model.num_experts ({experts}), and "
            f"those a token uses hold at least model.top_k ({model.top_k}) experts"
        )
    if model.is_moe and groups > 1 and model.router == "sigmoid" and experts // groups < 2:
        raise ValueError(
            f"model.expert_groups={groups} leaves one of {experts} experts in a group, and model.router=sigmoid rates "
            "a group by its best two: lower model.expert_groups"
        )
    if model.router == "hash":
        unused = [
            f"model.{key}"
            for key, off in (("router_bias_rate", None), ("expert_groups", 1), ("router_jitter", 0.0))
            if getattr(model, key) != off
        ]
        if unused:
            raise ValueError(f"model.router=hash has no scores: {', '.join(unused)} would do nothing, leave it out")
    if model.pad_to_capacity and model.capacity_factor is None:
        raise ValueError("model.pad_to_capacity needs model.capacity_factor")
    if model.shared_expert_gate and not model.shared_expert_size:
        raise ValueError("model.shared_expert_gate needs model.shared_expert_size")
