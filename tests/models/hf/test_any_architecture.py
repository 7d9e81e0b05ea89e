"""Any architecture of transformers: what transformers computes with the same weights, and what cannot be trained."""

import sys

import pytest
import torch
import transformers
from torch.nn import functional as F

from configs import ConfigError, from_dict, resolve
from configs.sections.model_from import take_model
from models.batch import Batch, PairBatch, Texts
from models.families import build, family_of
from models.flops import counted_flops
from models.init import fill
from models.sequence.search import search
from models.tasks.table import reads, task_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
EXPERTS = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
LANGUAGE = {
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "LlamaForCausalLM": {**SIZES, "num_key_value_heads": 2},
    "MixtralForCausalLM": EXPERTS,
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "Mamba2ForCausalLM": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1,
        "chunk_size": 16,
    },
    "BertLMHeadModel": {**SIZES, "is_decoder": True},
}  # fmt: skip
MASKED = {"BertForMaskedLM": SIZES, "ModernBertForMaskedLM": SIZES}
IMAGES = {
    "ViTForImageClassification": {**SIZES, "image_size": 12, "patch_size": 4},
    "ResNetForImageClassification": {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    },
}  # fmt: skip
TEXTS = {
    "BertForSequenceClassification": SIZES,
    "GPT2ForSequenceClassification": {"n_embd": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 96},
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
PAIRS = {
    "T5ForConditionalGeneration": T5,
    "MarianMTModel": BART,
    "BartForConditionalGeneration": BART,
    "SwitchTransformersForConditionalGeneration": {
        **T5, "num_decoder_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    },
}  # fmt: skip
ALL = LANGUAGE | MASKED | IMAGES
VOCABULARY = 97


def section(name, keys=None, **more):
    more = ({"outputs": 3, "channels": 1} if name in IMAGES else {"vocab_size": VOCABULARY}) | more
    more |= {"outputs": 3} if name in TEXTS else {}
    config = (ALL | TEXTS | PAIRS)[name] if keys is None else keys
    return from_dict({"model": {"family": "transformers", "architecture": name, "config": config} | more}).model


def network(name, seed=0, keys=None, **more):
    module = build(section(name, keys, **more))
    fill(module, seed)
    return module


def inputs(name):
    if name in IMAGES:
        return torch.linspace(-1, 1, 2 * 144).view(2, 1, 12, 12)
    return torch.arange(32).view(2, 16) * 7919 % VOCABULARY


def batch(ids, documents=None, positions=None):
    places = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    return Batch(ids, ids.roll(-1, 1), places, documents, torch.arange(len(ids)))


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_it_computes_what_transformers_does_with_an_exported_folder(tmp_path, name):
    module = network(name)
    x, weights = inputs(name), {key: value.clone() for key, value in module.named_parameters()}
    module.eval()
    mine = module.logits(batch(x)) if name in LANGUAGE else module(x if name in IMAGES else batch(x))
    if name in LANGUAGE:
        loss = module(batch(x))
        wanted = F.cross_entropy(mine.flatten(0, 1), x.roll(-1, 1).flatten(), reduction="sum")
        assert (loss[0].item(), loss[1]) == (pytest.approx(wanted.item(), rel=1e-6), x.numel())
    family_of(module.config).save(module, tmp_path, None, None, 10**9)
    auto = transformers.AutoModelForImageClassification if name in IMAGES else transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForMaskedLM if name in MASKED else auto
    other = auto.from_pretrained(tmp_path).eval()
    assert type(other).__name__ == name
    assert torch.equal(other(x).logits, mine)
    # And back: the keys by model.from, the weights by train.init_from.
    tree, _ = take_model({"model": {"family": "transformers", "from": str(tmp_path), "architecture": name}}, "c")
    again = build(from_dict(tree).model)
    fill(again, 1)
    loaded = family_of(again.config).load(again, tmp_path)
    assert (loaded.differs, loaded.weights.keys()) == ({}, weights.keys())
    assert all(torch.equal(loaded.weights[key], value) for key, value in weights.items())
    assert bool(loaded.memory) == ("ResNet" in name)


MASK = torch.tensor([[True] * 16, [True] * 9 + [False] * 7])


@torch.no_grad()
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_what_transformers_finds_it_to_be(tmp_path, name):
    module, ids = network(name).eval(), inputs(name)
    found = module(Texts(ids, MASK))
    assert torch.allclose(found[1:], module(Texts(ids[1:, :9], MASK[1:, :9])), atol=1e-6)
    family_of(module.config).save(module, tmp_path, None, None, 10**9)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    pad = 0 if module.pad is None else module.pad
    assert torch.equal(other(ids.where(MASK, pad), attention_mask=MASK.long()).logits, found)
    tree, _ = take_model({"model": {"family": "transformers", "from": str(tmp_path), "architecture": name}}, "c")
    again = build(from_dict(tree).model)
    fill(again, 1)
    assert family_of(again.config).load(again, tmp_path).differs == {}


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_of_a_pair_is_transformers_own(tmp_path, name):
    module, ids = network(name), inputs(name)
    start = torch.full((2, 1), 5)
    labels = ids.flip(0).masked_fill(~MASK, -100)
    target = torch.cat([start, ids.flip(0)[:, :-1]], 1)
    batch = PairBatch(ids, MASK, target, labels, torch.arange(2))
    config = from_dict({"model": module.config.model_dump(), "data": {"path": "x"}, "train": {"sample_tokens": 0}})
    sums = task_of(config).loss({"model": module}, batch, "model")
    more = {"output_router_logits": True} if "Switch" in name else {}
    theirs = module.network(ids, MASK.long(), decoder_input_ids=target, labels=labels, **more).loss
    assert (sums.loss / sums.weight + (sums.penalty or 0)).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert bool(sums.penalty) == ("Switch" in name)
    module.eval()
    found = search(module, ids, MASK, 5, beams=1, most=6)
    how = {"decoder_start_token_id": 5, "eos_token_id": 5, "pad_token_id": 5, "max_new_tokens": 6, "do_sample": False}
    written = module.network.generate(ids, attention_mask=MASK.long(), **how, num_beams=1, forced_eos_token_id=None)
    assert found == [[token for token in row[1:].tolist() if token != 5] for row in written]
    family_of(module.config).save(module, tmp_path, None, None, 10**9)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = again(ids, MASK.long(), decoder_input_ids=target).logits
        assert torch.equal(logits, module(ids, MASK, target))


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "ResNetForImageClassification"])
def test_initial_weights_are_a_function_of_the_seed(name):
    torch.manual_seed(5)
    one, other = network(name).state_dict(), network(name, seed=1).state_dict()
    torch.manual_seed(6)
    before = torch.get_rng_state()
    again = network(name).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert sum(not torch.equal(value, other[key]) for key, value in one.items()) > len(one) / 4
    matrix = next(value for value in one.values() if value.dim() > 1)
    assert 0.01 < matrix.std() < 0.5


