"""Sweeps for the tests: small ones, and records of trials as training would leave them."""

from pathlib import Path
from typing import Any

import yaml

from configs.sweep.definition import SweepConfig, sweep_from_dict
from trainer.record.lines import Record

TINY = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "num_experts": 0, "intermediate_size": 64,
}  # fmt: skip


def tiny_sweep(root: Path, data: Path, **sections: Any) -> SweepConfig:
    """A sweep of tiny dense models; its base is written beside it."""
    root.mkdir(parents=True, exist_ok=True)
    train = {"steps": 6, "global_batch": 4, "seq_len": 32, "precision": "fp32", "eval_sequences": 4}
    base = root / "base.yaml"
    tree = {"model": TINY, "train": train, "data": {"path": str(data)}, "tracking": {"enabled": False}}
    base.write_text(yaml.safe_dump(tree))
    return sweep_from_dict({"name": "tiny", "root": str(root), "base": str(base)} | sections)


def begun(sweep: SweepConfig) -> Record:
    """The record of a sweep that runs in this process."""
    record = Record(sweep.folder, 1)
    record.event("attempt_started", tracking={"enabled": False})
    record.event("cluster", machines=1, cpus=2.0, gpus=0.0)
    return record


def trained(
    setting: Any,
    trial: Any,
    sweep: Record,
    loss: float | None = 2.0,
    status: str = "FINISHED",
    steps: int | None = None,
) -> Path:
    """Leave what a training of the trial would: loss None is one that is not a number."""
    from trainer.run.folder import prepare_run

    run_dir = prepare_run(setting.config(trial), began=1000.0)
    sweep.event("trial_started", trial=trial.name, workers=1, cpus=1.0, gpus=0.0)
    record = Record(run_dir, 1)
    record.event("attempt_started", inputs=[])
    steps = steps or trial.config.train.steps
    for step in range(1, steps + 1):
        record.metrics(
            {"step": step, "loss": 5.0 - step / steps, "tokens": 128 * step, "data_wait": 0.0, "step_time": 0.01}
        )
    if status == "FINISHED":
        record.metrics({"step": steps, "eval_loss": float("nan") if loss is None else loss, "eval_tokens": 4})
    record.event("attempt_ended", status=status, reason="as the test says", step=steps)
    record.close()
    sweep.event("trial_ended", trial=trial.name, status=status, kind="", reason="as the test says")
    return run_dir
