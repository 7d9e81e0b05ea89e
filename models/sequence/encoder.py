"""The encoder family: a bidirectional Transformer (BERT, arXiv:1810.04805), and the layers that it shares with vit.

Shapes: B sequences, T tokens, H hidden size, V vocabulary, K places in a sequence.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.sections.families.encoder import EncoderConfig, LayersConfig
from models.batch import Batch, Texts
from models.decoder.attention import Attention, Visibility, visibility
from models.decoder.layers import SwiGLU, next_keys
from models.decoder.pattern import Pattern
from models.init import initialise
from models.kernels.uncompiled import leave_uncompiled
from models.noise import dropout
from models.norm import RMSNorm
from models.rope import rope_tables

EVERYWHERE = Pattern(causal=False)


class Shared(NamedTuple):
    """What all layers of one forward pass share."""

    cos: Tensor | None
    sin: Tensor | None
    visible: Visibility


def norm_of(config: LayersConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.hidden_size, config.norm_eps)


class Layer(nn.Module):
    """Attention and an MLP, each with a residual connection."""

    def __init__(self, config: LayersConfig, skipped: float = 0.0):
        """`skipped`: share of examples that skip each of both in training."""
        super().__init__()
        self.attention = Attention(config.of_attention, out_bias=True)
        self.attention_norm, self.mlp_norm = norm_of(config), norm_of(config)
        size, inner = config.hidden_size, config.inner
        plain = nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))
        self.mlp = SwiGLU(size, inner) if config.activation == "swiglu" else plain
        self.pre_norm, self.rate, self.skipped = config.pre_norm, config.dropout, skipped

    def compile(self, *arguments: Any, **options: Any) -> None:
        leave_uncompiled()
        super().compile(*arguments, **options)

    def forward(self, x_BTH: Tensor, shared: Shared, keys: Tensor | None) -> Tensor:
        """`keys`: of `models.noise.dropout`, for this layer."""
        if self.pre_norm:
            x_BTH = x_BTH + self._kept(self.attention(self.attention_norm(x_BTH), *shared), keys, 1)
            return x_BTH + self._kept(self.mlp(self.mlp_norm(x_BTH)), keys, 2)
        x_BTH = self.attention_norm(x_BTH + self._kept(self.attention(x_BTH, *shared), keys, 1))
        return self.mlp_norm(x_BTH + self._kept(self.mlp(x_BTH), keys, 2))

    def _kept(self, x_BTH: Tensor, keys: Tensor | None, site: int) -> Tensor:
        return dropout(dropout(x_BTH, keys, site, self.rate), keys, 2 + site, self.skipped, dims=0)


class Stack(nn.Module):
    """The layers, and with pre-norm a last norm. Each layer has dropout keys of its own."""

    def __init__(self, config: LayersConfig):
        super().__init__()
        last = max(config.num_layers - 1, 1)
        self.layers = nn.ModuleList(
            Layer(config, config.stochastic_depth * number / last) for number in range(config.num_layers)
        )
        self.norm = norm_of(config) if config.pre_norm else None
        self.recompute_every = 0

    def forward(self, x_BTH: Tensor, shared: Shared, keys: Tensor | None = None) -> Tensor:
        for number, layer in enumerate(self.layers, 1):
            again = self.recompute_every and number % self.recompute_every == 0 and torch.is_grad_enabled()
            run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) if again else layer
            keys = next_keys(keys)
            x_BTH = run(x_BTH, shared, keys)
        return x_BTH if self.norm is None else self.norm(x_BTH)


class Body(nn.Module):
    """From tokens to what the last layer gives for each."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, size = config, config.hidden_size
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        if config.positions == "learned":
            assert config.max_positions is not None, "resolve() fills model.max_positions"
            self.embed_positions = nn.Embedding(config.max_positions, size)
        self.embed_norm, self.stack = norm_of(config), Stack(config)

    def init_weights(self, seed: int) -> None:
        initialise(self, self.config.init_std, seed)

    def set_activation_checkpointing(self, every: int) -> None:
        """Keep only the input of every k-th layer and recompute that layer in the backward pass; 0: none."""
        self.stack.recompute_every = every

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that are compiled one by one."""
        return list(self.stack.layers)

    def hidden(
        self, tokens_BT: Tensor, positions_BT: Tensor, documents_BT: Tensor | None, keys: Tensor | None
    ) -> Tensor:
        """[B, T, H] after the last layer. Arguments as the attributes of a `Batch`."""
        config, cos, sin = self.config, None, None
        x_BTH = self.embed_tokens(tokens_BT)
        if config.positions == "learned":
            x_BTH = x_BTH + self.embed_positions(positions_BT)
        elif config.positions == "sinusoidal":
            x_BTH = x_BTH + sine_waves(positions_BT, config.hidden_size).to(x_BTH.dtype)
        else:
            cos, sin = rope_tables(positions_BT, config.of_attention, x_BTH.dtype)
        x_BTH = dropout(self.embed_norm(x_BTH), keys, 1, config.dropout)
        visible = visibility(x_BTH.shape[1], documents_BT, EVERYWHERE, x_BTH)
        return self.stack(x_BTH, Shared(cos, sin, visible), keys)


class Encoder(Body):
    """From tokens to the logits of each, by BERT's head of masked language modelling."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        size = config.hidden_size
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), norm_of(config))
        self.lm_head = nn.Linear(size, self.embed_tokens.num_embeddings)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, batch: Batch, keys: Tensor | None = None, places_BK: Tensor | None = None) -> Tensor:
        """[B, T, V], or [B, K, V] of K places of each sequence.

        Args:
            keys: of `models.noise.dropout`.
            places_BK: columns, int64; None: all.
        """
        hidden_BTH = self.hidden(batch.input_ids, batch.position_ids, batch.document_ids, keys)
        if places_BK is not None:
            hidden_BTH = hidden_BTH.gather(1, places_BK[..., None].expand(-1, -1, hidden_BTH.shape[-1]))
        return self.lm_head(self.head(hidden_BTH))


class TextEncoder(Body):
    """From texts to [B, outputs], by the head of transformers' BertForSequenceClassification."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        assert config.outputs
        size = config.hidden_size
        self.pooler = nn.Linear(size, size) if config.pool == "token" else None
        self.classifier = nn.Linear(size, config.outputs)

    def forward(self, texts: Texts, keys: Tensor | None = None) -> Tensor:
        """`keys`: of `models.noise.dropout`."""
        place_BT = torch.arange(texts.mask.shape[1], device=texts.mask.device).expand_as(texts.mask)
        hidden_BTH = self.hidden(texts.token_ids, place_BT, (~texts.mask).long(), keys)  # padding is a document apart
        pooled_BH = self.pooler(hidden_BTH[:, 0]).tanh() if self.pooler else mean_of(hidden_BTH, texts.mask)
        return self.classifier(dropout(pooled_BH, keys, 2, self.config.dropout))


def encoder(config: EncoderConfig) -> Body:
    """The network of a config."""
    return Encoder(config) if config.outputs is None else TextEncoder(config)


def mean_of(x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, H], over the places of each row that are no padding."""
    share_BT = mask_BT / mask_BT.sum(1, keepdim=True)
    return (share_BT[:, None].to(x_BTH.dtype) @ x_BTH)[:, 0]


def sine_waves(position_ids: Tensor, size: int) -> Tensor:
    """[B, T, size] fp32: sine and cosine of each position at wavelengths from 2 pi to 10,000 times that
    (arXiv:1706.03762, section 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, size, 2, device=position_ids.device).float() / size)
    angles = position_ids[..., None].float() * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :size]
