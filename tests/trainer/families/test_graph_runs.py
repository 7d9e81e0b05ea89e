"""Graph networks trained in one process, in two, and through a kill: the same numbers."""

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import kill_at_step, trained
from plugin_runs import STEPS, assert_same_weights, drawn, numbers, state
from support import train_in_process
from syncs import watch_syncs
from teams import in_team

from configs import from_dict
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

SLOW = pytest.mark.slow
MODELS = {
    "classification": {"layer": "gin", "edge_inputs": 1, "edge_categories": 9, "dropout": 0.2, "outputs": 3},
    "regression": {"layer": "transformer", "readout": "sum", "norm": "layer", "outputs": 1},
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Path:
    """60 graphs, labelled by how many nodes send an edge to node 0."""
    draw, rows = np.random.default_rng(0), []
    for _ in range(60):
        size = int(draw.integers(3, 8))
        edges = np.argwhere(draw.random((size, size)) < 0.4)
        kinds, nodes = edges.sum(1)[:, None] % 9, draw.normal(size=(size, 2))
        label = min(int((edges[:, 1] == 0).sum()), 2)
        rows.append({"edge_index": edges.T.tolist(), "node_feat": nodes.tolist(), "edge_attr": kinds.tolist()})
        rows[-1] |= {"y": [label], "num_nodes": size}
    path = tmp_path_factory.mktemp("graphs") / "graphs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make(task: str, root: Path, graphs: Path, **sections: dict) -> Path:
    """Six steps of four micro-batches."""
    train = {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "precision": "fp32", "eval_sequences": 5}
    tree = {
        "run": {"name": task, "root": str(root)},
        "model": {"family": "gnn", "inputs": 2, "width": 8, "heads": 2} | MODELS[task],
        "task": task,
        "data": {"path": str(graphs), "prepare": {"held_out": 0.1}},
        "train": train,
        "optim": {"name": "sgd", "lr": 0.05},  # a bias before BatchNorm has no gradient but noise, which Adam scales up
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    return prepare_run(from_dict(tree | {name: tree.get(name, {}) | keys for name, keys in sections.items()}))


@pytest.fixture(scope="module")
def clean(tmp_path_factory, graphs) -> dict[str, Path]:
    runs = {task: make(task, tmp_path_factory.mktemp("clean"), graphs) for task in MODELS}
    for run_dir in runs.values():
        assert train_in_process(run_dir) == 0
    return runs


@pytest.mark.slow
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, graphs, clean):
    run_dir = make("classification", tmp_path, graphs, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean["classification"])
    assert numbers(run_dir) == numbers(clean["classification"])


ZERO = [
    ("classification", 0), ("classification", 1), ("classification", 2), ("classification", 3),
    ("regression", 1), ("regression", 3),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("task", "zero"), ZERO)
def test_two_processes_measure_what_one_does(tmp_path, graphs, clean, task, zero):
    run_dir = make(task, tmp_path, graphs, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean[task])
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5, abs=1e-6)
    assert_same_weights(run_dir, clean[task])


def test_what_a_run_records(clean):
    last = [m for m in read_metrics(clean["classification"]) if "eval_loss" in m][-1]
    assert {"eval_accuracy", "eval_macro_f1", "eval_graphs"} <= last.keys()
    assert last["eval_graphs"] == 5
    steps = [m for m in read_metrics(clean["classification"]) if "loss" in m]
    assert (steps[-1]["graphs"], len(steps)) == (16 * STEPS, STEPS)
    assert all(m["tflops"] > 0 for m in steps[1:])
    assert drawn(clean["classification"]).read_text().startswith("example,label,found,probability\n")
    assert drawn(clean["regression"]).read_text().startswith("example,label 0,found 0\n")


@SLOW
@pytest.mark.parametrize("task", MODELS)
def test_bf16_measures_nearly_what_fp32_does(tmp_path, graphs, clean, task):
    run_dir = make(task, tmp_path, graphs, train={"precision": "bf16"})
    assert train_in_process(run_dir) == 0
    losses = [[m["loss"] for m in read_metrics(where) if "loss" in m] for where in (run_dir, clean[task])]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


@SLOW
@pytest.mark.parametrize("task", MODELS)
def test_a_step_waits_for_nothing_but_the_one_before(tmp_path, graphs, task):
    """No layer asks how many nodes, edges or graphs there are."""
    run_dir = make(task, tmp_path, graphs, checkpoint={"every": 0})
    assert train_in_process(run_dir, watch_syncs, 3, 5, tmp_path / "syncs") == 0
    assert json.loads((tmp_path / "syncs").read_text()) == {"trainer/late.py tolist: tolist": 2}
