"""Once per step, one step behind the device: move the run's state on, record it, judge whether the run can go on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from configs import Config, counted
from models.tasks.task import Change, Task

from .checkpoint.cadence import Cadence
from .checkpoint.save import Saver
from .data.kinds import ExampleReader
from .health.clock import Took
from .health.spikes import spike
from .health.straggler import Stragglers
from .late import Late
from .record.events import NONFINITE
from .record.forecast import Forecast
from .record.lines import Record
from .record.measure import step_metrics
from .state import TrainState
from .step import StepOutcome, outcome
from .trainee import Trainee


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why, and a restart would end the same way.

    Args:
        cause: as event `attempt_ended` has it.
    """

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(reason)
        self.cause = cause


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be working on."""

    values: Late
    """What `step.outcome` reads."""
    took: Callable[[], Took]
    """To be asked when the values are there."""
    rate: float
    """Its learning rate."""
    waited: float
    """Seconds in which it had no data."""
    writing: bool
    """Whether a checkpoint was being written when it began."""
    loss_scale: dict[str, Any] | None
    """fp16's after it."""


class Books:
    """Reads what a step has measured when the next one is launched, so that the device never waits for the host.

    Attributes:
        asked_to_stop, checkpoint_every: of the last step read, or from before the first: the same in every process.
    """

    def __init__(
        self,
        trainee: Trainee,
        state: TrainState,
        record: Record | None,
        stragglers: Stragglers,
        forecast: Forecast,
        cadence: Cadence | None,
        saver: Saver,
        flops_of_example: float | None,
    ) -> None:
        self._flops = flops_of_example
        self._trainee, self._state, self._record, self._stragglers = trainee, state, record, stragglers
        self._forecast, self._cadence, self._saver = forecast, cadence, saver
        self._open: Launched | None = None
        self.asked_to_stop, self.checkpoint_every = False, 0

    @property
    def step(self) -> int:
        """The last step launched."""
        return self._state.step + (self._open is not None)

    def launched(self, step: Launched) -> None:
        """A step is under way; read the one before it. Raises TrainingStopped as `judge`."""
        before, self._open = self._open, step
        if before:
            self._read(before)

    def settle(self) -> float | None:
        """Read the last step too: the state is then that of the weights. Returns its deviations if it was a spike.

        Raises:
            TrainingStopped: as `judge`.
        """
        last, self._open = self._open, None
        if last is None:
            return None
        deviations = self._read(last)
        self._state.memory = self._trainee.memory()
        return deviations

    def _read(self, step: Launched) -> float | None:
        config, state, record = self._trainee.config, self._state, self._record
        task = self._trainee.learner.task
        result = outcome(step.values.tolist(), self._trainee.learner.layout)
        self.asked_to_stop, self.checkpoint_every = result.asked_to_stop, result.checkpoint_every
        took = step.took()
        self._forecast.step_took(took.seconds)
        if self._cadence:
            self._cadence.step_took(took.seconds, step.writing, self._saver.took)
        read_at = state.cursor
        changes = advance(state, result, step.loss_scale, config, task) + self._stragglers.after_step(result.rank_time)
        changes += self._trainee.compilations.after_step()
        if record:
            for change in changes:
                record.event(change.event, step=state.step, **change.details)
            if state.step % config.train.log_every == 0 or result.skipped:
                metrics = step_metrics(
                    config,
                    self._trainee.learner,
                    state,
                    result,
                    step.rate,
                    took.seconds,
                    step.waited,
                    self._flops,
                    self._trainee.device,
                )
                record.metrics(metrics, at=took.ended)
        return judge(state, result, read_at, config, record)


def advance(
    state: TrainState, outcome: StepOutcome, loss_scale: dict[str, Any] | None, config: Config, task: Task
) -> list[Change]:
    """Count a step. Returns what the task has to tell of it."""
    state.step += 1
    state.cursor += config.train.global_batch
    state.tokens += outcome.weight
    state.skipped += outcome.skipped
    state.loss_scale = loss_scale
    # In fp16 a finite loss that overflows is the loss scale still being found, until it cannot go lower.
    scaling = state.loss_scale and math.isfinite(outcome.loss) and state.loss_scale["cur_scale"] > 1
    state.skipped_in_a_row = state.skipped_in_a_row + (not scaling) if outcome.skipped else 0
    if outcome.skipped:
        return []
    state.starved, changes = task.watch(state.starved, outcome.extra)
    return changes


def judge(state: TrainState, outcome: StepOutcome, read_at: int, config: Config, record: Record | None) -> float | None:
    """Record a skipped step or a loss spike. Returns the spike's deviations, or None.

    Raises:
        TrainingStopped: too many skipped steps in a row; the weights are those before the first of them.
    """
    limit = config.train.max_nonfinite_steps
    if outcome.skipped:
        if record:
            record.event(
                "skipped_step", step=state.step, cursor=read_at, loss=outcome.loss, in_a_row=state.skipped_in_a_row
            )
        if state.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"{counted(limit, 'step')} in a row had a non-finite loss or gradient, the last at step "
                f"{state.step} (examples "
                f"from {read_at}); the weights before them are in the last checkpoint: lower optim.lr, or look at the "
                f"data with `muster data show`",
                NONFINITE,
            )
        return None
    settings = config.train.spike
    deviations = spike(outcome.loss, state.recent_losses, settings)
    if deviations and record:
        record.event("spike", step=state.step, cursor=read_at, loss=outcome.loss, deviations=deviations)
    state.recent_losses = [*state.recent_losses, outcome.loss][-settings.window :]
    return deviations


def after_evaluation(state: TrainState, loss: float, config: Config, record: Record | None) -> None:
    """Count the evaluations since the best one, and the drops of the schedule `plateau`: after optim.plateau_patience
    of them in a row, counted anew from each drop."""
    best = state.best_eval_loss
    if math.isfinite(loss) and (best is None or loss < best - config.train.early_stop.min_delta):
        state.best_eval_loss, state.since_best, state.since_drop = loss, 0, 0
        return
    state.since_best, state.since_drop = state.since_best + 1, state.since_drop + 1
    if config.optim.schedule == "plateau" and state.since_drop >= config.optim.plateau_patience:
        state.since_drop, state.lr_drops = 0, state.lr_drops + 1
        if record:
            record.event("plateau", step=state.step, lr_drops=state.lr_drops, in_a_row=state.since_best)


def ends_early(state: TrainState, config: Config) -> bool:
    """Whether train.early_stop.patience evaluations in a row were no improvement."""
    patience = config.train.early_stop.patience
    return patience is not None and state.since_best >= patience


def report_bad_pages(dataset: ExampleReader, reported: int, run_dir: Path, attempt: int) -> int:
    """Name the pages left out (data.on_bad_page=skip) in the record; any process may meet one. Returns their number."""
    for file, row_group in dataset.bad_pages[reported:]:
        Record(run_dir, attempt).event("bad_page", file=file, row_group=row_group, rank=dist.get_rank())
    return len(dataset.bad_pages)
