"""Runs that tell what a text is, or read in both directions, or are of transformers' sequence-to-sequence classes: in
one process or two the same, and through a kill -9 bit for bit."""

import pytest
import torch
import transformers
from plugin_runs import drawn
from support import train_in_process
from text_runs import STEPS, Clean, assert_same_after_a_kill, assert_two_processes_learn_the_same, make

from trainer.checkpoint.export import export, load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics

SLOW = pytest.mark.slow
MODELS = ("encoder", "recurrent", "bert", "masked", "t5")


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"), tiny_data)


@SLOW
@pytest.mark.parametrize("name", MODELS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, name):
    assert_same_after_a_kill(name, tmp_path, clean)


@SLOW
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_learn_what_one_does(tmp_path, clean, name, zero):
    assert_two_processes_learn_the_same(name, zero, tmp_path, clean)


@SLOW
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_run_is_exported_and_begun_from_its_export(tmp_path, tiny_data, clean, name):
    export(clean[name], tmp_path / "out")
    module, _, _ = load_module(clean[name], reads=None)
    ids = torch.arange(16)[None]
    auto = {"bert": transformers.AutoModelForSequenceClassification, "t5": transformers.AutoModelForSeq2SeqLM}[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer("ab").input_ids) == (256, [*b"ab"])
    other, more = auto.from_pretrained(tmp_path / "out").eval(), {"decoder_input_ids": ids} if name == "t5" else {}
    mine = dict(module.network.named_parameters())
    assert {n for n, p in other.named_parameters() if torch.equal(p, mine[n])} == mine.keys()
    with torch.no_grad():  # tensors that lie elsewhere in memory may be added up in another order
        assert torch.allclose(other(ids, **more).logits, module.network(ids, **more).logits, rtol=0, atol=1e-6)
    if name == "t5":
        assert other.generate(ids, max_new_tokens=3).shape[1] <= 4
    start = {"train": {"init_from": str(tmp_path / "out"), "steps": 1}, "optim": {"lr": 1e-12}}
    run_dir = make(name, tmp_path, tiny_data, **start)
    assert [e for e in read_events(run_dir) if e["event"] == "init_from"] == []
    assert train_in_process(run_dir) == 0
    last, first = Reader(folder(clean[name], STEPS)), Reader(folder(run_dir, 1))
    assert all(torch.allclose(first.weight(n), last.weight(n), atol=1e-9) for n in last.manifest.shapes["weight"])


@SLOW
def test_the_commands_know_it(muster, clean):
    run_dir = clean["encoder"]
    code, out, _ = muster("eval", str(run_dir), "--sequences", "5")
    last = [m for m in read_metrics(run_dir) if "eval_loss" in m][-1]
    assert code == 0
    assert f"{last['eval_loss']:.4f}" in out
    assert last["eval_texts"] == 5
    assert "def " in drawn(run_dir).read_text()
