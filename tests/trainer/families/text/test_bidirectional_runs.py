"""Runs of the encoder on text and of the vision Transformer on digits: any topology, any number of lives."""

import json
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from faults import kill_at_step, trained
from plugin_runs import drawn, state
from support import train_in_process
from teams import in_team

from configs import ConfigError, from_dict, load
from configs.load import presets
from models.batch import Batch
from trainer.checkpoint.export import load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run, read_config

STEPS = 6
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "dropout": 0.1}
MODELS = {
    "encoder": {"positions": "rotary"},
    "vit": {"image_size": 8, "patch_size": 2, "channels": 1},
    "mae": {"image_size": 8, "patch_size": 2, "channels": 1, "decoder_size": 16},
}


def make(family: str, root: Path, text: Path, **sections) -> Path:
    """Six steps of four micro-batches."""
    data = {"path": str(text)} if family == "encoder" else {"path": "bundled:digits", "images": {"channels": 1}}
    tree = {
        "run": {"name": family, "root": str(root)},
        "model": {"family": family, **SIZES, **MODELS[family]},
        "data": data,
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "seq_len": 48, "precision": "fp32",
                  "eval_sequences": 5},
        "optim": {"lr": 0.01},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }  # fmt: skip
    return prepare_run(from_dict({name: tree.get(name, {}) | sections.get(name, {}) for name in tree | sections}))


def numbers(run_dir: Path) -> dict[tuple[int, str], float]:
    """Every measured value of a run, as last measured."""
    keys = ("loss", "grad_norm", "accuracy", "perplexity", "eval_loss", "eval_accuracy", "eval_perplexity")
    return {(m["step"], key): m[key] for m in read_metrics(run_dir) for key in keys if key in m}


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data) -> Callable[[str], Path]:
    """A family's run that was never stopped, in one process."""

    @cache
    def run(family: str) -> Path:
        run_dir = make(family, tmp_path_factory.mktemp("clean"), tiny_data)
        assert train_in_process(run_dir) == 0
        return run_dir

    return run


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("family", MODELS)
def test_two_processes_measure_what_one_does(tmp_path, tiny_data, clean, family, zero):
    run_dir = make(family, tmp_path, tiny_data, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    assert len(numbers(run_dir)) > 2 * STEPS
    assert numbers(run_dir) == pytest.approx(numbers(clean(family)), rel=1e-5, abs=1e-5)
    mine, one = (Reader(folder(where, 2)) for where in (run_dir, clean(family)))
    for name in one.manifest.shapes["weight"]:
        # A softmax does not depend on the keys' bias: its gradient is rounding error, which AdamW scales up.
        if not name.endswith("k_proj.bias"):
            assert torch.allclose(mine.weight(name), one.weight(name), atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, tiny_data, clean, family):
    run_dir = make(family, tmp_path, tiny_data, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean(family))
    assert numbers(run_dir) == numbers(clean(family))


def test_a_masked_model_is_measured_evaluated_and_shown(clean, muster):
    run_dir, config = clean("encoder"), read_config(clean("encoder"))
    assert config.model.vocab_size == 320  # 257 bytes and the mask
    *_, step, evaluation = read_metrics(run_dir)
    # At most 7 of 48 tokens in each of 64 sequences; documents end within some of them.
    assert 60 * 7 * STEPS / 4 < step["masked_tokens"] <= 16 * 7 * STEPS
    assert 5 * 6 <= evaluation["eval_masked_tokens"] <= 5 * 7
    code, out, _ = muster("eval", str(run_dir), "--sequences", "5", "--json")
    told = json.loads(out)
    assert (code, told["unit"]) == (0, "masked_tokens")
    assert (told["loss"], told["weight"]) == (
        pytest.approx(evaluation["eval_loss"], rel=1e-5), evaluation["eval_masked_tokens"],
    )  # fmt: skip
    text = drawn(run_dir).read_text()
    assert len(re.findall(r"\[[^\]]*\|[^\]]*\]", text)) > 10
    assert text.count("-" * 80) == 3


def test_a_plan_counts_what_the_run_does(clean, tiny_data, muster, tmp_path):
    keys = [f"data.path={tiny_data}", f"run.root={tmp_path}"]
    code, out, _ = muster("plan", "mlm", *keys, "--json")
    assert code == 0
    # Of 64 places 10 reach the head: 3 layers of 4 + 8 matrices of 128 x 128, and attention over 64 keys.
    layers, head = 3 * (12 * 128**2 + 2 * 64 * 128), 128**2 + 128 * 320
    assert json.loads(out)["flops_per_example"] == 6 * (64 * layers + 10 * head)
    code, out, _ = muster("plan", "mlm", f"run.root={tmp_path}", "--json")
    assert (code, "once data.path=stdlib is prepared" in json.loads(out)["flops_unknown"]) == (0, True)


def test_an_exported_encoder_fills_in_masks_as_transformers_does(tmp_path, tiny_data, muster):
    keys = {"positions": "learned", "pre_norm": False}
    run_dir = make("encoder", tmp_path, tiny_data, model=keys, train={"steps": 1}, checkpoint={"every": 1})
    assert train_in_process(run_dir) == 0
    assert muster("export", str(run_dir), "--out", str(tmp_path / "bert"))[0] == 0
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    module, _, _ = load_module(run_dir, reads=None)
    text = f"def f{tokenizer.mask_token}(x):"
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokens[0, 5] == tokenizer.mask_token_id == 257
    assert tokenizer.decode(tokens[0]) == text
    places = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        found = module(Batch(tokens, tokens, places, None, torch.zeros(1, dtype=torch.long)))
        assert torch.allclose(found, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_an_export_that_transformers_would_compute_otherwise_is_refused(clean, tmp_path, muster):
    code, _, err = muster("export", str(clean("encoder")), "--out", str(tmp_path / "out"))
    assert (code, "model.pre_norm=True: BertForMaskedLM has False" in err) == (2, True)


@pytest.mark.slow
def test_an_exported_vit_classifies_as_transformers_does(clean, tmp_path, muster):
    assert muster("export", str(clean("vit")), "--out", str(tmp_path / "vit"))[0] == 0
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "vit").eval()
    module, _, _ = load_module(clean("vit"), reads=None)
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(module(images), theirs(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_preset_reaches_what_it_states(tmp_path):
    [stated] = [float(preset.held_out.removeprefix("accuracy ")) for preset in presets() if preset.name == "mlm"]
    run_dir = prepare_run(load("mlm", [f"run.root={tmp_path}", "tracking.enabled=false"]))
    assert in_team(1, trained, run_dir, timeout_s=900) == ["FINISHED"]
    *_, last = [m for m in read_metrics(run_dir) if "eval_loss" in m]
    # Another Python's standard library is another text.
    assert last["eval_accuracy"] == pytest.approx(stated, abs=0.04)


def test_vocabulary_and_images_that_do_not_fit_are_refused_by_name(tmp_path, tiny_data):
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size is 257 but the tokenizer .* 258 tokens: set model\.vocab_size=320"
    ):
        make("encoder", tmp_path, tiny_data, model={"vocab_size": 257})
    with pytest.raises(ConfigError, match=r"train\.seq_len \(48\) is longer than model\.max_positions \(32\)"):
        make("encoder", tmp_path, tiny_data, model={"max_positions": 32})
    with pytest.raises(
        ConfigError, match=r"model\.image_size is 12, but data\.path=.* has images of 8 x 8: set data\.images\."
    ):
        make("vit", tmp_path, tiny_data, model={"image_size": 12})
