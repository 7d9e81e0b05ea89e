"""Recurrent language models of torch's cells: Elman's network, GRU, LSTM.

Shapes: B sequences, T tokens, S = B * T, H width of the state.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs import Config
from configs.sections.families.recurrent import GATES, Cell, RecurrentConfig
from models.batch import Batch
from models.init import reset
from models.loss import LossOutput, chunked_cross_entropy
from models.noise import dropout, dropout_keys_of

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


class Recurrent(nn.Module):
    """Summed token cross-entropy of a batch, or its logits, like `models.decoder.model.Decoder`."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.config, self.dropout_seed = config, 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        kind, more = CELLS[config.cell]
        layers = (kind(inputs, config.hidden_size, batch_first=True, **more) for inputs in config.inputs)
        self.layers = nn.ModuleList(layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self, seed: int) -> None:
        """torch's own initial values; a tied embedding has those of the output layer. Seeds dropout."""
        reset(self, seed)
        self.dropout_seed = seed

    def hidden(self, batch: Batch) -> Tensor:
        """States of the last layer, [B, T, H]."""
        rate, window = self.config.dropout, parts(batch, self.config.detach_every)
        keys = dropout_keys_of(self.dropout_seed, batch.sequence_ids) if self.training and rate else None
        x_BTH = dropout(self.embed_tokens(batch.input_ids), keys, 1, rate)
        for site, layer in enumerate(self.layers, 2):
            x_BTH = dropout(layer(x_BTH, window), keys, site, rate)
        return x_BTH

    def forward(self, batch: Batch) -> LossOutput:
        hidden_SH = self.hidden(batch).flatten(0, 1)
        return chunked_cross_entropy(hidden_SH, self.lm_head.weight, batch.labels.flatten(), LOSS_CHUNK)

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V]."""
        return self.lm_head(self.hidden(batch))


def training_flops(config: Config) -> float:
    """Of one window: a multiplication and an addition per weight and token, three times over."""
    model = config.model
    assert isinstance(model, RecurrentConfig)
    gates = GATES[model.cell] * model.hidden_size
    weights = sum(gates * (inputs + model.hidden_size) for inputs in model.inputs)
    return 6.0 * (weights + model.hidden_size * (model.vocab_size or 0)) * config.train.seq_len