def test_documents_are_kept_apart():
    module, ids = network("LlamaForCausalLM").eval(), inputs("LlamaForCausalLM")
    starts = torch.tensor([[5, 16], [9, 16]])
    documents = (torch.arange(16) >= starts[:, :1]).long()
    places = torch.arange(16) - documents * starts[:, :1]
    with torch.no_grad():
        loss = module(batch(ids, documents, places))[0]
        alone = 0.0
        for row, (first, _) in zip(ids, starts.tolist(), strict=True):
            for part in (slice(0, first), slice(first, 16)):
                found = module.network(row[None, part]).logits[0]
                alone += F.cross_entropy(found, row.roll(-1)[part], reduction="sum").item()
    assert loss.item() == pytest.approx(alone, rel=1e-5)


def test_documents_are_kept_apart_on_both_sides():
    module, ids = network("BertForMaskedLM").eval(), inputs("BertForMaskedLM")
    documents = (torch.arange(16) >= 6).long().expand(2, 16)
    places = torch.arange(16) - documents * 6
    with torch.no_grad():
        found = module(batch(ids, documents, places))
        alone = torch.cat([module.network(part).logits for part in (ids[:, :6], ids[:, 6:])], 1)
        some = module(batch(ids, documents, places), places_BK=torch.tensor([[3, 9], [15, 0]]))
    assert torch.allclose(found, alone, atol=1e-5)
    assert torch.equal(some, torch.stack([found[0, [3, 9]], found[1, [15, 0]]]))
    windowed = network("ModernBertForMaskedLM")
    with pytest.raises(ConfigError, match=r"data\.document_mask=true: ModernBertForMaskedLM cannot keep"):
        windowed(batch(ids, documents, places))


def test_what_is_continued_does_not_see_its_padding():
    for name in ("LlamaForCausalLM", "MambaForCausalLM"):
        module, ids = network(name).eval(), inputs(name)
        documents = (torch.arange(16) >= torch.tensor([[0], [6]])).long()
        with torch.no_grad():
            found = module.logits(batch(ids, documents))
            alone = module.network(ids[1:, 6:]).logits
        assert torch.allclose(found[1, 6:], alone[0], atol=1e-5)


