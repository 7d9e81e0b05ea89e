"""Recurrent networks of torch's cells, which read tokens: Elman's network, GRU, LSTM.

Shapes: B sequences, T tokens, S = B * T, H width of the state (of both directions, if there are two), V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import Config
from configs.sections.families.recurrent import GATES, Cell, RecurrentConfig
from models.batch import Batch, Texts
from models.init import reset
from models.loss import LossOutput, chunked_cross_entropy
from models.noise import dropout, dropout_keys_of
from models.sequence.encoder import mean_of
from models.tasks.masked_language_modelling import most_chosen

LOSS_CHUNK = 4096
"""Tokens whose logits are in memory at once."""


class Part(NamedTuple):
    """Tokens of a window that pass through a layer at once."""

    tokens: slice
    goes_on_B1: Tensor | None
    """Bool: the document of the token before goes on, and with it the state; None: in all sequences."""
    detached: bool
    """No gradient flows back to the part before."""


def parts(batch: Batch, every: int) -> list[Part]:
    """The parts of a batch: one begins wherever a document of any sequence does, which waits for the device, and after
    every `every` tokens (0: there is one part but for that)."""
    length, ids = batch.input_ids.shape[1], batch.document_ids
    cuts = set(range(0, length, every or length))
    starts = set(cuts)
    if ids is not None:
        begins_BT = ids[:, 1:] != ids[:, :-1]
        starts |= {column + 1 for column in begins_BT.any(0).nonzero()[:, 0].tolist()}
    found = []
    for start, end in pairwise([*sorted(starts), length]):
        goes_on = None if ids is None or not start else ~begins_BT[:, start - 1, None]
        found.append(Part(slice(start, end), goes_on, start in cuts))
    return found


class InParts(nn.RNNBase):
    """One of torch's recurrent layers, [B, T, inputs] -> [B, T, H]. It is called once for all parts: under ZeRO-3 a
    call gathers its weights from all processes, whose batches have different parts."""

    def forward(self, x_BTH: Tensor, window: list[Part]) -> Tensor:  # type: ignore[override]
        found, state = [], None
        for part in window:
            if state is not None:
                state = _each(state, partial(_passed_on, part))
            out, state = super().forward(x_BTH[:, part.tokens], state)
            found.append(out)
        return torch.cat(found, 1)


class Elman(InParts, nn.RNN): ...  # type: ignore[misc]


class Gru(InParts, nn.GRU): ...  # type: ignore[misc]


class Lstm(InParts, nn.LSTM): ...  # type: ignore[misc]


CELLS: dict[Cell, tuple[Callable[..., InParts], dict[str, Any]]] = {
    "tanh": (Elman, {"nonlinearity": "tanh"}),
    "relu": (Elman, {"nonlinearity": "relu"}),
    "gru": (Gru, {}),
    "lstm": (Lstm, {}),
}


def _passed_on(part: Part, state_1BH: Tensor) -> Tensor:
    state_1BH = state_1BH.detach() if part.detached else state_1BH
    return state_1BH if part.goes_on_B1 is None else state_1BH * part.goes_on_B1


def _each(state: Tensor | tuple[Tensor, ...], do: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, ...]:
    """An LSTM's state is a pair."""
    return tuple(map(do, state)) if isinstance(state, tuple) else do(state)


def turned(document_ids: Tensor | None, like_BT: Tensor) -> Tensor:
    """[B, T] int64: where each token is when every document is turned round in its place."""
    length = like_BT.shape[1]
    place = torch.arange(length, device=like_BT.device).expand_as(like_BT)
    if document_ids is None:
        return length - 1 - place
    differs = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(F.pad(differs, (1, 0), value=True), place, 0).cummax(1).values
    end = torch.where(F.pad(differs, (0, 1), value=True), place, length).flip(1).cummin(1).values.flip(1)
    return start + end - place


