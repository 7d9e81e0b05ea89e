"""All progress of a run in one small value, saved with every checkpoint."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, FailFast, Field, StrictBool, StrictInt

from configs.base import at_most

Count = Annotated[int, Field(ge=0, le=2**53, strict=True)]
"""What JSON's readers hold exactly."""
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]

MOST_REMEMBERED = 4096
"""Tensors of a task's memory: a network of a thousand normalisations has three of each."""

Number = TypeVar("Number")
Rows = Annotated[list[Annotated[list[Number], FailFast()]], FailFast()]


@dataclass
class TrainState:
    """What, beside weights and optimizer moments, the next step depends on.

    The types are checked where it comes out of a checkpoint (`trainer.checkpoint.manifest`), and not as a run goes on.
    """

    # Not `strict`, which would take nothing but an instance: its numbers are.
    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Count = 0
    """Optimizer steps taken, skipped ones included."""
    cursor: Count = 0
    """Training examples consumed by the whole run; the next step reads from here."""
    tokens: Count = 0
    """Weight trained on: of a language model the target tokens."""
    skipped: Count = 0
    """Steps skipped for a non-finite loss or gradient."""
    skipped_in_a_row: Count = 0
    rollbacks: Count = 0
    recent_losses: Annotated[list[Finite], FailFast()] = field(default_factory=list)
    """The window that loss spikes are judged by."""
    best_eval_loss: Finite | None = None
    """Lowest held-out loss so far, apart from improvements by less than train.early_stop.min_delta."""
    since_best: Count = 0
    """Evaluations after it."""
    since_drop: Count = 0
    """Evaluations after it, or after the plateau schedule's last drop."""
    lr_drops: Count = 0
    """How often the plateau schedule has lowered the learning rate."""
    loss_scale: Annotated[dict[str, StrictBool | StrictInt | Finite], at_most(64)] | None = None
    """fp16's dynamic loss scale."""
    memory: Annotated[
        dict[str, Rows[Annotated[float, Field(ge=-1e38, le=1e38, strict=True)]]], at_most(MOST_REMEMBERED)
    ] = field(default_factory=dict)
    """What the task remembers, by rows: see `trainer.checkpoint.memory`."""
    starved: Rows[Count] = field(default_factory=list)
    """What the task counts from step to step: see `Task.watch`."""

    networks: Annotated[list[str], at_most(64)] = field(default_factory=list)
    """Submodules of the model that have optimizers of their own; empty: there is one."""

    frozen: Annotated[list[str], at_most(1 << 18)] = field(default_factory=list)
    """Parameters that nothing trains."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