def test_experts_bring_their_balancing_loss():
    module = network("MixtralForCausalLM", keys={**EXPERTS, "router_aux_loss_coef": 0.5})
    x = inputs("MixtralForCausalLM")
    config = from_dict({"model": module.config.model_dump(), "data": {"path": "x"}})
    found = task_of(config).loss({"model": module}, batch(x), "model")
    aux = module.network(x, output_router_logits=True).aux_loss
    assert found.penalty.item() == pytest.approx(0.5 * aux.item(), rel=1e-6)
    assert task_of(config).evaluate({"model": module.eval()}, batch(x)).penalty is None


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ViTForImageClassification"])
def test_layers_are_computed_again(name):
    module, x = network(name).train(), inputs(name)

    def gradients():
        module.zero_grad()
        (module(x).sum() if name in IMAGES else module(batch(x))[0]).backward()
        return [p.grad.clone() for p in module.parameters()]

    plain, calls = gradients(), []
    module.set_activation_checkpointing(2)
    for part in module.modules():
        if type(part).__name__ in ("GPT2Attention", "ViTAttention"):
            part.register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(torch.equal(one, other) for one, other in zip(gradients(), plain, strict=True))
    assert len(calls) == 3  # one layer of two, once more


def test_flops_are_of_the_experts_that_are_chosen():
    config = from_dict({"model": section("MixtralForCausalLM").model_dump(), "data": {"path": "x"}})
    width, inner, length = 32, 64, 16
    attention, experts = width * (2 * width + 2 * 16), 2 * 3 * width * inner
    matrices = 2 * (attention + 4 * width + experts) + VOCABULARY * width
    scores = 2 * 2 * 2 * length * width  # of two layers: queries with keys, and with values
    one = batch(inputs("MixtralForCausalLM"), documents=torch.zeros(2, 16, dtype=torch.int64))
    assert counted_flops(config, one) == 3 * length * (2 * matrices + scores)


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_in_bf16_it_computes_nearly_the_same(tmp_path, name):
    module, x = network(name).eval(), inputs(name)

    def found():
        return module.logits(batch(x)) if name in LANGUAGE else module(x if name in IMAGES else batch(x))

    exact = found()
    tables = {key: each.clone() for key, each in module.named_buffers() if key.endswith("inv_freq")}
    module.bfloat16()
    assert not torch.equal(found(), exact)
    assert (found() - exact).abs().max() < 0.05 * exact.std() + 0.02
    buffers = dict(module.named_buffers())
    assert all(torch.equal(buffers[key], each) for key, each in tables.items())
    assert bool(tables) == (name in ("LlamaForCausalLM", "MixtralForCausalLM", "ModernBertForMaskedLM"))


def test_the_class_decides_task_and_data():
    for name, task, kind in (
        ("GPT2LMHeadModel", "language_modelling", "tokens"), ("ViTForImageClassification", "classification", "images"),
    ):  # fmt: skip
        config = from_dict({"model": section(name).model_dump(), "data": {"path": "x.parquet"}})
        assert (config.task, reads(config)) == (task, kind)
    with pytest.raises(ConfigError, match=r"task=classification .* from tokens to loss of tokens: set task=language_"):
        resolve(from_dict({"model": section("GPT2LMHeadModel").model_dump(), "task": "classification"}))


REFUSED = {
    "no task": (
        "BertForQuestionAnswering",
        {},
        r"model\.architecture.*no task can train this class: its name should end in For",
    ),
    "two texts at once": ("BartForSequenceClassification", BART, r"takes no padded texts: set it to an encoder, or a"),
    "no padding": (
        "GPT2ForSequenceClassification",
        {},
        r"cannot read padded texts .*: set model\.config\.pad_tok",
    ),
    "no such class": ("VitForImageClassification", {}, r"has no such class: did you mean ViTForImageClassification\?"),
    "no images": ("ImageGPTForImageClassification", {}, r"takes input_ids, not images"),
    "unknown key": ("GPT2LMHeadModel", {"n_layers": 2}, r"unknown key model\.config\.n_layers: .* mean n_layer"),
    "a wrong type": ("GPT2LMHeadModel", {"n_layer": "two"}, r"model\.config: GPT2Config refuses it: .*n_layer"),
    "sizes that do not fit": ("GPT2LMHeadModel", {"n_embd": 30, "n_head": 4, "n_layer": 1}, r"model\.config: GPT2LMH"),
    "of another kind": ("WhisperForConditionalGeneration", {}, r"has it, but not among .* for task=sequence_to_seq"),
    "dropout": ("GPT2LMHeadModel", {"resid_pdrop": 0.1}, r"resid_pdrop=0\.1: dropout .*: set it to 0, or leave it out"),
    "a key of the other kind": ("GPT2LMHeadModel", {}, r"unknown key model\.outputs: known keys: .*, vocab_size"),
    "a key of ours": ("GPT2LMHeadModel", {"vocab_size": 9}, r"vocab_size: set model\.vocab_size instead"),
    "code from elsewhere": ("GPT2LMHeadModel", {"_attn_implementation": "a/b"}, r"_attn_implementation is not a key"),
    "weights from elsewhere": ("ViTForImageClassification", {"backbone": "x"}, r"backbone is not a key that describes"),
    "endless": ("GPT2LMHeadModel", {"n_layer": 10**9}, r"n_layer=1000000000: at most 10,000"),
    "no size": ("ViTForImageClassification", {}, r"model\.config\.image_size is not set"),
    "it sees the future": ("BertLMHeadModel", SIZES, r"sees the tokens that it should predict: set .*is_decoder=true"),
}


