"""Runs of networks on sequences: in one process or two the same, and through a kill -9 bit for bit."""

import pytest
from faults import trained
from support import train_in_process
from teams import in_team
from text_runs import Clean, assert_same_after_a_kill, assert_two_processes_learn_the_same, make

from configs import load
from configs.load import presets
from trainer.record.lines import read_metrics
from trainer.run.folder import prepare_run

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def clean(tmp_path_factory, tiny_data) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"), tiny_data)


@SLOW
@pytest.mark.parametrize("name", ["lstm", "transformer", "gru", "luong"])
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean, name):
    assert_same_after_a_kill(name, tmp_path, clean)


TOPOLOGIES = [
    ("lstm", 0), ("lstm", 1), ("lstm", 2), ("lstm", 3), ("gru", 1), ("transformer", 0), ("transformer", 1),
    ("transformer", 2), ("transformer", 3), ("bahdanau", 1), ("bahdanau", 3), ("luong", 1),
]  # fmt: skip


@SLOW
@pytest.mark.parametrize(("name", "zero"), TOPOLOGIES)
def test_two_processes_learn_what_one_does(tmp_path, clean, name, zero):
    assert_two_processes_learn_the_same(name, zero, tmp_path, clean)


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
