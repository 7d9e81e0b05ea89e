"""Gated recurrent units that attend to the sequence they have read (arXiv:1409.0473, 1508.04025).

Shapes: B pairs, S source tokens, T target tokens, H hidden size, L layers, V vocabulary.
"""

import torch
from torch import Tensor, nn

from configs.sections.families.seq2seq import EncoderDecoderConfig
from models.init import reset
from models.noise import dropout


class BothWays(nn.Module):
    """A layer that reads a padded sequence forwards and backwards: [B, S, inputs] -> [B, S, 2H]."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.forwards, self.backwards = (nn.GRU(inputs, hidden, batch_first=True) for _ in range(2))

    def forward(self, x_BSE: Tensor, turned_BS1: Tensor) -> Tensor:
        """`turned_BS1`: where each token is when the sequence, but not its padding, is turned round."""
        forwards, _ = self.forwards(x_BSE)
        backwards, _ = self.backwards(x_BSE.gather(1, turned_BS1.expand_as(x_BSE)))
        return torch.cat([forwards, backwards.gather(1, turned_BS1.expand_as(backwards))], 2)


class Attentive(nn.Module):
    """See `models.sequence.encoder_decoder.encoder_decoder`."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.config, self.first = config, config.network == "bahdanau"
        width, layers = config.hidden_size, config.num_layers
        self.shared = nn.Embedding(config.vocab_size, width)
        self.encoder = nn.ModuleList(BothWays(2 * width if index else width, width) for index in range(layers))
        self.bridge = nn.Linear(width, layers * width)
        fed = 2 * width if self.first else width
        self.cells = nn.ModuleList(nn.GRUCell(width if index else width + fed, width) for index in range(layers))
        self.of_source = nn.Linear(2 * width, width, bias=False)
        if self.first:
            self.of_state, self.score = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        self.readout = nn.Linear((4 if self.first else 3) * width, width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.shared.weight

    def init_weights(self, seed: int) -> None:
        """torch's own; a tied embedding has those of the output layer."""
        reset(self, seed)

    def forward(self, source_BS: Tensor, mask_BS: Tensor, target_BT: Tensor, keys: Tensor | None = None) -> Tensor:
        rate, state, found = self.config.dropout, self.begin(source_BS, mask_BS, keys), []
        target_BTH = dropout(self.shared(target_BT), keys, 2, rate)
        for y_BH in target_BTH.unbind(1):
            out_BH, state = self._next(y_BH, state)
            found.append(out_BH)
        return self.lm_head(dropout(torch.stack(found, 1), keys, 3, rate))

    def begin(self, source_BS: Tensor, mask_BS: Tensor, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """(mask, source as it is read, and as it is compared, states [B, L, H], last output)."""
        place, length = torch.arange(source_BS.shape[1], device=source_BS.device), mask_BS.sum(1, keepdim=True)
        turned_BS1 = torch.where(mask_BS, length - 1 - place, place)[..., None]
        memory = dropout(self.shared(source_BS), keys, 1, self.config.dropout)
        for layer in self.encoder:
            memory = layer(memory, turned_BS1)
        whole_BH = memory[:, 0, self.config.hidden_size :]  # after the backward layer has read all
        states_BLH = self.bridge(whole_BH).tanh().unflatten(1, (len(self.cells), -1))
        return mask_BS, memory, self.of_source(memory), states_BLH, torch.zeros_like(whole_BH)

    def step(self, tokens_B: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        out_BH, state = self._next(self.shared(tokens_B), state)
        return self.lm_head(out_BH), state

    def _next(self, y_BH: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        mask, memory, compared, states_BLH, fed_BH = state
        if self.first:
            fed_BH = self._attend(states_BLH[:, -1], mask, memory, compared)
        x_BH, after = torch.cat([y_BH, fed_BH], 1), []
        for cell, before_BH in zip(self.cells, states_BLH.unbind(1), strict=True):
            x_BH = cell(x_BH, before_BH)
            after.append(x_BH)
        read = [fed_BH, y_BH] if self.first else [self._attend(x_BH, mask, memory, compared)]
        out_BH = self.readout(torch.cat([x_BH, *read], 1)).tanh()
        return out_BH, (mask, memory, compared, torch.stack(after, 1), out_BH)

    def _attend(self, state_BH: Tensor, mask_BS: Tensor, memory: Tensor, compared_BSH: Tensor) -> Tensor:
        """The source [B, 2H], weighted by an additive score (arXiv:1409.0473, A.1.2) or a bilinear one ("general" of
        arXiv:1508.04025, section 3.1)."""
        if self.first:
            scores_BS = self.score((compared_BSH + self.of_state(state_BH)[:, None]).tanh())[..., 0]
        else:
            scores_BS = (compared_BSH @ state_BH[..., None])[..., 0]
        weights_BS = scores_BS.masked_fill(~mask_BS, float("-inf")).softmax(1)
        return (weights_BS[:, None] @ memory)[:, 0]
