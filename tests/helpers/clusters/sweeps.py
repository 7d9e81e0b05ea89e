"""Small sweeps for tests, and records of trials as training would write them."""

import math
from pathlib import Path
from typing import Any

import yaml

from configs.sweep.definition import SweepConfig, sweep_from_dict
from trainer.record.lines import Record

TINY = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "num_experts": 0, "intermediate_size": 64,
}  # fmt: skip


BUDGETS = [3e9, 6e9, 1.2e10, 2.4e10]


def isoflop_of(data: Path) -> dict[str, Any]:
    """Sections of a tiny sweep of enough sizes and budgets for a law, which stands on a preset alone."""
    train = {"global_batch": 32, "seq_len": 32, "precision": "fp32", "eval_sequences": 4}
    return {
        "base": "dense-small", "isoflop": {"budgets": BUDGETS, "sizes": 4, "spread": 2},
        "rules": {"lr": "fixed", "batch": "fixed"}, "shape": {"head_dim": 4, "aspect_ratio": 8, "ffn_multiple": 4},
        "set": {"train": train, "data": {"path": str(data)}, "tracking": {"enabled": False}},
    }  # fmt: skip


def planted(trial: Any, noise: float) -> float:
    """A loss by a law of the trial's size and tokens."""
    return float((1.6 + 40 / trial.counts.active**0.3 + 90 / trial.tokens**0.3) * math.exp(noise))


def made(
    root: Path, data: Path, name: str, count: int | None = None, loss: Any = lambda trial: 2.0, **sections: Any
) -> tuple[Any, tuple, Record]:
    """A sweep of which the first trials have finished; its setting, all of its trials, and its record."""
    from cluster.sweep.train.progress import write_plan
    from cluster.sweep.train.setting import Setting

    sweep = tiny_sweep(root, data, **sections).model_copy(update={"name": name})
    setting = Setting(sweep)
    trials, record = setting.plan().trials, begun(sweep)
    setting.write_sweep()
    write_plan(setting.sweep_dir, setting.plan())
    for trial in trials[:count]:
        trained(setting, trial, record, loss=loss(trial))
    return setting, trials, record


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
    """Write what training the trial would; loss None: one that is not a number."""
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
