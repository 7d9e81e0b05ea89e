"""The progress view: what a user is shown of a record."""

import io
import re

import pytest
from rich.console import Console
from support import resolved

from models.planning.cost import parameters
from trainer.data.manifest import read_manifest
from trainer.record.lines import Record
from trainer.record.progress import Follower, ProgressView
from trainer.run.header import header


def view_of(total_steps: int, tty: bool = False, width: int = 80) -> tuple[ProgressView, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=tty, width=width, highlight=False)
    return ProgressView(total_steps, console=console), out


def step(number: int, time: float, **more) -> dict:
    values = {"step": number, "time": time, "loss": 3.25, "tokens_per_second": 1000.0, "step_time": 2.0, "tflops": 0.5}
    return values | more


def test_without_a_terminal_a_line_now_and_then():
    view, out = view_of(100)
    for number in range(1, 101):
        view.metrics(step(number, time=float(number)))
    lines = out.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[1] == "step 11/100  loss 3.2500  1,000 tok/s  0.5 TFLOP/s  eta 2 min 58 s"


def test_line_tells_mfu_skips_and_non_finite_losses():
    view, out = view_of(10)
    view.metrics(step(1, 0.0, loss=None, mfu=0.421, skipped=True, grad_norm=1.2345, memory_gb=0.5))
    told = "step 1/10  loss not finite  1,000 tok/s  MFU 42.1%  grad 1.23  500 MB  eta 18 s  skipped\n"
    assert out.getvalue() == told


def test_a_rate_is_told_in_the_unit_of_the_task():
    view, out = view_of(10)
    record = step(1, 0.0, images=16, images_per_second=32.0)
    del record["tokens_per_second"]
    view.metrics(record)
    assert "  32 images/s  " in out.getvalue()


def test_an_evaluation_tells_the_metrics_of_the_task():
    view, out = view_of(10)
    found = {"eval_loss": 0.5, "eval_rows": 44, "eval_accuracy": 1.0, "eval_macro_f1": 0.97, "eval_accuracy_ema": 0.9}
    view.metrics({"step": 10, "time": 0.0} | found)
    assert out.getvalue() == "step 10  held-out loss 0.5000, accuracy 1.0000, macro f1 0.9700\n"


def test_long_lines_and_brackets_stay_whole():
    view, out = view_of(10)
    reason = "RuntimeError: [/red] " + "x" * 200
    view.event({"event": "attempt_ended", "attempt": 2, "status": "FAILED", "reason": reason})
    assert out.getvalue() == f"attempt 2  failed: {reason}\n"


def test_events_and_evaluations():
    view, out = view_of(10)
    view.event({"event": "attempt_started", "attempt": 1, "world_size": 2, "device": "cpu", "time": 1.0})
    view.metrics({"step": 5, "time": 2.0, "eval_loss": 2.5, "eval_tokens": 10})
    view.event({"event": "evaluation", "step": 5, "time": 2.0})
    view.event({"event": "checkpoint", "step": 5, "bytes": 2_500_000, "time": 2.0})
    view.event({"event": "plan", "step_time": 0.1, "memory": {"peak": 2.04e8}, "time": 2.0})
    view.event({"event": "plan", "time": 2.0})  # of a device that the planner does not know
    measured = {"peak_memory": 2.5e8, "predicted_peak_memory": 2e8, "step_time": None, "predicted_step_time": 0.1}
    view.event({"event": "measured", "time": 2.0} | measured)
    view.event({"event": "spike", "step": 6, "loss": 9.123456, "time": 2.0, "attempt": 1})
    collapsed = {"event": "experts_collapsed", "step": 7, "experts": {"0": [3], "11": list(range(9))}, "collapsed": 10}
    view.event(collapsed | {"time": 2.0, "attempt": 1})
    cadence = {"event": "cadence", "every": 7, "interval_s": 4.254, "cost_s": 0.395, "mtbf_s": 1.8e8}
    view.event(cadence | {"time": 2.0, "attempt": 1})
    assert out.getvalue().splitlines() == [
        "attempt 1  2 processes on cpu",
        "step 5  held-out loss 2.5000",
        "step 5  checkpoint, 2.5 MB",
        "planned: 204 MB per process, 100 ms per step, 1 s for all 10",
        "peak memory 250 MB (planned 200 MB)",
        "spike  step 6  loss 9.123",
        "step 7  experts collapsed (layer/expert): 0/3, 11/0, 11/1, 11/2, 11/3, 11/4, 11/5, 11/6 and 2 more",
        "a checkpoint every 7 steps (4.25 s): one costs 395 ms, and a failure is expected in 2,083.3 days",
    ]


