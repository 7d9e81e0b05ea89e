"""Neural ODEs trained in one process, in two, and through a kill: the same numbers, and as many evaluations."""

import signal
from pathlib import Path

import pytest
from faults import kill_at_step, trained
from plugin_runs import assert_same_weights, numbers, state
from support import train_in_process
from teams import in_team

from configs import load
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

SLOW = pytest.mark.slow
STEPS = 6
MODELS = {
    "direct": "{family: neural_ode, inputs: 13, outputs: 3, width: 16, hidden: 32}",
    "adjoint": "{family: neural_ode, inputs: 13, outputs: 3, width: 16, hidden: 32, adjoint: true}",
}


def make(name: str, root: Path, *overrides: str) -> Path:
    """Six steps of four micro-batches of wines."""
    keys = [
        f"run.name={name}", f"run.root={root}", f"model={MODELS[name]}", f"train.steps={STEPS}", "train.micro_batch=8",
        "train.eval_every=3", "checkpoint.every=1", "optim.name=sgd", "optim.lr=0.1", "tracking.enabled=false",
    ]  # fmt: skip
    return prepare_run(load("wine", [*keys, *overrides]))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, Path]:
    runs = {name: make(name, tmp_path_factory.mktemp("clean")) for name in MODELS}
    for run_dir in runs.values():
        assert train_in_process(run_dir) == 0
    return runs


def evaluations(run_dir: Path) -> list[tuple[int, str, float]]:
    return [(m["step"], key, m[key]) for m in read_metrics(run_dir) for key in m if key.endswith("evaluations")]


@pytest.mark.slow
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, clean):
    run_dir = make("adjoint", tmp_path, "checkpoint.background=false")
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean["adjoint"])
    assert numbers(run_dir) == numbers(clean["adjoint"])


ZERO = [(name, zero) for name in ("direct", "adjoint") for zero in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), ZERO)
def test_two_processes_measure_what_one_does(tmp_path, clean, name, zero):
    run_dir = make(name, tmp_path, "parallel.dp=2", f"parallel.zero_stage={zero}")
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean[name])
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5, abs=1e-6)
    assert evaluations(run_dir) == evaluations(clean[name])
    assert_same_weights(run_dir, clean[name])


@SLOW
def test_with_fixed_steps_two_processes_train_at_zero_3(tmp_path):
    """With weights that are large enough to be gathered for each evaluation."""
    keys = ["model.solver=rk4", "model.width=320", "model.hidden=320"]
    one = make("direct", tmp_path / "one", *keys)
    assert train_in_process(one) == 0
    two = make("direct", tmp_path / "two", "parallel.dp=2", "parallel.zero_stage=3", *keys)
    assert in_team(2, trained, two) == ["FINISHED", "FINISHED"]
    assert [entry[2] for entry in numbers(two)] == pytest.approx(
        [entry[2] for entry in numbers(one)], rel=1e-5, abs=1e-6
    )
    assert_same_weights(two, one)


@pytest.mark.slow
def test_evaluations_and_unknown_flops_are_recorded(clean):
    found = evaluations(clean["direct"])
    assert {key for _, key, _ in found} == {"evaluations", "eval_evaluations"}
    assert all(value >= 8 for _, _, value in found)
    [event] = [event for event in read_events(clean["direct"]) if event["event"] == "flops_unknown"]
    assert event["reason"].startswith("model.solver=dopri5 chooses its steps")


@SLOW
@pytest.mark.parametrize("name", MODELS)
def test_bf16_measures_nearly_what_fp32_does(tmp_path, clean, name):
    run_dir = make(name, tmp_path, "train.precision=bf16")
    assert train_in_process(run_dir) == 0
    losses = [[m["loss"] for m in read_metrics(where) if "loss" in m] for where in (run_dir, clean[name])]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0] != losses[1]
