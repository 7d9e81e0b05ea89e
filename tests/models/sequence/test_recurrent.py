"""Recurrent language models: torch's cells, a state that ends with its document, gradients that end where asked."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from configs import ConfigError, from_dict, resolve
from configs.sections.families.recurrent import Cell
from models.batch import Batch, Texts
from models.decoder.generate import generate
from models.families import build
from models.flops import counted_flops, flops_of_example
from models.init import fill

CELL = pytest.mark.parametrize("cell", Cell.__args__)
KEYS = {"family": "recurrent", "vocab_size": 40, "hidden_size": 12, "embedding_size": 8, "num_layers": 2}


def config_of(**keys):
    train = {"seq_len": 9, "global_batch": 2, "precision": "fp32"}
    return resolve(from_dict({"model": KEYS | keys, "train": train, "data": {"path": "x"}}), vocab_size=40)[0]


def network(seed=0, **keys) -> nn.Module:
    module = build(config_of(**keys).model)
    fill(module, seed)
    return module


def batch_of(rows: int, length: int, documents=None) -> Batch:
    tokens = torch.randint(0, 40, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    ids = None if documents is None else torch.tensor(documents)
    places = torch.arange(length).expand(rows, length)
    return Batch(tokens[:, :-1], tokens[:, 1:], places, ids, torch.arange(rows))


@CELL
def test_it_is_torchs(cell):
    module, batch = network(cell=cell), batch_of(3, 9)
    kind = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell) or partial(nn.RNN, nonlinearity=cell)
    reference = kind(8, 12, num_layers=2, batch_first=True)
    for number, layer in enumerate(module.layers):
        for name, weight in layer.named_parameters():
            getattr(reference, name.replace("_l0", f"_l{number}")).data.copy_(weight.data)
    logits = module.lm_head(reference(module.embed_tokens(batch.input_ids))[0])
    assert torch.allclose(module.logits(batch), logits, atol=1e-6)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    found = module(batch)
    assert (found.loss_sum.item(), found.tokens.item()) == (pytest.approx(expected.item(), rel=1e-6), 27)
    found.loss_sum.backward()
    mine = {f"{name}{n}": p.grad for n, each in enumerate(module.layers) for name, p in each.named_parameters()}
    expected.backward()
    for name, weight in reference.named_parameters():
        assert torch.allclose(mine[f"{name[:-1]}0{name[-1]}"], weight.grad, rtol=1e-4, atol=1e-5)


@CELL
def test_a_state_ends_with_its_document(cell):
    documents = [[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2, 2, 2], [0] * 9]
    module, batch = network(cell=cell), batch_of(3, 9, documents)
    found = module.logits(batch)
    for row, ids in enumerate(documents):
        for document in set(ids):
            own = [column for column, each in enumerate(ids) if each == document]
            alone = Batch(*[each[row : row + 1, own] for each in (batch.input_ids,) * 3], None, torch.zeros(1))
            assert torch.allclose(found[row, own], module.logits(alone)[0], atol=1e-6)
    assert not torch.allclose(found[0], module.logits(batch_of(3, 9))[0], atol=1e-3)


@CELL
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 0, 0, 0, 1, 1, 1]]])
def test_gradients_end_where_asked(cell, documents):
    batch, whole = batch_of(1, 9, documents), network(cell=cell)
    cut = network(cell=cell, detach_every=4)
    assert torch.allclose(cut.logits(batch), whole.logits(batch), atol=1e-6)

    def reached(module: nn.Module, column: int) -> list[int]:
        """Columns of the input that the loss of a column has a gradient for."""
        embedded = []
        hook = module.embed_tokens.register_forward_hook(lambda _, __, out: embedded.append(out.retain_grad() or out))
        module.logits(batch)[0, column].square().sum().backward()
        hook.remove()
        return embedded[0].grad[0].abs().sum(-1).nonzero()[:, 0].tolist()

    first = 6 if documents else 0
    assert reached(whole, 8) == list(range(first, 9))
    assert reached(cut, 8) == [8]
    assert reached(cut, 7) == list(range(max(first, 4), 8))
    assert reached(cut, 3) == [0, 1, 2, 3]


def test_dropout_belongs_to_the_example():
    module, batch = network(dropout=0.5), batch_of(4, 9)
    together = module.logits(batch)
    rows = [[each[row : row + 1] for each in (batch.input_ids,) * 3] for row in range(4)]
    rows = [[each[row : row + 1] for each in (batch.input_ids,) * 3] for row in range(4)]
    alone = [Batch(*row, None, torch.tensor([number])) for number, row in enumerate(rows)]
    assert torch.allclose(together, torch.cat([module.logits(each) for each in alone]), atol=1e-6)
    assert not torch.allclose(together, module.eval().logits(batch), atol=1e-2)
    assert torch.equal(module.logits(batch), network().logits(batch))


def test_tied_embeddings():
    module = network(tie_embeddings=True, embedding_size=None)
    assert {name.partition(".")[0] for name, _ in module.named_parameters()} == {"embed_tokens", "layers"}
    found = module(batch_of(3, 9))
    assert found.loss_sum.item() / found.tokens.item() == pytest.approx(torch.tensor(40.0).log().item(), rel=0.05)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tie_embeddings": True}, r"model\.embedding_size \(8\) to be model\.hidden_size \(12\)"),
        ({"cell": "lsm"}, r"model\.cell"),
        ({"num_layers": 0}, r"model\.num_layers"),
        ({"vocab_size": 30}, r"model\.vocab_size is 30 but the tokenizer of data\.path has 40 tokens"),
    ],
)
def test_wrong_keys(keys, said):
    with pytest.raises(ConfigError, match=said):
        config_of(**keys)


@CELL
def test_flops_are_those_that_are_counted(cell):
    config = config_of(cell=cell)
    # The counter leaves out the gradient of the embedding's output, and that of the state before the first token.
    counted = counted_flops(config, batch_of(2, 9))
    assert counted == pytest.approx(flops_of_example(config, lambda: None), rel=0.1)


def test_it_generates_as_it_reads():
    module, prompts = network().eval(), [[3, 1, 4], [1, 5, 9, 2, 6]]
    found = generate(module, prompts, max_new_tokens=5, temperature=0)
    for prompt, added in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt + added])
        logits = module.logits(Batch(tokens, tokens, tokens, None, torch.zeros(1)))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == added


@torch.no_grad()
@pytest.mark.parametrize(
    ("cell", "both", "pool"), [("lstm", True, "last"), ("gru", False, "last"), ("gru", True, "mean")]
)
def test_texts_are_read_as_torch_reads_packed_sequences(cell, both, pool):
    module = network(cell=cell, bidirectional=both, outputs=3, pool=pool)
    tokens, mask = batch_of(3, 9).input_ids, torch.arange(9) < torch.tensor([[9], [4], [1]])
    reference = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](8, 12, num_layers=2, batch_first=True, bidirectional=both)
    for suffix, layers in (("", module.layers), ("_reverse", module.backward_layers or ())):
        for number, layer in enumerate(layers):
            for name, weight in layer.named_parameters():
                getattr(reference, name.replace("_l0", f"_l{number}{suffix}")).data.copy_(weight.data)
    packed = pack_padded_sequence(module.embed_tokens(tokens), mask.sum(1), batch_first=True)
    states, last = reference(packed)
    states, _ = pad_packed_sequence(states, batch_first=True)
    last = torch.cat([*(last[0] if cell == "lstm" else last)[-1 - both :]], 1)
    pooled = last if pool == "last" else states.sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(module(Texts(tokens, mask)), module.classifier(pooled), atol=1e-6)


@torch.no_grad()
def test_both_directions_keep_documents_apart():
    module = network(bidirectional=True)
    batch = batch_of(2, 9, [[0, 0, 0, 1, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 4, 5, 6]])
    found = module(batch)
    for row, documents in enumerate(([(0, 3), (3, 9)], [(0, 7), (7, 8), (8, 9)])):
        for start, end in documents:
            part = Batch(*(each[row : row + 1, start:end] for each in (batch.input_ids, batch.labels)),
                         batch.position_ids[:1, : end - start], None, batch.sequence_ids[:1])  # fmt: skip
            assert torch.allclose(found[row, start:end], module(part)[0], atol=1e-6)
    some = module(batch, None, torch.tensor([[2, 8], [0, 1]]))
    assert torch.equal(some, torch.stack([found[0, [2, 8]], found[1, [0, 1]]]))


def test_flops_of_both_directions_are_their_matrix_products():
    train = {"seq_len": 9, "global_batch": 2, "precision": "fp32", "mask_rate": 0.3}
    keys = {"model": KEYS | {"bidirectional": True}, "train": train, "data": {"document_mask": False}}
    config = resolve(from_dict(keys), vocab_size=40)[0]
    assert config.task == "masked_language_modelling"
    batch = batch_of(2, 9)
    no_state = 4 * 2 * 12 * 48  # before the first token, so that no gradient passes back to it
    assert flops_of_example(config, lambda: batch) == counted_flops(config, batch) + no_state