def test_live_line_on_a_terminal():
    view, out = view_of(10, tty=True)
    view.start()
    view.metrics(step(4, 0.0))
    view.refresh()
    view.stop()
    assert "4/10" in out.getvalue()
    assert "loss 3.2500" in out.getvalue()


NEEDED = ("eta 8.7 days", "loss 6.8054", "2,468 tok/s", "0.0352 TFLOP/s", "grad 0.784", "737 MB")
"""The parts of a line, the most needed first."""


@pytest.mark.parametrize(("width", "parts"), [(30, 1), (40, 1), (60, 3), (80, 4), (96, 6), (120, 6), (200, 6)])
def test_a_narrow_terminal_leaves_out_what_is_least_needed(width, parts):
    view, out = view_of(1_200_000, tty=True, width=width)
    view.metrics(step(300_001, 0.0) | {"loss": 6.8054, "tokens_per_second": 2468.0, "tflops": 0.0352,
                                       "grad_norm": 0.784, "memory_gb": 0.737, "step_time": 0.8333})  # fmt: skip
    view.start()
    view.stop()
    drawn = [re.sub(r"\x1b\[[\d?;]*[a-zA-Z]", "", line).rstrip() for line in out.getvalue().splitlines()]
    (line,) = {line for line in drawn if line}
    assert line.startswith(" 300001/1200000  ")
    assert [part in line for part in NEEDED] == [number < parts for number in range(len(NEEDED))]
    assert "…" not in line
    assert len(line) <= width
    assert ("━" in line) == (width >= 120)


@pytest.mark.parametrize("tty", [False, True])
def test_until_the_first_step_a_terminal_shows_that_time_passes(tty):
    view, out = view_of(10, tty=tty)
    view.start()
    view.waiting()
    assert ("starting, 0 s" in out.getvalue()) == tty
    view.metrics(step(1, 0.0))
    before = out.getvalue()
    view.waiting()
    assert out.getvalue() == before
    view.stop()


def test_a_header_tells_size_tokens_and_passes_over_the_data(tmp_path, tiny_data):
    there = read_manifest(tiny_data).splits["train"].tokens
    small = resolved(data={"path": str(tiny_data)}, train={"steps": 2, "global_batch": 4, "seq_len": 32})
    model, data, where = header(tmp_path / "runs" / "small", small)
    counts = parameters(small.model)
    total, active = (f"{count / 1e3:.3g}k" for count in (counts.total, counts.active))
    assert model == f"{total} parameters ({active} active per token), 256 tokens in 2 steps of 4 x 32"
    assert data == f"prepared: {256 / there:.2g} epochs of {there:,} tokens"
    assert where == f"in {tmp_path}/runs/small; `muster status {tmp_path}/runs/small` shows where its time goes"
    mixture = {"path": [{"path": str(tiny_data), "weight": 3}, {"path": str(tiny_data)}]}
    long = resolved(data=mixture, train={"steps": there, "global_batch": 4, "seq_len": 32})
    _, first, second, _ = header(tmp_path, long)
    assert first == f"prepared: 96 epochs of {there:,} tokens (each token is read that often)"
    assert second == f"prepared: 32 epochs of {there:,} tokens (each token is read that often)"


@pytest.mark.parametrize("torn", [False, True])
def test_follower_shows_what_is_appended_after_it_was_made(tmp_path, torn):
    record = Record(tmp_path, attempt=1)
    record.metrics(step(1, 1.0))
    view, out = view_of(3)
    with Follower(tmp_path, view, interval=0.01):
        record.event("attempt_started", world_size=1, device="cpu")
        if torn:
            with (tmp_path / "metrics.jsonl").open("ab") as file:
                file.write(b'{"step": 2, "at\n')
        record.metrics(step(3, 3.0))
    assert sorted(line.split()[0] for line in out.getvalue().splitlines()) == ["attempt", "step"]
    assert "step 3/3" in out.getvalue()
    assert "step 1" not in out.getvalue()
