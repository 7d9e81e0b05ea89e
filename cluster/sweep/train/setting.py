"""What a sweep's trials get beside their plan: prepared data, tracking, defaults of unwatched runs, devices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.attempts.launch import worker_environment
from cluster.gangs.share import Node
from cluster.sweep.design.arms import arms
from cluster.sweep.design.plan import plan
from cluster.sweep.design.trial import Plan, Trial, gang_of
from configs import Config, ConfigError, differences, to_yaml
from configs.sections.data import DataConfig
from configs.sections.tracking import TrackingConfig
from configs.sweep.definition import SweepConfig, nested
from trainer.data.manifest import planned_vocabulary, sources_of
from trainer.files.durable import replace_text
from trainer.record.lines import read_events
from trainer.run.folder import attempts, read_config
from trainer.run.resolved import resolve_config
from trainer.tracking.sweep import SWEEP, TRIALS

from .order import Job
from .trial_state import Ledger, diverged, finished_losses, last_ends

UNWATCHED: dict[str, dict[str, Any]] = {
    "train": {"eval_every": 0, "sample_tokens": 0},
    "checkpoint": {"every": "auto"},
    "tracking": {"export_model": False},
}
"""Defaults of a trial, whose base is meant to be watched: a held-out loss at the end only, no samples, checkpoints only
as often as pays, no exported model. The sweep's file can set them otherwise."""


class Setting:
    """A sweep, its folder and its plan."""

    def __init__(self, sweep: SweepConfig) -> None:
        self.sweep = sweep
        self.sweep_dir = sweep.folder.resolve()
        self.base = arms(sweep)[0].config
        self.vocab_size = planned_vocabulary(self.base) or 0
        self._planned: Plan | None = None
        self._losses: dict[str, float] = {}
        """The losses that it was planned with; nothing else of a sweep changes."""
        self._data: dict[DataConfig, DataConfig] = {}
        self._said = _dotted(nested(sweep.set)) | set(sweep.axes)
        for variant in sweep.variants.values():
            self._said |= _dotted(nested(variant.set))
        own = self.base.tracking
        named = own.experiment != TrackingConfig().experiment
        told = {"parent": str(self.sweep_dir), "experiment": own.experiment if named else sweep.name}
        self.tracking = own.model_copy(update=told)
        """The tracking of each trial."""
        # The user's OMP_NUM_THREADS is for one run with many threads, not for many runs side by side.
        self.environment = worker_environment

    def prepare_data(self) -> None:
        """Prepare the default data if they are missing; all runs of the sweep use the same."""
        from trainer.data.kinds import kind_of  # torch

        data = self._prepared(self.base)
        if kind_of(self.base).open(self.base.model_copy(update={"data": data}), "held_out") is None:
            raise ConfigError(
                f"data.path={sources_of(data)[0].path} has no held-out documents, whose loss a sweep "
                "compares: prepare it with a larger data.prepare.held_out or more text"
            )
        self.vocab_size = planned_vocabulary(self.base.model_copy(update={"data": data})) or 0

    def _prepared(self, config: Config) -> DataConfig:
        from trainer.data.kinds import kind_of  # torch

        if config.data not in self._data:
            run = config.run.model_copy(update={"root": str(self.sweep_dir.parent)})
            self._data[config.data], _ = kind_of(config).ensure(config.model_copy(update={"run": run}))
        return self._data[config.data]

    def plan(self) -> Plan:
        """The plan, given the losses of finished trials and those that failed for good."""
        return self.plan_again([name for name, why in self._failed().items() if why])

    def plan_again(self, failed: Sequence[str]) -> Plan:
        """As `plan`, given the names of those that failed for good."""
        losses = dict.fromkeys(failed, math.nan) | finished_losses(self.sweep_dir)
        if self._planned is None or (self._planned.vocab_size, self._losses) != (self.vocab_size, losses):
            self._planned, self._losses = plan(self.sweep, self.vocab_size, losses), losses
        return self._planned

    def job(self, trial: Trial, nodes: Sequence[Node]) -> Job:
        """How a trial is trained on these machines. Raises ConfigError if they have no room for it."""
        config, _ = resolve_config(self.config(trial), prepare=False)
        try:
            gang = gang_of(config, nodes)
        except ConfigError as error:
            raise ConfigError(f"trial {trial.name}: {error}") from None
        return Job(trial, self.config(trial), gang)

    def config(self, trial: Trial) -> Config:
        """A trial's config, with the settings that all trials share."""
        config = trial.config
        changes: dict[str, Any] = {"data": self._prepared(config), "tracking": self.tracking}
        for section, keys in UNWATCHED.items():
            free = {key: value for key, value in keys.items() if f"{section}.{key}" not in self._said}
            if section == "checkpoint" and config.optim.schedule == "wsd":
                continue  # the plan sets them, since branches start from checkpoints
            changes[section] = changes.get(section, getattr(config, section)).model_copy(update=free)
        return config.model_copy(update=changes)

    def refuse_changed(self, trials: Sequence[Trial]) -> None:
        """Raise ConfigError if a trial of the same name was started with another config."""
        changed: dict[str, dict[str, tuple[Any, Any]]] = {}
        for trial in trials:
            run_dir = self.sweep_dir / TRIALS / trial.name
            if not attempts(run_dir):
                continue
            now, _ = resolve_config(self.config(trial), prepare=False)
            allowed, refused = differences(read_config(run_dir), now)
            # More steps mean another schedule, not the same run for longer; `prepare_run` handles data that moved.
            refused |= {key: pair for key, pair in allowed.items() if key == "train.steps"}
            if refused.pop("data.path", None) and not refused:
                continue
            if refused:
                changed[trial.name] = refused
        if not changed:
            return
        name, keys = next(iter(changed.items()))
        shown = ", ".join(f"{key} was {was} and is now {becomes}" for key, (was, becomes) in list(keys.items())[:4])
        more = f" (and {len(changed) - 1} more trials)" if len(changed) > 1 else ""
        raise ConfigError(
            f"trial {name} was started with another config: {shown}{more}.\nSet them back, give the sweep another "
            f"name, or delete {self.sweep_dir / TRIALS / name} to train it again"
        )

    def over(self, trials: Sequence[Trial]) -> dict[str, str]:
        """The trials that are not trained again, by name: "" if finished, else why it failed."""
        standings = Ledger(self.sweep_dir).standings({trial.name: trial.config.train.steps for trial in trials})
        found = {name: "" for name, each in standings.items() if each.state == "finished"}
        return found | {name: why for name, why in self._failed().items() if name in standings}

    def _failed(self) -> dict[str, str]:
        """Failed trials that are not retried: the diverged ones, and in a search all, as later draws depend on them."""
        found = {}
        for name, end in last_ends(read_events(self.sweep_dir)).items():
            search = self.sweep.optuna is not None
            if end["status"] == "FAILED" and (search or diverged(read_events(self.sweep_dir / TRIALS / name))):
                found[name] = str(end["reason"])
        return found

    def write_sweep(self) -> None:
        """Write the sweep's definition to its folder."""
        replace_text(self.sweep_dir / SWEEP, to_yaml(self.sweep))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in tree.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}"}
    return found
