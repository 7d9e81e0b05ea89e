"""Ray Train as this system uses it: what it starts, and when it may start a failed worker group again."""

from pathlib import Path
from typing import Any

import ray.exceptions
from ray.train import UserCallback
from ray.train.torch import TorchTrainer

from trainer.record import Record, read_events, summary

from .failures import Failed, Failure, Final, cause, verdict


class Trainer(TorchTrainer):
    """Ray Train without two helper processes, each of which would cost 2 s of every start."""

    def _create_default_callbacks(self) -> list[Any]:
        # We read no Ray Datasets, and a placement group ends with the job that holds it.
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        every = super()._create_default_callbacks()  # type: ignore[misc]  # type checkers are shown Ray Train V1
        return [each for each in every if type(each).__name__ not in unused]


class Supervisor(UserCallback):
    """Runs in Ray Train's controller. What it raises ends the run, as Ray restarts after a worker's errors only."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._failed_at: int | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, Final):
                raise error
        failures = [explain(rank, error) for rank, error in worker_exceptions.items()]
        worst, step = cause(failures), summary(self._run_dir)["step"]
        attempt = max((event["attempt"] for event in read_events(self._run_dir)), default=0)
        name = "worker_lost" if worst.lost else "worker_failed"
        details = {"rank": worst.rank, "step": step, "reason": worst.reason, "traceback": worst.traceback}
        Record(self._run_dir, attempt).event(name, **details)
        if final := verdict(failures, step, self._failed_at):
            raise final
        if not worst.lost:
            self._failed_at = step


def explain(rank: int, error: BaseException) -> Failure:
    """One worker's error, as Ray Train gives it, in plain words."""
    if isinstance(error, Failed):
        return Failure(rank, error.reason, error.traceback)
    # A worker that died fails its health check, which holds Ray's own error.
    if isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError):
        return Failure(rank, "the process is gone (killed, out of memory, or crashed)", str(error), lost=True)
    return Failure(rank, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400], str(error))
