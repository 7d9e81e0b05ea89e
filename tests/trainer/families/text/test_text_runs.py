"""Runs that tell what a text is, or read in both directions, or are of transformers' sequence-to-sequence classes: in
one process or two the same, and through a kill -9 bit for bit."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from faults import kill_at_step, trained
from plugin_runs import drawn, numbers, state
from support import train_in_process
from teams import in_team

from configs import from_dict
from trainer.checkpoint.export import export, load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

SLOW = pytest.mark.slow
STEPS = 6
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "encoder": {"family": "encoder", "outputs": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "recurrent": {"family": "recurrent", "outputs": 8, "hidden_size": 16, "bidirectional": True, "dropout": 0.1},
    "bert": {
        "family": "transformers", "architecture": "BertForSequenceClassification", "outputs": 8, "config": SIZES,
    },
    "masked": {"family": "recurrent", "bidirectional": True, "hidden_size": 16, "dropout": 0.1},
    "t5": {
        "family": "transformers", "architecture": "T5ForConditionalGeneration",
        "config": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    },
}  # fmt: skip
DATA = {"t5": "bundled:dates", "masked": ""}


def make(name: str, root: Path, tokens: Path, **sections: dict[str, Any]) -> Path:
    """A run of six steps of four micro-batches, with SGD, which hides no scale of a gradient."""
    path = DATA.get(name, "bundled:packages")
    tree: dict[str, Any] = {
        "run": {"name": name, "root": str(root)},
        "model": MODELS[name],
        "data": {"path": path, "prepare": {"tokenizer": "bytes"}} if path else {"path": str(tokens)},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "seq_len": 24, "precision": "fp32",
                  "eval_sequences": 5, "sample_tokens": 4, "grad_clip": 0},
        "optim": {"name": "sgd", "lr": 0.05 if name == "t5" else 0.5},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }  # fmt: skip
    tree |= {key: tree.get(key, {}) | keys for key, keys in sections.items()}
    return prepare_run(from_dict(tree))


class Clean(dict[str, Path]):
    """Runs that were never stopped, in one process, each made when it is first asked for."""

    def __init__(self, root: Path, tokens: Path) -> None:
        self._where = root, tokens

    def __missing__(self, name: str) -> Path:
        self[name] = make(name, *self._where)
        assert train_in_process(self[name]) == 0
        return self[name]


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"), tiny_data)


@SLOW
@pytest.mark.parametrize("name", MODELS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, tiny_data, clean, name):
    run_dir = make(name, tmp_path, tiny_data, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean[name])
    assert numbers(run_dir) == numbers(clean[name])


@SLOW
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_learn_what_one_does(tmp_path, tiny_data, clean, name, zero):
    run_dir = make(name, tmp_path, tiny_data, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean[name])
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5)
    before, after = (Reader(folder(where, STEPS)) for where in (clean[name], run_dir))
    for weight in before.manifest.shapes["weight"]:
        assert torch.allclose(after.weight(weight), before.weight(weight), rtol=1e-5, atol=1e-6), weight
    if name in DATA:  # others show probabilities, which round otherwise
        assert drawn(run_dir).read_text() == drawn(clean[name]).read_text()


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
