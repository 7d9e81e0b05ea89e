"""Bidirectional Transformers: equal to transformers' BERT and ViT; documents apart; dropout that examples own."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from configs import ConfigError, from_dict
from models.batch import Batch, Texts
from models.decoder import attention
from models.decoder.attention import Visibility
from models.families import build
from models.hf.bidirectional import from_theirs, to_config, to_hf
from models.init import fill
from models.noise import dropout_keys_of
from models.sequence.encoder import Shared, sine_waves

SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
BERT = {"family": "encoder", "vocab_size": 60, "max_positions": 24, "pre_norm": False, **SIZES}
TELLS = {**BERT, "outputs": 5}
VIT = {"family": "vit", "image_size": 12, "patch_size": 4, "outputs": 7, **SIZES}


def network(**keys) -> nn.Module:
    module = build(from_dict({"model": keys}).model)
    fill(module, 0)
    return module.eval()


def batch(lengths=(5, 3, 4), rows=2) -> Batch:
    """Rows of documents of these lengths."""
    draw, length = torch.Generator().manual_seed(0), sum(lengths)
    tokens = torch.randint(0, 60, (rows, length), generator=draw)
    positions = torch.cat([torch.arange(each) for each in lengths]).expand(rows, -1)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(rows, -1)
    return Batch(tokens, tokens, positions, documents, torch.arange(rows))


def alone(whole: Batch) -> Batch:
    """Rows as one document each."""
    return Batch(whole.input_ids, whole.labels, torch.arange(whole.labels.shape[1]).expand_as(whole.labels), None,
                 whole.sequence_ids)  # fmt: skip


def reference(module: nn.Module, config) -> nn.Module:
    """transformers' class, with weights of its own in every place, the biases too."""
    tree = to_config(config)
    theirs = getattr(transformers, tree["architectures"][0])(transformers.AutoConfig.for_model(**tree)).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("keys", [BERT, TELLS, VIT], ids=["bert", "bert for texts", "vit"])