@pytest.mark.parametrize(("name", "keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name, keys, message):
    other = {"outputs": 2} if "outputs" in message else {}
    own = {} if name.endswith(("ForImageClassification", "ForQuestionAnswering")) else {"vocab_size": VOCABULARY}
    with pytest.raises(ConfigError, match=message):
        fill(
            build(
                from_dict(
                    {"model": {"family": "transformers", "architecture": name, "config": keys} | own | other}
                ).model
            ),
            0,
        )


def test_a_size_below_0_is_refused():
    model = {"family": "transformers", "architecture": "T5ForConditionalGeneration", "vocab_size": VOCABULARY}
    config = from_dict({"model": model | {"config": {"d_model": -3}}}).model
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=r"model\.config: T5For.* cannot be built .*negative dim"),
    ):
        build(config)


CHECKED = {
    "documents": (
        "MambaForCausalLM",
        {},
        r"data\.document_mask=true: MambaForCausalLM cannot keep .*: set it to false",
    ),
    "positions": (
        "GPT2LMHeadModel",
        {"n_positions": 64},
        r"train\.seq_len \(256\) .* model\.config\.n_positions \(64\)",
    ),
}


@pytest.mark.parametrize(("name", "keys", "message"), CHECKED.values(), ids=CHECKED)
def test_what_other_sections_ask_is_checked(name, keys, message):
    module = build(section(name, ALL[name] | keys))
    with pytest.raises(ConfigError, match=message):
        module.check(from_dict({"model": module.config.model_dump()}))


def test_a_mixer_of_documents_is_found_by_trying():
    """OPT takes positions, but does not begin again where they do."""
    keys = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = network("OPTForCausalLM", keys=keys)
    with pytest.raises(ConfigError, match=r"data\.document_mask=true: OPTForCausalLM cannot keep"):
        module(batch(inputs("GPT2LMHeadModel"), documents=torch.zeros(2, 16)))


def test_random_passes_are_found_by_trying(monkeypatch):
    monkeypatch.setattr(transformers.GPT2Config, "resid_pdrop", 0.1)
    plain = transformers.GPT2Config.__setattr__
    monkeypatch.setattr(
        transformers.GPT2Config, "__setattr__", lambda self, key, x: plain(self, key, 0.1 if "pdrop" in key else x)
    )
    with pytest.raises(ConfigError, match=r"draws random numbers during training, .* set the keys of model\.config"):
        network("GPT2LMHeadModel")


def test_another_head_begins_anew_and_another_body_is_refused(tmp_path):
    module = network("ViTForImageClassification", outputs=5)
    family_of(module.config).save(module, tmp_path, None, None, 10**9)
    mine = network("ViTForImageClassification", seed=1)
    loaded = family_of(mine.config).load(mine, tmp_path)
    assert loaded.differs == {f"classifier.{key}": ["other shape", "new"] for key in ("bias", "weight")}
    assert {name for name, _ in mine.named_parameters()} - loaded.weights.keys() == {
        "network.classifier.bias", "network.classifier.weight",
    }  # fmt: skip
    keys = IMAGES["ViTForImageClassification"]
    for other, what in (({"num_hidden_layers": 3}, "no vit.layers.2"), ({"hidden_size": 16}, "vit")):
        deeper = network("ViTForImageClassification", keys=keys | other)
        with pytest.raises(ConfigError, match=f"has {what}.*: set model.architecture and model.config to match it"):
            family_of(deeper.config).load(deeper, tmp_path)
    acts = network("ViTForImageClassification", keys=keys | {"hidden_act": "relu"}, outputs=5)
    assert family_of(acts.config).load(acts, tmp_path).differs == {"model.config.hidden_act": ["gelu", "relu"]}


def test_pickled_weights_are_not_read(tmp_path):
    module = network("ViTForImageClassification")
    family_of(module.config).save(module, tmp_path, None, None, 10**9)
    torch.save(module.network.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors file; pickled weights .* are not read"):
        family_of(module.config).load(module, tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("configs.sections.pairs.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"model\.family=transformers needs transformers: pip install 'muster-train\["
    ):
        resolve(from_dict({"model": section("GPT2LMHeadModel").model_dump()}))
