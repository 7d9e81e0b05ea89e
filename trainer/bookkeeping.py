"""Once per step: move the run's state on, record what was odd, judge whether the run can go on."""

import math
from pathlib import Path

from torch import distributed as dist

from configs import Config

from . import collapse
from . import engine as ds
from .collapse import Change
from .data.reader import Dataset
from .guard import spike
from .record import Record
from .state import TrainState
from .step import StepOutcome
from .trainee import Trainee


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why, and a restart would end the same way."""


def advance(state: TrainState, outcome: StepOutcome, tokens: int, trainee: Trainee) -> list[Change]:
    """Count a step that was just taken. Returns what became of the experts in it."""
    state.step += 1
    state.cursor += trainee.config.train.global_batch
    state.tokens += tokens
    state.skipped += outcome.skipped
    state.routers = trainee.routers
    state.loss_scale = ds.loss_scale_state(trainee.engine)
    # In fp16 a finite loss that overflows is the loss scale still being found, until it cannot go lower.
    scaling = state.loss_scale and math.isfinite(outcome.loss) and state.loss_scale["cur_scale"] > 1
    state.skipped_in_a_row = state.skipped_in_a_row + (not scaling) if outcome.skipped else 0
    if outcome.skipped:
        return []
    state.starved, collapsed = collapse.after_step(state.starved, outcome.load)
    return collapsed


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
                f"{limit} steps in a row had a non-finite loss or gradient, the last at step {state.step} (sequences "
                f"from {read_at}); the weights before them are in the last checkpoint: lower optim.lr, or look at the "
                f"data with `muster data show`"
            )
        return None
    settings = config.train.spike
    deviations = spike(outcome.loss, state.recent_losses, settings)
    if deviations and record:
        record.event("spike", step=state.step, cursor=read_at, loss=outcome.loss, deviations=deviations)
    state.recent_losses = [*state.recent_losses, outcome.loss][-settings.window :]
    return deviations


def report_bad_pages(dataset: Dataset, reported: int, run_dir: Path, attempt: int) -> int:
    """Name the pages left out (data.on_bad_page=skip) in the record; any process may meet one. Returns their number."""
    for file, row_group in dataset.bad_pages[reported:]:
        Record(run_dir, attempt).event("bad_page", file=file, row_group=row_group, rank=dist.get_rank())
    return len(dataset.bad_pages)
