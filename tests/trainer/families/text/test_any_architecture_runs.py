"""Runs of networks of transformers: in two processes, through a kill, from a folder and into one."""

import signal
from pathlib import Path

import pytest
import torch
import transformers
from faults import kill_at_step, trained
from plugin_runs import numbers, state, tree
from support import train_in_process
from teams import in_team

from configs import from_dict, load
from configs.load import presets
from trainer.checkpoint.export import export, load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics
from trainer.run.counted import counts
from trainer.run.folder import prepare_run, read_config

SLOW = pytest.mark.slow
MODELS = {
    "resnet": {
        "architecture": "ResNetForImageClassification", "outputs": 3, "channels": 1,
        "config": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    },
    "mixtral": {
        "architecture": "MixtralForCausalLM",
        "config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 32, "num_local_experts": 4,
        },
    },
    "bert": {
        "architecture": "BertForMaskedLM",
        "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "mamba": {"architecture": "Mamba2ForCausalLM", "config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1,
        "chunk_size": 16,
    }},
}  # fmt: skip


@pytest.fixture(scope="module")
def make(images, tiny_data):
    def made(name: str, root: Path, **sections) -> Path:
        asked = tree("small_convnet", root, images, **sections)
        asked |= {"plugins": [], "run": {"name": name, "root": str(root)}}
        asked["model"] = {"family": "transformers"} | MODELS[name] | sections.get("model", {})
        if name != "resnet":
            asked["data"] = {"path": str(tiny_data), "document_mask": name != "mamba"}
            asked["train"] = {**asked["train"], "seq_len": 32, "sample_tokens": 4, "sample_prompts": ["def", "x"]}
        return prepare_run(from_dict(asked))

    return made


@pytest.fixture(scope="module")
def clean(make, tmp_path_factory):
    """A run of each, never stopped, in one process; made when it is asked for."""
    root, runs = tmp_path_factory.mktemp("clean"), {}

    def run(name: str) -> Path:
        if name not in runs:
            runs[name] = make(name, root)
            assert train_in_process(runs[name]) == 0
        return runs[name]

    return run


ALL = ["resnet", *(pytest.param(name, marks=SLOW) for name in ("mixtral", "mamba", "bert"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, make, clean, name):
    run_dir = make(name, tmp_path, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean(name))
    assert numbers(run_dir) == numbers(clean(name))


ZERO = [
    ("resnet", 0), ("resnet", 1), ("resnet", 2), ("resnet", 3), ("mixtral", 0), ("mixtral", 1), ("mixtral", 2),
    ("mixtral", 3), ("mamba", 1), ("mamba", 3), ("bert", 1), ("bert", 3),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), ZERO)
def test_two_processes_measure_what_one_does(tmp_path, make, clean, name, zero):
    run_dir = make(name, tmp_path, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean(name))
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5, abs=1e-9)
    before, after = (Reader(folder(where, 1)) for where in (clean(name), run_dir))
    for key in before.manifest.shapes["weight"]:
        assert torch.allclose(after.weight(key), before.weight(key), atol=1e-5)
    assert bool(before.manifest.state.memory) == (name == "resnet")


@SLOW
@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_exported_and_begun_from_its_export(tmp_path, make, clean, name):
    export(clean(name), tmp_path / "out")
    module, config, _ = load_module(clean(name), reads=None)
    ids = torch.arange(16)[None] if name != "resnet" else torch.linspace(-1, 1, 144).view(1, 1, 12, 12)
    auto = {"resnet": transformers.AutoModelForImageClassification, "bert": transformers.AutoModelForMaskedLM}
    other = auto.get(name, transformers.AutoModelForCausalLM).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(other(ids).logits, module.network(ids).logits)
    if name != "resnet":
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer.eos_token_id == other.config.eos_token_id
    start = {"train": {"init_from": str(tmp_path / "out"), "steps": 1}, "optim": {"lr": 1e-12}}
    run_dir = make(name, tmp_path, **start, model={"vocab_size": config.model.vocab_size} if name != "resnet" else {})
    assert [e for e in read_events(run_dir) if e["event"] == "init_from"] == []
    assert train_in_process(run_dir) == 0
    last, first = Reader(folder(clean(name), 6)), Reader(folder(run_dir, 1))
    assert all(torch.allclose(first.weight(n), last.weight(n), atol=1e-9) for n in last.manifest.shapes["weight"])
    if name == "resnet":
        key = "network.resnet.embedder.embedder.normalization.running_mean"
        old, new = (torch.tensor(where.manifest.state.memory[key]) for where in (last, first))
        assert 0 < (old - new).abs().max() < 0.2 * old.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_its_flops_are_counted_and_recorded(clean, name):
    config = read_config(clean(name))
    found = counts(config)
    assert found.get("flops_unknown") is None
    # At least its matrix products: 2 FLOPs a weight, three passes, but for experts that are not chosen.
    matrices = found["parameters"] if name == "resnet" else found["parameters"] / 4 * config.train.seq_len
    assert found["flops_per_example"] > 3 * 2 * matrices / 2
    steps = [m for m in read_metrics(clean(name)) if "loss" in m]
    per_step = found["flops_per_example"] * config.train.global_batch / 1e12
    assert all(m["tflops"] == pytest.approx(per_step / m["step_time"]) for m in steps)


@SLOW
def test_the_preset_on_text_reaches_what_it_states(tmp_path):
    run_dir = prepare_run(load("hf-mamba", [f"run.root={tmp_path}", "tracking.enabled=false"]))
    assert in_team(1, trained, run_dir, timeout_s=900) == ["FINISHED"]
    *_, last = [m["eval_loss"] for m in read_metrics(run_dir) if "eval_loss" in m]
    [stated] = [preset.held_out for preset in presets() if preset.name == "hf-mamba"]
    assert last == pytest.approx(float(stated.split()[1]), abs=0.1)  # other Pythons have other libraries
