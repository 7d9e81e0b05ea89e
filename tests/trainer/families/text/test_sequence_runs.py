"""Runs of networks on sequences: in one process or two the same, and through a kill -9 bit for bit."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import kill_at_step, trained
from plugin_runs import drawn, numbers, state
from support import train_in_process
from teams import in_team

from configs import from_dict, load
from configs.load import presets
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

SLOW = pytest.mark.slow
STEPS = 6
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"family": "recurrent", "hidden_size": 16, "tie_embeddings": True, "dropout": 0.1, "detach_every": 10},
    "gru": {"family": "recurrent", "hidden_size": 16, "cell": "gru", "num_layers": 1},
    **{
        name: {"family": "encoder_decoder", "network": name, "hidden_size": 16, "num_layers": 1, "dropout": 0.1}
        for name in ("transformer", "bahdanau", "luong")
    },
}
DATES = {"path": "bundled:dates", "prepare": {"tokenizer": "bytes"}}


def make(name: str, root: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """A run of six steps of four micro-batches, with SGD, which hides no scale of a gradient."""
    tree: dict[str, Any] = {
        "run": {"name": name, "root": str(root)},
        "model": MODELS[name],
        "data": {"path": str(data)} if MODELS[name]["family"] == "recurrent" else DATES,
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "seq_len": 24, "precision": "fp32",
                  "eval_sequences": 5, "sample_tokens": 4, "grad_clip": 0},
        "optim": {"name": "sgd", "lr": 0.05 if name == "transformer" else 0.5},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }  # fmt: skip
    tree |= {key: tree.get(key, {}) | keys for key, keys in sections.items()}
    return prepare_run(from_dict(tree))


class Clean(dict[str, Path]):
    """Runs that were never stopped, in one process, each made when it is first asked for."""

    def __init__(self, root: Path, data: Path) -> None:
        self._where = root, data

    def __missing__(self, name: str) -> Path:
        self[name] = make(name, *self._where)
        assert train_in_process(self[name]) == 0
        return self[name]


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"), tiny_data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "transformer", *(pytest.param(n, marks=SLOW) for n in ("gru", "luong"))])
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, tiny_data, clean, name):
    run_dir = make(name, tmp_path, tiny_data, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean[name])
    assert numbers(run_dir) == numbers(clean[name])


TOPOLOGIES = [("transformer", 1), *(pytest.param(*case, marks=SLOW) for case in [
    ("lstm", 0), ("lstm", 1), ("lstm", 2), ("lstm", 3), ("gru", 1), ("transformer", 0), ("transformer", 2),
    ("transformer", 3), ("bahdanau", 1), ("bahdanau", 3), ("luong", 1),
])]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), TOPOLOGIES)
def test_two_processes_learn_what_one_does(tmp_path, tiny_data, clean, name, zero):
    run_dir = make(name, tmp_path, tiny_data, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean[name])
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5)
    before, after = (Reader(folder(where, STEPS)) for where in (clean[name], run_dir))
    for weight in before.manifest.shapes["weight"]:
        assert torch.allclose(after.weight(weight), before.weight(weight), rtol=1e-5, atol=1e-6), weight
    assert drawn(run_dir).read_text() == drawn(clean[name]).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_it_learns(clean, name):
    losses = [entry["loss"] for entry in read_metrics(clean[name]) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


@SLOW
@pytest.mark.parametrize(("name", "margin"), [("lstm", 0.15), ("seq2seq", 0.03)])
def test_a_preset_reaches_what_it_states(tmp_path, name, margin):
    config = load(name, [f"run.root={tmp_path}", "tracking.enabled=false"])
    assert in_team(1, trained, prepare_run(config), timeout_s=600) == ["FINISHED"]
    metric, value, *_ = next(each.held_out for each in presets() if each.name == name).split()
    *_, last = [m for m in read_metrics(tmp_path / name) if "eval_loss" in m]
    assert last[f"eval_{metric}"] == pytest.approx(float(value), abs=margin)


@SLOW
@pytest.mark.parametrize("zero", [0, 1])
def test_bf16_learns_nearly_what_fp32_does(tmp_path, tiny_data, clean, zero):
    run_dir = make("lstm", tmp_path, tiny_data, train={"precision": "bf16"}, parallel={"zero_stage": zero})
    assert train_in_process(run_dir) == 0
    found, expected = ([m["loss"] for m in read_metrics(where) if "loss" in m] for where in (run_dir, clean["lstm"]))
    assert found == pytest.approx(expected, rel=0.03)
    assert found != expected


def test_the_commands_know_it(muster, clean):
    """Evaluation and text, as of a decoder."""
    run_dir = clean["lstm"]
    code, out, _ = muster("eval", str(run_dir), "--sequences", "5")
    last = [m for m in read_metrics(run_dir) if "eval_loss" in m][-1]
    assert code == 0
    assert out.startswith(f"held-out loss {last['eval_loss']:.4f} nats per token over {last['eval_tokens']:,} tokens")
    code, out, _ = muster("generate", str(run_dir), "--prompt", "def", "--max-tokens", "3")
    assert (code, out[:3]) == (0, "def")
    code, out, _ = muster("eval", str(clean["transformer"]), "--sequences", "5")
    last = [m for m in read_metrics(clean["transformer"]) if "eval_loss" in m][-1]
    assert code == 0
    assert out.startswith(f"held-out loss {last['eval_loss']:.4f} over {last['eval_tokens']:,} tokens, accuracy ")
    assert f"bleu {last['eval_bleu']:.4f}, chrf {last['eval_chrf']:.4f}" in out
    code, _, err = muster("train", "lstm", "parallel.tp=2", f"run.root={run_dir.parent}")
    assert code == 2
    assert "parallel.tp" in err
