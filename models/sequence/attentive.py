"""Gated recurrent units that attend to the sequence they have read (arXiv:1409.0473, 1508.04025).

Shapes: B pairs, S source tokens, T target tokens, H hidden size, L layers, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Decoder(nn.GRU):
    """Goes on by any number of tokens. It is called once for them: under ZeRO-3 a call gathers its weights from all
    processes, whose targets have different lengths. Its layers have the weights of torch's."""

    readout: Tensor
    offset: Tensor
    of_state: Tensor
    of_both: Tensor
    score: Tensor

    def __init__(self, config: EncoderDecoderConfig):
        width, first = config.hidden_size, config.network == "bahdanau"
        super().__init__(3 * width if first else 2 * width, width, config.num_layers)
        self.first = first
        shapes: dict[str, tuple[int, ...]] = {"readout": (width, (4 if first else 3) * width), "offset": (width,)}
        if first:
            shapes |= {"of_state": (width, width), "of_both": (width,), "score": (width,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def forward(self, y_BTH: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:  # type: ignore[override]
        """(outputs [B, T, H], the state after them); a state is what `Attentive.begin` returns."""
        mask, memory, compared, states_BLH, fed_BH = state
        states, found = list(states_BLH.unbind(1)), []
        for y_BH in y_BTH.unbind(1):
            if self.first:
                fed_BH = self._attend(states[-1], mask, memory, compared)
            x_BH = torch.cat([y_BH, fed_BH], 1)
            for layer, before_BH in enumerate(states):
                x_BH = states[layer] = torch.gru_cell(x_BH, before_BH, *self.all_weights[layer])
            read = [fed_BH, y_BH] if self.first else [self._attend(x_BH, mask, memory, compared)]
            fed_BH = F.linear(torch.cat([x_BH, *read], 1), self.readout, self.offset).tanh()
            found.append(fed_BH)
        return torch.stack(found, 1), (mask, memory, compared, torch.stack(states, 1), fed_BH)

    def _attend(self, state_BH: Tensor, mask_BS: Tensor, memory: Tensor, compared_BSH: Tensor) -> Tensor:
        """The source [B, 2H], weighted by an additive score (arXiv:1409.0473, A.1.2) or a bilinear one ("general" of
        arXiv:1508.04025, section 3.1)."""
        if self.first:
            query_BH = F.linear(state_BH, self.of_state, self.of_both)
            scores_BS = (compared_BSH + query_BH[:, None]).tanh() @ self.score
        else:
            scores_BS = (compared_BSH @ state_BH[..., None])[..., 0]
        weights_BS = scores_BS.masked_fill(~mask_BS, float("-inf")).softmax(1)
        return (weights_BS[:, None] @ memory)[:, 0]


class Attentive(nn.Module):
    """See `models.sequence.encoder_decoder.encoder_decoder`."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        assert config.vocab_size is not None, "resolve() fills model.vocab_size"
        self.config, width, layers = config, config.hidden_size, config.num_layers
        self.shared = nn.Embedding(config.vocab_size, width)
        self.encoder = nn.ModuleList(BothWays(2 * width if index else width, width) for index in range(layers))
        self.bridge = nn.Linear(width, layers * width)
        self.of_source = nn.Linear(2 * width, width, bias=False)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.shared.weight

    def init_weights(self, seed: int) -> None:
        """torch's own; a tied embedding has those of the output layer."""
        reset(self, seed)

    def forward(self, source_BS: Tensor, mask_BS: Tensor, target_BT: Tensor, keys: Tensor | None = None) -> Tensor:
        rate, state = self.config.dropout, self.begin(source_BS, mask_BS, keys)
        out_BTH, _ = self.decoder(dropout(self.shared(target_BT), keys, 2, rate), state)
        return self.lm_head(dropout(out_BTH, keys, 3, rate))

    def begin(self, source_BS: Tensor, mask_BS: Tensor, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """(mask, source as it is read, and as it is compared, states [B, L, H], last output)."""
        place, length = torch.arange(source_BS.shape[1], device=source_BS.device), mask_BS.sum(1, keepdim=True)
        turned_BS1 = torch.where(mask_BS, length - 1 - place, place)[..., None]
        memory = dropout(self.shared(source_BS), keys, 1, self.config.dropout)
        for layer in self.encoder:
            memory = layer(memory, turned_BS1)
        whole_BH = memory[:, 0, self.config.hidden_size :]  # after the backward layer has read all
        states_BLH = self.bridge(whole_BH).tanh().unflatten(1, (self.config.num_layers, -1))
        return mask_BS, memory, self.of_source(memory), states_BLH, torch.zeros_like(whole_BH)

    def step(self, tokens_B: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        out_B1H, state = self.decoder(self.shared(tokens_B[:, None]), state)
        return self.lm_head(out_B1H[:, 0]), state