def test_it_is_hugging_faces(keys):
    module = network(**keys)
    theirs = reference(module, module.config)
    module.load_state_dict(
        from_theirs(theirs.state_dict(), dict(module.named_parameters()), module.config), strict=False
    )
    if keys is BERT:
        one = alone(batch())
        found, expected = module(one), theirs(one.input_ids).logits
    elif keys is TELLS:
        texts = Texts(batch().input_ids, torch.tensor([[True] * 12, [True] * 7 + [False] * 5]))
        found, expected = module(texts), theirs(texts.token_ids, attention_mask=texts.mask.long()).logits
    else:
        images = torch.randn(3, 3, 12, 12)
        found, expected = module(images), theirs(images).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    # And back: of BERT's two token types ours has the first, added to the positions.
    _, back = to_hf(module.config, module)
    assert back.keys() == dict(theirs.named_parameters()).keys()
    other = reference(module, module.config)
    other.load_state_dict(back, strict=False)
    if keys is TELLS:
        again = other(texts.token_ids, attention_mask=texts.mask.long())
    else:
        again = other(one.input_ids) if keys is BERT else other(images)
    assert torch.allclose(again.logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_mean_of_a_text_is_without_its_padding(positions):
    module = network(**TELLS, pool="mean", positions=positions)
    tokens, mask = batch().input_ids, torch.tensor([[True] * 12, [True] * 7 + [False] * 5])
    short = Texts(tokens[1:, :7], mask[1:, :7])
    assert torch.allclose(module(Texts(tokens, mask))[1:], module(short), atol=1e-6)
    other = tokens.where(mask, 1)
    assert torch.equal(module(Texts(other, mask)), module(Texts(tokens, mask)))


FORMS = {
    "BERT's": {"pre_norm": False},
    "sinusoidal": {"positions": "sinusoidal"},
    "rotary, SwiGLU, RMSNorm": {"positions": "rotary", "activation": "swiglu", "norm": "rms", "tie_embeddings": False},
}
LONG = pytest.mark.parametrize("longest_mask", [512, 8], ids=["mask", "loop"])


@torch.no_grad()
@LONG
@pytest.mark.parametrize("keys", FORMS.values(), ids=FORMS)
def test_a_token_sees_its_own_document_only_on_both_sides(monkeypatch, keys, longest_mask):
    monkeypatch.setattr(attention, "LONGEST_MASK", longest_mask)
    module, whole = network(**BERT | keys), batch((5, 3, 4))
    found = module(whole)
    parts = [part.split((5, 3, 4), 1) for part in (whole.input_ids, whole.position_ids)]
    apart = [module(Batch(ids, ids, places, None, whole.sequence_ids)) for ids, places in zip(*parts, strict=True)]
    assert torch.allclose(found, torch.cat(apart, 1), atol=1e-5)
    changed = batch((5, 3, 4))
    changed.input_ids[:, 7] = (changed.input_ids[:, 7] + 1) % 60
    moved = ((module(changed) - found).abs().amax((0, 2)) > 1e-4).tolist()
    assert moved == [False] * 5 + [True] * 3 + [False] * 4


@LONG
def test_gradients_are_those_of_the_plain_formula(monkeypatch, longest_mask):
    """Queries, keys and values reach the softmax without a causal mask, and gradients come back."""
    monkeypatch.setattr(attention, "LONGEST_MASK", longest_mask)
    module, whole = network(**BERT), batch((6, 6))
    layer = module.stack.layers[0].attention
    x = torch.randn(2, 12, 32, requires_grad=True)
    visible = attention.visibility(12, whole.document_ids, attention.Pattern(causal=False), x)
    layer(x, None, None, visible).square().sum().backward()
    found, x.grad = x.grad, None
    q, k, v = (each(x).unflatten(-1, (4, 8)).transpose(1, 2) for each in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(
        whole.document_ids[:, None, :, None] != whole.document_ids[:, None, None], float("-inf")
    )
    layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).square().sum().backward()
    assert torch.allclose(found, x.grad, atol=1e-6)


@torch.no_grad()
def test_places_are_a_choice_of_all_logits():
    module, whole = network(**BERT), batch()
    places = torch.tensor([[3, 0], [11, 7]])
    assert torch.allclose(module(whole, None, places), module(whole)[torch.arange(2)[:, None], places], atol=1e-6)


@torch.no_grad()
def test_positions_matter_and_sine_waves_are_the_papers():
    for keys in FORMS.values():
        module, whole = network(**BERT | keys), alone(batch())
        swapped = alone(batch())
        swapped.input_ids[:, [1, 2]] = swapped.input_ids[:, [2, 1]]
        assert (module(swapped)[:, 0] - module(whole)[:, 0]).abs().max() > 1e-6
    table = sine_waves(torch.tensor([[0, 3]]), 6)
    angles = 3.0 / 10000 ** (torch.tensor([0, 2, 4]) / 6)
    assert table[0, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.allclose(table[0, 1], torch.stack([angles.sin(), angles.cos()], 1).flatten())


@pytest.mark.parametrize("keys", [BERT, VIT], ids=["encoder", "vit"])
def test_dropout_belongs_to_the_example_and_recomputing_changes_nothing(keys):
    module, images, ids = network(**keys, dropout=0.3), torch.randn(4, 3, 12, 12), torch.arange(4) + 7
    whole = batch(rows=4)

    def run(rows: slice, keys_of: torch.Tensor | None) -> torch.Tensor:
        if keys is VIT:
            return module(images[rows], keys_of)
        cut = {name: value[rows] for name, value in whole.tensors().items() if name != "sequence_ids"}
        return module(Batch(**cut, sequence_ids=ids[rows]), keys_of)

    drawn = dropout_keys_of(0, ids)
    found = run(slice(4), drawn)
    halves = [run(rows, drawn[rows]) for rows in (slice(2), slice(2, 4))]
    assert torch.allclose(found, torch.cat(halves), atol=1e-5)
    assert not torch.allclose(found, run(slice(4), None), atol=1e-3)

    def gradients() -> list[torch.Tensor]:
        module.zero_grad()
        F.cross_entropy(
            run(slice(4), drawn).flatten(0, -2), torch.zeros(run(slice(4), drawn)[..., 0].numel()).long()
        ).backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    before = gradients()
    module.set_activation_checkpointing(1)
    assert all(torch.equal(*pair) for pair in zip(before, gradients(), strict=True))


REFUSED = {
    "heads": (BERT | {"num_heads": 3}, r"model\.hidden_size \(32\) is not a multiple of model\.num_heads \(3\)"),
    "odd": (BERT | {"num_heads": 32, "positions": "rotary"}, r"model\.positions=rotary needs an even head size"),
    "patches": (VIT | {"patch_size": 5}, r"model\.image_size \(12\) is not a multiple of model\.patch_size \(5\)"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_sizes_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": keys})


def test_what_transformers_computes_otherwise_is_not_written():
    for keys, said in ((BERT | {"pre_norm": True}, "model.pre_norm=True: BertForMaskedLM has False"),
                       (VIT | {"pool": "mean"}, "model.pool=mean: ViTForImageClassification has token")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            to_config(from_dict({"model": keys}).model)


@torch.no_grad()
def test_examples_skip_the_last_layers_parts_more_often():
    first, middle, last = network(**VIT | {"num_layers": 3, "stochastic_depth": 0.5}).stack.layers
    x, keys = torch.randn(1000, 2, 32), dropout_keys_of(0, torch.arange(1000))
    shared = Shared(None, None, Visibility(causal=False))
    skipped = [(layer(x, shared, keys) == x).flatten(1).all(1).float().mean().item() for layer in (first, middle, last)]
    assert skipped == pytest.approx([0, 0.25**2, 0.5**2], abs=0.04)
    plain = last(x, shared, None)
    assert torch.allclose(last(x, shared, keys).mean(), plain.mean(), atol=0.05)
    assert torch.allclose(last(x[7:9], shared, keys[7:9]), last(x, shared, keys)[7:9], atol=1e-5)
