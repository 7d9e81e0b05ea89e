"""The Transformer that reads one sequence and writes another (arXiv:1706.03762), named as Hugging Face's Marian.

Shapes: B pairs, S source tokens, T target tokens, H hidden size, N heads, D = H / N, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.families.seq2seq import EncoderDecoderConfig
from models.init import fill_by, generator
from models.noise import dropout

from .attentive import Attentive

State = tuple[Tensor, ...]
"""What a decoder goes on from, all of it [B, ...]."""


def encoder_decoder(config: EncoderDecoderConfig) -> nn.Module:
    """The network that `model.network` names. All are called with source tokens [B, S], their mask (bool [B, S], false
    for padding), target tokens [B, T] and dropout's keys, and give logits [B, T, V] of each target token's successor.
    To write token by token, `begin(source, mask)` gives a `State`, and `step(tokens [B], state)` logits [B, V] and the
    next one."""
    return Transformer(config) if config.network == "transformer" else Attentive(config)


def drops(keys: Tensor | None, rate: float) -> Callable[[Tensor], Tensor]:
    """Dropout whose every call is a site of its own."""
    sites: Iterator[int] = count(1)
    return lambda x: dropout(x, keys, next(sites), rate)


def sinusoids(first: int, length: int, width: int, device: torch.device) -> Tensor:
    """[length, width], from place `first` on: sines, then cosines (section 3.5)."""
    place = torch.arange(first, first + length, device=device, dtype=torch.float32)[:, None]
    angle = place / 10000 ** (torch.arange(0, width, 2, device=device) / width)
    return torch.cat([angle.sin(), angle.cos()], 1)


class Attention(nn.Module):
    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.heads, width = config.num_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def keys_values(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, S, D] each."""
        return self._split(self.k_proj(x_BSH)), self._split(self.v_proj(x_BSH))

    def forward(
        self, x_BTH: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        q_BNTD = self._split(self.q_proj(x_BTH))
        found = F.scaled_dot_product_attention(q_BNTD, k_BNSD, v_BNSD, attn_mask=mask, is_causal=causal)
        return self.out_proj(found.transpose(1, 2).flatten(2))

    def _split(self, x_BTH: Tensor) -> Tensor:
        return x_BTH.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Of the encoder; of the decoder, if it attends to the source too."""

    def __init__(self, config: EncoderDecoderConfig, decodes: bool):
        super().__init__()
        width = config.hidden_size
        self.before = config.norm == "pre"
        self.self_attn, self.self_attn_layer_norm = Attention(config), nn.LayerNorm(width)
        if decodes:
            self.encoder_attn, self.encoder_attn_layer_norm = Attention(config), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x_BTH: Tensor, mask: Tensor, source: State, past: State, drop: Callable) -> tuple[Tensor, State]:
        """(output, keys and values of all tokens so far).

        Args:
            mask: bool [B, 1, 1, S], of the source.
            source: keys and values of the source, for a decoder's layer; empty: it is one of the encoder.
            past: keys and values of the tokens before.
        """
        now: State = ()

        def attend(y_BTH: Tensor) -> Tensor:
            nonlocal now
            now = self.self_attn.keys_values(y_BTH)
            if past:
                now = tuple(torch.cat(pair, 2) for pair in zip(past, now, strict=True))
            return self.self_attn(y_BTH, *now, None if source else mask, bool(source) and not past)

        x_BTH = self._add(x_BTH, attend, self.self_attn_layer_norm, drop)
        if source:
            read = lambda y_BTH: self.encoder_attn(y_BTH, *source, mask)  # noqa: E731
            x_BTH = self._add(x_BTH, read, self.encoder_attn_layer_norm, drop)
        x_BTH = self._add(x_BTH, lambda y: self.fc2(F.relu(self.fc1(y))), self.final_layer_norm, drop)
        return x_BTH, now

    def _add(self, x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module, drop: Callable) -> Tensor:
        return x + drop(part(norm(x))) if self.before else norm(x + drop(part(x)))


class Stack(nn.Module):
    def __init__(self, config: EncoderDecoderConfig, decodes: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, decodes) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size) if config.norm == "pre" else nn.Identity()

    def forward(self, x_BTH: Tensor, mask: Tensor, source: list[State], past: list[State], drop: Callable):
        """(output, keys and values of each layer)."""
        found = []
        for layer, read, before in zip(self.layers, source, past, strict=True):
            x_BTH, now = layer(x_BTH, mask, read, before, drop)
            found.append(now)
        return self.layer_norm(x_BTH), found


class Transformer(nn.Module):
    """See `encoder_decoder`."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder, self.decoder = Stack(config, False), Stack(config, True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.shared.weight

    def init_weights(self, seed: int) -> None:
        """Glorot's uniform values, and embeddings that are as small as an output layer's."""
        fill_by("xavier_uniform", self, seed)
        with torch.no_grad():
            self.shared.weight.normal_(0, self.config.hidden_size**-0.5, generator=generator("shared", seed))

    def forward(self, source_BS: Tensor, mask_BS: Tensor, target_BT: Tensor, keys: Tensor | None = None) -> Tensor:
        drop = drops(keys, self.config.dropout)
        mask, read = self._read(source_BS, mask_BS, drop)
        x_BTH, _ = self.decoder(drop(self._embed(target_BT)), mask, read, self._nothing(), drop)
        return self.lm_head(x_BTH)

    def begin(self, source_BS: Tensor, mask_BS: Tensor) -> State:
        mask, read = self._read(source_BS, mask_BS, lambda x: x)
        empty = read[0][0][:, :, :0]
        return (mask, *[each for pair in read for each in pair], *[empty] * (2 * self.config.num_layers))

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        mask, pairs = state[0], [state[i : i + 2] for i in range(1, len(state), 2)]
        read, past = pairs[: self.config.num_layers], pairs[self.config.num_layers :]
        x_B1H = self._embed(tokens_B[:, None], first=past[0][0].shape[2])
        x_B1H, now = self.decoder(x_B1H, mask, read, past, lambda x: x)
        return self.lm_head(x_B1H[:, 0]), (*state[: 1 + 2 * self.config.num_layers], *[e for pair in now for e in pair])

    def _read(self, source_BS: Tensor, mask_BS: Tensor, drop: Callable) -> tuple[Tensor, list[State]]:
        """(the source's mask, its keys and values for each layer of the decoder)."""
        mask = mask_BS[:, None, None]
        memory_BSH, _ = self.encoder(drop(self._embed(source_BS)), mask, self._nothing(), self._nothing(), drop)
        return mask, [layer.encoder_attn.keys_values(memory_BSH) for layer in self.decoder.layers]  # type: ignore[union-attr,operator]

    def _nothing(self) -> list[State]:
        return [()] * self.config.num_layers

    def _embed(self, tokens_BT: Tensor, first: int = 0) -> Tensor:
        x_BTH = self.shared(tokens_BT) * math.sqrt(self.config.hidden_size)
        return x_BTH + sinusoids(first, tokens_BT.shape[1], x_BTH.shape[2], x_BTH.device).to(x_BTH.dtype)
