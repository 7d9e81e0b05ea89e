"""A run with two checkpoints, and an engine that resumes what the tests make of it."""

import shutil

import pytest
from damaged_checkpoints import MODEL
from engines import EngineRun
from support import resolved

from configs import to_yaml
from models.tasks.language_modelling import BIAS, LOAD
from trainer.checkpoint import manifest, store
from trainer.checkpoint.resume import resume
from trainer.checkpoint.save import take_snapshot
from trainer.engine.start import start_processes
from trainer.record.lines import Record
from trainer.state import TrainState


@pytest.fixture(scope="package")
def config(tmp_path_factory, tiny_data):
    return resolved(
        run={"name": "run", "root": str(tmp_path_factory.mktemp("runs"))}, data={"path": str(tiny_data)},
        model=MODEL, train={"micro_batch": 4, "precision": "fp32"},
    )  # fmt: skip


@pytest.fixture(scope="package")
def engine(config):
    start_processes(60)
    return EngineRun(config)


@pytest.fixture(scope="package")
def original(config, engine, tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("original") / "run"
    rows = [[0.0, 0.0]]
    for step in (1, 2):
        engine.steps(step, step)
        path = manifest.folder(run_dir, step)
        store.write_shard(path, 0, "t", take_snapshot(engine.engine))
        state = TrainState(step, 4 * step, 128 * step, recent_losses=[5.0] * step, memory={BIAS: rows, LOAD: rows})
        store.commit(path, 1, "t", state, config.model_dump(mode="json"), 5)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return run_dir


@pytest.fixture
def run_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def resumed(engine, config):
    """Resume a run: the step that it goes on from."""

    def run(run_dir) -> int:
        state, record = TrainState(), Record(run_dir, 1)
        try:
            resume(run_dir, [engine.engine], state, engine.trainee.learner, record)
        finally:
            record.close()
        return state.step

    return run
