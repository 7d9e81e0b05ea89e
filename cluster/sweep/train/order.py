"""The trials of a sweep still to be trained: largest first, each once the checkpoint that it starts from exists."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cluster.attempts.tasks import Ended, Task
from cluster.server import waiting
from cluster.sweep.design.trial import Plan, Trial
from configs import Config, ConfigError
from trainer.checkpoint.manifest import committed, folder
from trainer.record.lines import Record
from trainer.run.folder import prepare_run


class Job(NamedTuple):
    """A trial, and how it will be trained."""

    trial: Trial
    config: Config
    """As it is given to `prepare_run`."""
    gang: waiting.Gang

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.root).resolve() / self.config.run.name


class Order:
    """The trials for `cluster.attempts.many_runs` to train.

    Args:
        plan: all trials known so far.
        over: trials that are not trained again, by name: "" if finished, else the reason.
        job: how a trial is trained.
        again: plans again, given the names of trials that failed for good; for a search that chooses by losses.
        record: the sweep's record.
    """

    def __init__(
        self,
        plan: Plan,
        over: Mapping[str, str],
        job: Callable[[Trial], Job],
        again: Callable[[Sequence[str]], Plan],
        record: Record,
    ) -> None:
        self._over, self._job, self._again, self._record = dict(over), job, again, record
        self._known: set[str] = set()
        self._waiting: list[Job] = []
        self._training: dict[Path, str] = {}
        self.stopped: list[str] = []
        """Names of trials that were stopped by request."""
        self._dirs: dict[str, Path] = {}
        self._add(plan)

    def next(self) -> Task | None:
        """See `cluster.attempts.many_runs.Source`."""
        if not self._waiting and not self._training and self._open:
            self._add(self._again([name for name, why in self._over.items() if why]))
        for job in list(self._waiting):
            start, why = self._start_of(job.trial)
            if why:
                self._waiting.remove(job)
                self._fail(job.trial.name, why)
            elif start or not job.trial.after:
                self._waiting.remove(job)
                return Task(job.gang, partial(self._begin, job, start))
        return None

    def more(self) -> bool:
        """See `cluster.attempts.many_runs.Source`."""
        return bool(self._waiting) or bool(self._open and not self._stuck)

    def ended(self, end: Ended) -> None:
        """Record how a trial ended."""
        name = self._training.pop(end.run_dir)
        if end.status == "STOPPED":
            self.stopped.append(name)
        else:
            self._over[name] = "" if end.status == "FINISHED" else end.reason
        self._record.event("trial_ended", trial=name, status=end.status, kind=end.kind, reason=end.reason)

    def training(self) -> list[Path]:
        """The folders of the trials in training."""
        return list(self._training)

    def failed(self) -> dict[str, str]:
        """The reason of each trial that failed for good, by name."""
        return {name: why for name, why in self._over.items() if why}

    def _add(self, plan: Plan) -> None:
        new = [trial for trial in plan.trials if trial.name not in self._known]
        self._known |= {trial.name for trial in new}
        jobs = [self._job(trial) for trial in new]
        self._dirs |= {job.trial.name: job.run_dir for job in jobs}
        self._waiting += [job for job in jobs if job.trial.name not in self._over]
        # Largest gangs first, then the longest trials: short ones fill the gaps at the end.
        self._waiting.sort(key=lambda job: (-job.gang.workers, -job.trial.spent))
        self._open, self._stuck = plan.open, not new

    def _start_of(self, trial: Trial) -> tuple[Path | None, str]:
        """The checkpoint that a trial starts from, if it exists yet, and the reason if it never will."""
        if trial.after is None:
            return None, ""
        assert trial.from_step is not None
        trunk = self._dirs[trial.after]
        if trial.from_step in committed(trunk):
            return folder(trunk, trial.from_step), ""
        if committed(self._dirs[trial.name]):
            return folder(self._dirs[trial.name], committed(self._dirs[trial.name])[-1]), ""
        if trial.after in self._over:
            ended = self._over[trial.after] or "it has finished"
            return None, f"{trial.after} has no checkpoint at step {trial.from_step} to start from: {ended}"
        return None, ""

    def _begin(self, job: Job, start: Path | None) -> Path | None:
        name = job.trial.name
        try:
            run_dir = prepare_run(job.config, start=start, began=time.time())
        except ConfigError as error:
            self._fail(name, str(error))
            return None
        each: dict[str, Any] = job.gang.each._asdict()
        self._record.event("trial_started", trial=name, workers=job.gang.workers, **each)
        self._training[run_dir] = name
        return run_dir

    def _fail(self, name: str, why: str) -> None:
        self._over[name] = why
        self._record.event("trial_ended", trial=name, status="FAILED", kind="mistake", reason=why)
