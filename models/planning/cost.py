"""Parameters and FLOPs of a model, from its config alone (no torch).

FLOPs are two per multiply-add of a matrix product. Training costs three forward passes: the backward pass has two
products for each of the forward's (Kaplan et al., arXiv 2001.08361, section 2.1). Recomputation, norms, rotary
positions, softmax and the embedding look-up are not counted.
"""

from dataclasses import dataclass

from configs import ModelConfig
from configs.sections.family import DECODER, ModelSection
from models.decoder.pattern import Pattern


def has_formulas(model: ModelSection) -> bool:
    """Whether this package's formulas apply to such a model: they are for decoders."""
    return model.family == DECODER and isinstance(model, ModelConfig)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Active parameters: top_k of the experts, and everything else."""
    embedding: int
    """The input embedding, which is also the head if tied."""
    head: int
    """The head's own; 0 if tied."""
    attention: int
    router: int
    experts: int
    """All routed experts."""
    dense: int
    """Dense SwiGLU layers, shared experts and their gates."""
    norms: int
    """Weights of norms, and the biases of q, k and v: vectors, which take part in no matrix product."""

    @property
    def without_embeddings(self) -> int:
        """Kaplan's convention: neither embedding nor head."""
        return self.total - self.embedding - self.head


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a resolved model config."""
    hidden, heads, kv, head_dim = _shape(config)
    moe = config.num_moe_layers
    attention = config.num_layers * hidden * head_dim * (2 * heads + 2 * kv)
    norms = hidden * (2 * config.num_layers + 1) + 2 * head_dim * config.num_layers * config.qk_norm
    norms += config.num_layers * head_dim * (heads + 2 * kv) * config.qkv_bias
    expert = 3 * hidden * (config.expert_size or 0)
    experts, router = moe * config.num_experts * expert, moe * config.num_experts * hidden * (config.router != "hash")
    dense = 3 * hidden * ((config.num_layers - moe) * (config.intermediate_size or 0) + moe * config.shared_expert_size)
    dense += moe * hidden * config.shared_expert_gate
    embedding = (config.vocab_size or 0) * hidden
    head = 0 if config.tie_embeddings else embedding
    total = attention + norms + experts + router + dense + embedding + head
    active = total - moe * (config.num_experts - config.top_k) * expert if moe else total
    return Parameters(total, active, embedding, head, attention, router, experts, dense, norms)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of a forward pass per token of a sequence of `seq_len`, causal attention counted exactly.

    A query multiplies with the keys that it sees and as many values; document boundaries are ignored.
    """
    counts = parameters(config)
    _, heads, _, head_dim = _shape(config)
    matrices = counts.active - counts.norms - counts.embedding + (counts.embedding if config.tie_embeddings else 0)
    keys = Pattern.of(config).keys_per_query(seq_len)
    return 2 * matrices + config.num_layers * 4 * heads * head_dim * keys


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward pass per token."""
    return 3 * forward_flops_per_token(config, seq_len)


def _shape(config: ModelConfig) -> tuple[int, int, int, int]:
    heads = config.num_heads
    return config.hidden_size, heads, config.num_kv_heads or heads, config.head_dim or config.hidden_size // heads
