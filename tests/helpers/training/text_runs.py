"""Short runs of networks that read text, and the proofs that hold for each of them."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import kill_at_step, trained
from plugin_runs import drawn, numbers, state
from support import train_in_process
from teams import in_team

from configs import from_dict
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run

STEPS = 6
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ON_TOKENS: dict[str, dict[str, Any]] = {
    "lstm": {"family": "recurrent", "hidden_size": 16, "tie_embeddings": True, "dropout": 0.1, "detach_every": 10},
    "gru": {"family": "recurrent", "hidden_size": 16, "cell": "gru", "num_layers": 1},
    "masked": {"family": "recurrent", "bidirectional": True, "hidden_size": 16, "dropout": 0.1},
}
ON_PAIRS: dict[str, dict[str, Any]] = {
    **{
        name: {"family": "encoder_decoder", "network": name, "hidden_size": 16, "num_layers": 1, "dropout": 0.1}
        for name in ("transformer", "bahdanau", "luong")
    },
    "t5": {
        "family": "transformers", "architecture": "T5ForConditionalGeneration",
        "config": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    },
}  # fmt: skip
ON_TEXTS: dict[str, dict[str, Any]] = {
    "encoder": {"family": "encoder", "outputs": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "recurrent": {"family": "recurrent", "outputs": 8, "hidden_size": 16, "bidirectional": True, "dropout": 0.1},
    "bert": {
        "family": "transformers", "architecture": "BertForSequenceClassification", "outputs": 8, "config": SIZES,
    },
}  # fmt: skip
MODELS = ON_TOKENS | ON_PAIRS | ON_TEXTS


def make(name: str, root: Path, tokens: Path, **sections: dict[str, Any]) -> Path:
    """A run of six steps of four micro-batches, with SGD, which hides no scale of a gradient."""
    data: dict[str, Any] = {"path": str(tokens)}
    if name not in ON_TOKENS:
        data = {"path": "bundled:dates" if name in ON_PAIRS else "bundled:packages", "prepare": {"tokenizer": "bytes"}}
    tree: dict[str, Any] = {
        "run": {"name": name, "root": str(root)},
        "model": MODELS[name],
        "data": data,
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "seq_len": 24, "precision": "fp32",
                  "eval_sequences": 5, "sample_tokens": 4, "grad_clip": 0},
        "optim": {"name": "sgd", "lr": 0.05 if name in ("transformer", "t5") else 0.5},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }  # fmt: skip
    tree |= {key: tree.get(key, {}) | keys for key, keys in sections.items()}
    return prepare_run(from_dict(tree))


class Clean(dict[str, Path]):
    """Runs that were never stopped, in one process, each made when it is first asked for."""

    def __init__(self, root: Path, tokens: Path) -> None:
        self.root, self.tokens = root, tokens

    def __missing__(self, name: str) -> Path:
        self[name] = make(name, self.root, self.tokens)
        assert train_in_process(self[name]) == 0
        return self[name]


def assert_same_after_a_kill(name: str, root: Path, clean: Clean) -> None:
    """A run that was killed ends bit for bit as a clean one."""
    run_dir = make(name, root, clean.tokens, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean[name])
    assert numbers(run_dir) == numbers(clean[name])


def assert_two_processes_learn_the_same(name: str, zero: int, root: Path, clean: Clean) -> None:
    """What one does, but for rounding."""
    run_dir = make(name, root, clean.tokens, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean[name])
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5)
    before, after = (Reader(folder(where, STEPS)) for where in (clean[name], run_dir))
    for weight in before.manifest.shapes["weight"]:
        assert torch.allclose(after.weight(weight), before.weight(weight), rtol=1e-5, atol=1e-6), weight
    if name not in ON_TEXTS:  # those show probabilities, which round otherwise
        assert drawn(run_dir).read_text() == drawn(clean[name]).read_text()
