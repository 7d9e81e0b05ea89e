"""`muster plan`: its numbers as JSON, its tables, its refusals."""

import json
import subprocess
import sys

import pytest

from cluster.cli import main
from configs.sections.pairs import FAMILY_ENDS


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["muster", "plan", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr()
    return end.value.code or 0, out.out, out.err


def test_numbers(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "moe-8x7b", "--gpus", "64", "--usd-per-gpu-hour", "2", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["devices"] == 64
    assert plan["device"] == "h100"
    assert plan["fits"] is True
    assert plan["memory"]["peak"] == max(plan["memory"]["moments"].values())
    assert plan["usd"] == pytest.approx(2 * plan["device_hours"])
    assert plan["tokens_per_day"] == pytest.approx(86400 * plan["tokens_per_step"] / plan["step_time"])


def test_table(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "quickstart", "--gpu", "cpu")
    assert code == 0
    for word in ("quickstart on 1 x cpu", "weights", "activations", "peak", "MFU", "tokens/day"):
        assert word in out
    _, out, _ = run(capsys, monkeypatch, "moe-8x7b", "--gpus", "8")
    assert "does not fit" in out


def test_a_model_without_formulas_whose_weights_alone_do_not_fit(capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "digits-gan")
    assert "does not fit" not in out
    _, out, _ = run(capsys, monkeypatch, "digits-gan", "model.latents=1000000", "model.generator=[1000000,1000000]")
    assert "does not fit: its weights alone are 96 TB per device (h100: 80 GB)\n" in out


def test_a_given_dp_that_gpus_replaces_is_told(capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "quickstart", "parallel.dp=2", "--gpus", "4")
    assert "parallel.dp=4: follows from --gpus 4, not the config's 2\n" in out
    assert "follows" not in run(capsys, monkeypatch, "quickstart", "parallel.dp=4", "--gpus", "4")[1]
    assert "follows" not in run(capsys, monkeypatch, "quickstart", "--gpus", "4")[1]


def test_search(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "moe-1b-a300m", "--gpus", "4", "--search")
    assert code == 0
    assert "topologies fit, the fastest first" in out
    assert "The fastest: parallel.dp=" in out
    assert "Cannot run" in out
    code, out, _ = run(capsys, monkeypatch, "moe-8x7b", "--gpus", "2", "--gpu", "a100", "--search", "--json")
    found = json.loads(out)
    assert found["choices"] == []
    assert found["least_memory_of_too_large"] > 80e9


REFUSED = {
    "device": (["quickstart", "--gpu", "h300"], "--gpu h300: should be one of h100, h200, a100, b200, cpu"),
    "no devices": (["quickstart", "--gpus", "0"], "--gpus 0: should be 1 to 1,048,576"),
    "price": (["quickstart", "--usd-per-gpu-hour", "-1"], "should be a price, 0 to 1,000,000"),
    "does not divide": (["dense-7b", "parallel.tp=4", "--gpus", "6"], "--gpus 6 is not a multiple of parallel.tp"),
    "batch": (["moe-8x7b", "--gpus", "2048"], "is over train.global_batch (1024)"),
    "key": (["quickstart", "model.layers=3"], "did you mean model.num_layers?"),
    "topology": (["quickstart", "parallel.tp=3"], "tp splits attention by heads"),
    "preset": (["quikstart"], "quickstart"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(capsys, monkeypatch, arguments, message):
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in err
    assert not out


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from cluster.cli import main; main()"
KNOWN = ", ".join(sorted(FAMILY_ENDS))
NAMES = {
    "model.family=llama": f"model.family=llama: no such family; known: {KNOWN} (a plugin may add one)",
    "model.family=decodr": "model.family=decodr: no such family; did you mean decoder?",
    "task=clasification": "task=clasification: no such task; did you mean classification?",
}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("command", "given"),
    [*(("plan", each) for each in NAMES), *((each, next(iter(NAMES))) for each in ("config", "train"))],
)
def test_a_family_or_task_that_nothing_brings_is_refused_without_torch(tmp_path, command, given):
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, command, "quickstart", given, f"run.root={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr, ended.stdout) == (2, f"muster: {NAMES[given]}\n", "")


def test_what_automatic_checkpoints_expect(capsys, monkeypatch):
    """Llama 3's 419 interruptions in 54 days are one in 3.09 hours of 16,384 devices."""
    _, out, _ = run(capsys, monkeypatch, "moe-8x7b", "checkpoint.every=auto", "train.global_batch=16384",
                    "--gpus", "16384")  # fmt: skip
    assert "checkpoint.every=auto: at Llama 3's failure rate, one of 16,384 devices fails every 3 h 6 min" in out
    assert "checkpoint.every" not in run(capsys, monkeypatch, "moe-8x7b")[1]