class Body(nn.Module):
    """From tokens to the states of the last layer."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        kind, more = CELLS[config.cell]
        directions = [
            nn.ModuleList(kind(inputs, config.hidden_size, batch_first=True, **more) for inputs in config.inputs)
            for _ in range(1 + config.bidirectional)
        ]
        self.layers = directions[0]
        self.backward_layers = directions[1] if config.bidirectional else None

    def init_weights(self, seed: int) -> None:
        """torch's own initial values; a tied embedding has those of the output layer."""
        reset(self, seed)

    def states(self, tokens_BT: Tensor, documents_BT: Tensor | None, window: list[Part], keys: Tensor | None) -> Tensor:
        """[B, T, H], those of the second direction after those of the first."""
        rate = self.config.dropout
        x_BTH = dropout(self.embed_tokens(tokens_BT), keys, 1, rate)
        for site, layer in enumerate(self.layers, 2):
            found = layer(x_BTH, window)
            if self.backward_layers is not None:
                turned_BT1 = turned(documents_BT, tokens_BT)[..., None]
                other = self.backward_layers[site - 2](x_BTH.gather(1, turned_BT1.expand_as(x_BTH)), window)
                found = torch.cat([found, other.gather(1, turned_BT1.expand_as(other))], 2)
            x_BTH = dropout(found, keys, site, rate)
        return x_BTH

    def output_layer(self) -> nn.Linear:
        """To the logits of tokens."""
        assert self.config.vocab_size
        made = nn.Linear(self.config.state, self.config.vocab_size, bias=False)
        if self.config.tie_embeddings:
            made.weight = self.embed_tokens.weight
        return made


class Recurrent(Body):
    """Summed token cross-entropy of a batch, or its logits, like `models.decoder.model.Decoder`."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.dropout_seed, self.lm_head = 0, self.output_layer()

    def init_weights(self, seed: int) -> None:
        """As `Body.init_weights`. Seeds dropout."""
        super().init_weights(seed)
        self.dropout_seed = seed

    def hidden(self, batch: Batch) -> Tensor:
        """States of the last layer, [B, T, H]."""
        apply = self.training and self.config.dropout
        keys = dropout_keys_of(self.dropout_seed, batch.sequence_ids) if apply else None
        return self.states(batch.input_ids, batch.document_ids, parts(batch, self.config.detach_every), keys)

    def forward(self, batch: Batch) -> LossOutput:
        hidden_SH = self.hidden(batch).flatten(0, 1)
        return chunked_cross_entropy(hidden_SH, self.lm_head.weight, batch.labels.flatten(), LOSS_CHUNK)

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V]."""
        return self.lm_head(self.hidden(batch))


class Bidirectional(Body):
    """From tokens to the logits of each [B, T, V], or [B, K, V] of K places, as `models.sequence.encoder.Encoder`."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.lm_head = self.output_layer()

    def forward(self, batch: Batch, keys: Tensor | None = None, places_BK: Tensor | None = None) -> Tensor:
        x_BTH = self.states(batch.input_ids, batch.document_ids, parts(batch, 0), keys)
        if places_BK is not None:
            x_BTH = x_BTH.gather(1, places_BK[..., None].expand(-1, -1, x_BTH.shape[-1]))
        return self.lm_head(x_BTH)


class RecurrentClassifier(Body):
    """From texts to [B, outputs]."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        assert config.outputs
        self.classifier = nn.Linear(config.state, config.outputs)

    def forward(self, texts: Texts, keys: Tensor | None = None) -> Tensor:
        """`keys`: of `models.noise.dropout`."""
        whole = [Part(slice(None), None, False)]  # no state of a text comes after its padding, in either direction
        x_BTH = self.states(texts.token_ids, (~texts.mask).long(), whole, keys)
        if self.config.pool == "mean":
            return self.classifier(mean_of(x_BTH, texts.mask))
        last_B11, width = texts.mask.sum(1)[:, None, None] - 1, self.config.hidden_size
        forwards_BH = x_BTH[..., :width].gather(1, last_B11.expand(-1, -1, width))[:, 0]
        return self.classifier(torch.cat([forwards_BH, x_BTH[:, 0, width:]], 1))


def recurrent(config: RecurrentConfig) -> Body:
    """The network of a config."""
    if config.outputs is not None:
        return RecurrentClassifier(config)
    return Bidirectional(config) if config.bidirectional else Recurrent(config)


def training_flops(config: Config) -> float | None:
    """Of one window: a multiplication and an addition per weight and token, three times over. None for texts, whose
    lengths differ."""
    model, length = config.model, config.train.seq_len
    assert isinstance(model, RecurrentConfig)
    if model.outputs is not None:
        return None
    gates = GATES[model.cell] * model.state
    weights = sum(gates * (inputs + model.hidden_size) for inputs in model.inputs)
    predicted = most_chosen(config.train.mask_rate, length) if model.bidirectional else length
    return 6.0 * (weights * length + model.state * (model.vocab_size or 0) * predicted)
