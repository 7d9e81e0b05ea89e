"""Every record can be plotted, however odd or short."""

import math
import random

import pytest
from matplotlib.image import imread

from trainer.observe.plots import draw, experts, plot_run, run
from trainer.record.lines import Record

NAMES = ["loss.png", "optimizer.png", "throughput.png", "expert_load.png", "expert_map.png", "routers.png"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(draw.STYLE, "figure.dpi", 50)


def write(run_dir, steps, attempt=1, moe=True, routers=True, **values):
    record = Record(run_dir, attempt)
    data = {"kind": "training", "profile": {"splits": {"held_out": {"entropy": 3.1}}}}
    record.event("attempt_started", inputs=[data])
    for step in steps:
        load = [[random.random() for _ in range(4)] for _ in range(2)]
        load[1][2] = 0.0
        more = {"router_entropy": [0.9, 0.5], "router_confidence": [0.5, None], "dropped": [0.01, 0.2]}
        record.metrics(
            {"step": step, "loss": 3.0 + 1 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 64 * step}
            | {"tokens_per_second": 100.0, "tflops": 0.1, "step_time": 0.5, "data_wait": 0.0}
            | ({"expert_load": load} | (more if routers else {}) if moe else {})
            | values
        )
        if step % 5 == 0:
            record.metrics({"step": step, "eval_loss": values.get("loss", 3.2)})
    return record


def check(run_dir, names):
    paths = plot_run(run_dir)
    assert [path.relative_to(run_dir).as_posix() for path in paths] == [f"plots/{name}" for name in names]
    for path in paths:
        assert imread(path)[..., :3].std() > 0.02  # something is drawn


def test_moe_run_with_restart_rollback_skipped_step_and_collapse(tmp_path):
    write(tmp_path, range(1, 20), routers=False)  # recorded before there were values of routers
    record = write(tmp_path, range(10, 30), attempt=2)
    record.event("rollback", from_step=29, to_step=20)
    record.event("experts_collapsed", step=12, experts={"1": [2]}, collapsed=1)
    record.event("experts_recovered", step=18, experts={"1": [2]}, collapsed=0)
    record.metrics({"step": 21, "loss": math.nan, "skipped": True, "tokens": 999})
    check(tmp_path, NAMES)


def test_dense_run(tmp_path):
    write(tmp_path, range(1, 12), moe=False, mfu=0.4)
    check(tmp_path, NAMES[:3])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss": math.nan, "grad_norm": math.nan, "tokens": 0, "expert_load": [[math.nan] * 4] * 2},
        {"grad_norm": 0.0, "routers": False},
    ],
)
def test_a_single_step_and_nothing_finite(tmp_path, values):
    write(tmp_path, [5], **values)
    check(tmp_path, NAMES)


def test_a_task_that_counts_images_is_plotted_in_images():
    train = [{"step": step, "loss": 1.0, "images": 8 * step, "images_per_second": 2.0 * step} for step in (1, 2)]
    assert run._throughput(train).axes[0].get_ylabel() == "images / s"
    assert run._throughput(train).axes[0].lines[0].get_ydata().tolist() == [2.0, 4.0]
    (axes,) = run._loss(train, [], []).axes
    assert (axes.get_ylabel(), axes.child_axes[0].get_xlabel()) == ("loss", "images")


def test_without_a_record_there_are_no_plots(tmp_path):
    assert plot_run(tmp_path) == []


def test_a_long_run_is_thinned_to_its_first_and_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "POINTS", 10)
    monkeypatch.setattr(experts, "COLUMNS", 4)
    write(tmp_path, range(1, 50))
    check(tmp_path, NAMES)
    assert draw.spread(range(1, 50), 10)[::9] == [1, 49]
