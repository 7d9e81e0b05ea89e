"""Every record gives its pictures, however odd or short."""

import math
import random

import pytest
from matplotlib.image import imread

from trainer import plots
from trainer.record import Record

NAMES = ["loss.png", "optimizer.png", "throughput.png", "expert_load.png"]


def write(run_dir, steps, attempt=1, moe=True, **values):
    record = Record(run_dir, attempt)
    data = {"kind": "training", "profile": {"splits": {"held_out": {"entropy": 3.1}}}}
    record.event("attempt_started", inputs=[data])
    for step in steps:
        load = [[random.random() for _ in range(4)] for _ in range(2)]
        record.metrics(
            {"step": step, "loss": 3.0 + 1 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 64 * step}
            | {"tokens_per_second": 100.0, "tflops": 0.1, "step_time": 0.5, "data_wait": 0.0}
            | ({"expert_load": load} if moe else {})
            | values
        )
        if step % 5 == 0:
            record.metrics({"step": step, "eval_loss": values.get("loss", 3.2)})
    return record


def check(run_dir, names):
    paths = plots.plot_run(run_dir)
    assert [path.relative_to(run_dir).as_posix() for path in paths] == [f"plots/{name}" for name in names]
    for path in paths:
        assert imread(path)[..., :3].std() > 0.02  # something is drawn


def test_moe_run_with_restart_rollback_and_skipped_step(tmp_path):
    write(tmp_path, range(1, 20))
    record = write(tmp_path, range(10, 30), attempt=2)
    record.event("rollback", step=29, to_step=20)
    record.metrics({"step": 21, "loss": math.nan, "skipped": True, "tokens": 999})
    check(tmp_path, NAMES)


def test_dense_run(tmp_path):
    write(tmp_path, range(1, 12), moe=False, mfu=0.4)
    check(tmp_path, NAMES[:3])


@pytest.mark.parametrize("values", [{}, {"loss": math.nan, "grad_norm": math.nan, "tokens": 0}, {"grad_norm": 0.0}])
def test_a_single_step_and_nothing_finite(tmp_path, values):
    write(tmp_path, [5], **values)
    check(tmp_path, NAMES)


def test_nothing_recorded_is_no_plots(tmp_path):
    assert plots.plot_run(tmp_path) == []


def test_a_long_run_is_thinned_to_its_first_and_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "POINTS", 10)
    monkeypatch.setattr(plots, "COLUMNS", 4)
    write(tmp_path, range(1, 50))
    check(tmp_path, NAMES)
    assert plots._spread(range(1, 50), 10)[::9] == [1, 49]
