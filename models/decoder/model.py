"""The decoder family: a pre-norm Transformer, dense or Mixture-of-Experts by config, named as Hugging Face Qwen3-MoE.

Shapes: B sequences, T tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configs import ModelConfig
from models.batch import Batch
from models.init import initialise
from models.kernels.uncompiled import leave_uncompiled
from models.loss import LossOutput, chunked_cross_entropy
from models.moe.block import MoE
from models.moe.router import Chooser
from models.norm import RMSNorm
from models.rope import rope_tables

from .attention import Attention, Cache, Visibility, visibility
from .layers import SwiGLU, dropout, dropout_keys, next_keys
from .pattern import Pattern


@dataclass(frozen=True)
class Shared:
    """What all layers of one forward pass share."""

    cos: Tensor
    sin: Tensor
    visible: Visibility
    tokens: Tensor
    """[B, T] ids."""


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        hidden, dense = config.hidden_size, config.intermediate_size or -(-8 * config.hidden_size // 3 // 64) * 64
        self.input_layernorm = RMSNorm(hidden, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, config.norm_eps)
        # Stored here too: the engine may replace the MoE block.
        self.chooser = Chooser(config, index) if config.is_moe_layer(index) else None
        self.mlp = MoE(config, config.expert_size or dense, self.chooser) if self.chooser else SwiGLU(hidden, dense)
        self.rate = config.dropout

    def compile(self, *arguments: Any, **options: Any) -> None:
        leave_uncompiled()
        super().compile(*arguments, **options)

    def forward(self, x_BTH: Tensor, shared: Shared, keys: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BTH), shared.cos, shared.sin, shared.visible, cache)
        x_BTH = x_BTH + dropout(attended, keys, 0, self.rate)
        if self.chooser:
            self.chooser.prepare(shared.tokens, keys, self.training)
        mixed = self.mlp(self.post_attention_layernorm(x_BTH))
        return x_BTH + dropout(mixed, keys, 1, self.rate)


class Backbone(nn.Module):
    """Embedding, layers and final norm: everything before the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.activation_checkpointing = 0
        """Every k-th layer is recomputed in the backward pass; 0: none."""
        self.dropout_seed = 0

    def forward(self, batch: Batch, cache: Cache | None = None, hidden_BTH: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, H] after the last norm.

        Args:
            cache: keys and values of the tokens that the batch continues.
            hidden_BTH: output of the earlier pipeline stages for this batch.
        """
        config, (part, parts) = self.config, batch.part
        x_BTH = self.embed_tokens(batch.input_ids) if hidden_BTH is None else hidden_BTH
        length = x_BTH.shape[1]
        cos, sin = rope_tables(batch.position_ids, config, x_BTH.dtype)
        pattern = Pattern.of(config)
        if cache is None:
            visible = visibility(length * parts, batch.document_ids, pattern, x_BTH)
        else:
            visible = cache.visibility(length, pattern, x_BTH)
        shared = Shared(cos, sin, visible, batch.input_ids)
        keys = None
        if self.training and (config.dropout or config.router_jitter):
            keys = dropout_keys(self.dropout_seed, batch.sequence_ids, length, part * length)
            if hidden_BTH is None:
                x_BTH = dropout(x_BTH, keys, 0, config.dropout)
        for index in range(len(self.layers)):
            keys = next_keys(keys)
            x_BTH = self.run_layer(index, x_BTH, shared, keys, cache)
        return self.norm(x_BTH)

    def run_layer(
        self, index: int, x_BTH: Tensor, shared: Shared, keys: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        """Output of layer `index` (from 0); if the layer is checkpointed, only its input is kept."""
        layer, every = self.layers[index], self.activation_checkpointing
        if every and (index + 1) % every == 0 and torch.is_grad_enabled():
            # Layers draw no random numbers. Reentrant checkpointing would lose the gradient of the router's losses.
            return checkpoint(_again, layer, x_BTH, shared, keys, use_reentrant=False, preserve_rng_state=False)
        return layer(x_BTH, shared, keys, cache)


def _again(layer: nn.Module, x_BTH: Tensor, shared: Shared, keys: Tensor | None) -> Tensor:
    """Output of a recomputed layer, with no tap on its router: a tap would keep what checkpointing gave up."""
    try:
        return layer(x_BTH, shared, keys)
    finally:  # checkpointing ends a recomputation by an exception
        chooser = getattr(layer, "chooser", None)
        if chooser and not chooser.listening:
            chooser.heard = None


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
        """[B, T, V]; for tests and small batches. With a cache, the batch continues its contents."""
        hidden_BTH = self.model(batch, cache)
        return F.linear(hidden_BTH, self.head_weight) if self.config.tie_embeddings else self.lm_head(hidden_BTH)

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that are compiled one by one."""
        return list(self.model.layers)

    def set_activation_checkpointing(self, every: int) -> None:
        """Keep only the input of every k-th layer and recompute that layer in the backward pass; 0: none."""
        self.model.activation_checkpointing = every

    def init_weights(self, seed: int) -> None:
        """Fill all parameters as a function of (seed, name) only, and seed dropout."""
        initialise(self, self.config.init_std, seed)
        self.model.dropout_seed = seed
