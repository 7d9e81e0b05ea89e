"""Networks that read one sequence and write another: equal to their references, however padded; and the search."""

from itertools import product

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from configs import ConfigError, from_dict
from models.families import build
from models.init import fill
from models.noise import dropout_keys_of
from models.sequence.search import search

NETWORK = pytest.mark.parametrize("network", ["transformer", "bahdanau", "luong"])
KEYS = {"vocab_size": 11, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12}


def network_of(network="transformer", **keys) -> nn.Module:
    module = build(from_dict({"model": {"family": "encoder_decoder", "network": network, **KEYS, **keys}}).model)
    fill(module, 0)
    return module.eval()


def pairs(lengths=(5, 3, 1)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources, their mask, targets of four tokens."""
    draw = torch.Generator().manual_seed(1)
    source = torch.randint(1, 11, (len(lengths), max(lengths)), generator=draw)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return source, mask, torch.randint(1, 11, (len(lengths), 4), generator=draw)


@torch.no_grad()
def test_the_transformer_is_hugging_faces_marian():
    config = transformers.MarianConfig(
        vocab_size=11, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, activation_function="relu",
        scale_embedding=True, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    reference, module = transformers.MarianMTModel(config).eval(), network_of()
    weights = {
        name: torch.randn_like(value) * 0.4 + name.endswith("norm.weight") for name, value in module.named_parameters()
    }
    module.load_state_dict(weights, strict=False)
    missing = reference.model.load_state_dict(weights, strict=False)
    assert missing.unexpected_keys == []
    assert {name.rpartition(".")[0] for name in missing.missing_keys} <= {
        f"{part}.{table}" for part in ("encoder", "decoder") for table in ("embed_positions", "embed_tokens")
    }
    source, mask, target = pairs()
    expected = reference(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
    assert torch.allclose(module(source, mask, target), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_transformer_is_torchs(norm):
    module = network_of(norm=norm)
    reference = nn.Transformer(8, 2, 2, 2, 12, dropout=0, batch_first=True, norm_first=norm == "pre").eval()
    if norm == "post":
        reference.encoder.norm = reference.decoder.norm = None  # torch's adds one more
    for mine, theirs in ((module.encoder, reference.encoder), (module.decoder, reference.decoder)):
        for layer, other in zip(mine.layers, theirs.layers, strict=True):
            parts = [layer.self_attn, *([layer.encoder_attn] if hasattr(layer, "encoder_attn") else [])]
            own = [other.self_attn, *([other.multihead_attn] if len(parts) > 1 else [])]
            for part, its in zip(parts, own, strict=True):
                its.in_proj_weight.copy_(torch.cat([part.q_proj.weight, part.k_proj.weight, part.v_proj.weight]))
                its.in_proj_bias.copy_(torch.cat([part.q_proj.bias, part.k_proj.bias, part.v_proj.bias]))
                its.out_proj.load_state_dict(part.out_proj.state_dict())
            other.linear1.load_state_dict(layer.fc1.state_dict())
            other.linear2.load_state_dict(layer.fc2.state_dict())
    source, mask, target = pairs()
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    found = reference(
        module._embed(source), module._embed(target), tgt_mask=causal, src_key_padding_mask=~mask,
        memory_key_padding_mask=~mask, tgt_is_causal=True,
    )  # fmt: skip
    assert torch.allclose(module(source, mask, target), module.lm_head(found), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("network", ["bahdanau", "luong"])
def test_attention_is_its_equations(network):
    module = network_of(network, num_layers=1)
    source, _, target = pairs((5,))
    embedded, memory = module.shared(source)[0], []
    for gru, order in ((module.encoder[0].forwards, 1), (module.encoder[0].backwards, -1)):
        states = gru((embedded if order == 1 else embedded.flip(0))[None])[0][0]
        memory.append(states if order == 1 else states.flip(0))
    h_S2H = torch.cat(memory, 1)
    state = torch.tanh(module.bridge(memory[1][0]))
    out, own = torch.zeros(8), dict(module.decoder.named_parameters())
    cell = nn.GRUCell(module.decoder.input_size, 8)
    cell.load_state_dict({name: own[f"{name}_l0"] for name in cell.state_dict()})
    for place, y in enumerate(module.shared(target)[0]):

        def read(s: torch.Tensor) -> torch.Tensor:
            if network == "bahdanau":
                query = own["of_state"] @ s + own["of_both"]
                scores = [own["score"] @ torch.tanh(query + module.of_source(h)) for h in h_S2H]
                return torch.stack(scores).softmax(0) @ h_S2H
            return torch.stack([s @ module.of_source(h) for h in h_S2H]).softmax(0) @ h_S2H

        fed = read(state) if network == "bahdanau" else out
        state = cell(torch.cat([y, fed])[None], state[None])[0]
        seen = [fed, y] if network == "bahdanau" else [read(state)]
        out = torch.tanh(own["readout"] @ torch.cat([state, *seen]) + own["offset"])
        whole = module(source, torch.ones_like(source, dtype=torch.bool), target)
        assert torch.allclose(module.lm_head(out), whole[0, place], atol=1e-6)


@NETWORK
@torch.no_grad()
def test_padding_changes_nothing(network):
    module, lengths = network_of(network), (5, 3, 1)
    source, mask, target = pairs(lengths)
    together = module(source, mask, target)
    for row, length in enumerate(lengths):
        alone = module(source[row : row + 1, :length], mask[row : row + 1, :length], target[row : row + 1, :2])
        assert torch.allclose(together[row, :2], alone[0], atol=1e-6)


@NETWORK
@torch.no_grad()
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_step_by_step_it_is_the_same(network, norm):
    module = network_of(network, norm=norm)
    source, mask, target = pairs()
    whole, state = module(source, mask, target), module.begin(source, mask)
    for place in range(4):
        logits, state = module.step(target[:, place], state)
        assert torch.allclose(logits, whole[:, place], atol=1e-6)
    assert all(len(each) == 3 for each in state)


@NETWORK
@torch.no_grad()
def test_the_search_finds_the_likeliest(network):
    """With as many beams as there are targets, the best of all of them."""
    module, end, most = network_of(network, vocab_size=5), 0, 3
    source, mask, _ = pairs((5, 3))
    source %= 5

    def score(row: int, tokens: list[int]) -> float:
        inputs = torch.tensor([[end, *tokens[:-1]]])
        log_p = module(source[row : row + 1], mask[row : row + 1], inputs)[0].log_softmax(-1)
        return log_p[range(len(tokens)), tokens].mean().item()

    whole = [[*head, end] for size in range(most) for head in product(range(1, 5), repeat=size)]
    whole += [list(each) for each in product(range(1, 5), repeat=most)]
    found = search(module, source, mask, end, beams=64 + 16 + 4 + 1, most=most)
    for row in range(2):
        best = max(whole, key=lambda tokens: score(row, tokens))
        assert found[row] == [token for token in best if token != end]
    greedy = search(module, source, mask, end, beams=1, most=most)
    for row, tokens in enumerate(greedy):
        for place in range(min(most, len(tokens) + 1)):
            inputs = torch.tensor([[end, *tokens[:place]]])
            likeliest = module(source[row : row + 1], mask[row : row + 1], inputs)[0, -1].argmax().item()
            assert likeliest == [*tokens, end][place]
    assert greedy == search(module, source, mask, end, beams=1, most=most, stops=False)


@NETWORK
def test_dropout_belongs_to_the_example(network):
    module = network_of(network, dropout=0.5)
    source, mask, target = pairs()
    keys = dropout_keys_of(3, torch.arange(3))
    together = module(source, mask, target, keys)
    rows = [module(source[n : n + 1], mask[n : n + 1], target[n : n + 1], keys[n : n + 1]) for n in range(3)]
    assert torch.allclose(together, torch.cat(rows), atol=1e-6)
    assert not torch.allclose(together, module(source, mask, target), atol=1e-2)


@NETWORK
@pytest.mark.parametrize("tie", [True, False])
def test_it_begins_knowing_nothing(network, tie):
    module = network_of(network, tie_embeddings=tie, hidden_size=64)
    source, mask, target = pairs()
    loss = F.cross_entropy(module(source, mask, target).flatten(0, 1), target.roll(1, 1).flatten())
    assert 2 < loss.item() < 3.5
    assert (module.lm_head.weight is module.shared.weight) == tie


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"network": "rnn"}, r"model\.network"),
        ({"num_heads": 3}, r"model\.hidden_size \(8\) should be even and a mult"),
    ],
)
def test_wrong_keys(keys, said):
    with pytest.raises(ConfigError, match=said):
        network_of(**keys)
