"""The decoder family: a pre-norm Transformer, dense or Mixture-of-Experts by config, named as Hugging Face Qwen3-MoE.

Shapes: B sequences, T tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configs import ModelConfig

from .attention import Attention, Cache, Visibility, visibility
from .batch import Batch
from .init import initialise
from .layers import SwiGLU, dropout, dropout_keys, next_keys
from .loss import LossOutput, chunked_cross_entropy
from .moe import MoE
from .norm import RMSNorm
from .rope import rope_tables


@dataclass(frozen=True)
class Shared:
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    visible: Visibility


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        hidden, dense = config.hidden_size, config.intermediate_size or -(-8 * config.hidden_size // 3 // 64) * 64
        self.input_layernorm = RMSNorm(hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, config.norm_eps)
        self.mlp = MoE(config, config.expert_size or dense) if config.is_moe_layer(index) else SwiGLU(hidden, dense)
        self.rate = config.dropout

    def forward(self, x_BTH: Tensor, shared: Shared, keys: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BTH), shared.cos, shared.sin, shared.visible, cache)
        x_BTH = x_BTH + dropout(attended, keys, 0, self.rate)
        mixed = self.mlp(self.post_attention_layernorm(x_BTH))
        return x_BTH + dropout(mixed, keys, 1, self.rate)


class Backbone(nn.Module):
    """Embedding, layers and last norm: everything before the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.activation_checkpointing = False
        self.dropout_seed = 0

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Hidden states [B, T, H] after the last norm. With a cache the batch continues what it holds."""
        config = self.config
        x_BTH = self.embed_tokens(batch.input_ids)
        cos, sin = rope_tables(batch.position_ids, config, x_BTH.dtype)
        if cache is None:
            visible = visibility(x_BTH.shape[1], batch.document_ids, config.sliding_window, x_BTH)
        else:
            visible = cache.visibility(x_BTH.shape[1], config.sliding_window, x_BTH)
        shared = Shared(cos, sin, visible)
        keys = None
        if self.training and config.dropout:
            keys = dropout_keys(self.dropout_seed, batch.sequence_ids, x_BTH.shape[1])
            x_BTH = dropout(x_BTH, keys, 0, config.dropout)
        for layer in self.layers:
            keys = next_keys(keys)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTH = checkpoint(layer, x_BTH, shared, keys, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTH = layer(x_BTH, shared, keys, cache)
        return self.norm(x_BTH)


class Decoder(nn.Module):
    """Language model over `Backbone`: summed token cross-entropy of a batch, or its logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, self.model.embed_tokens.num_embeddings, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, batch: Batch) -> LossOutput:
        hidden_SH = self.model(batch).flatten(0, 1)
        return chunked_cross_entropy(hidden_SH, self.head_weight, batch.labels.flatten(), self.config.loss_chunk)

    def logits(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """[B, T, V]; for tests and small batches. With a cache the batch continues what it holds."""
        hidden_BTH = self.model(batch, cache)
        return F.linear(hidden_BTH, self.head_weight) if self.config.tie_embeddings else self.lm_head(hidden_BTH)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only each layer's input and compute the layer again in the backward pass."""
        self.model.activation_checkpointing = enabled

    def init_weights(self, seed: int) -> None:
        """Fill all parameters as a function of (seed, name) only, and seed dropout."""
        initialise(self, self.config.init_std, seed)
        self.model.dropout_seed = seed
