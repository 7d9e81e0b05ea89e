"""Stands between a failed worker group and Ray Train's restart: records what failed and forbids a useless restart."""

from pathlib import Path
from typing import Any

import ray.exceptions
from ray.train import UserCallback

from trainer.record import Record, read_events, summary

from .failures import Failure, Final, cause, verdict


class Supervisor(UserCallback):
    """Runs in Ray Train's controller. What it raises ends the run, as Ray restarts after a worker's errors only."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._failed_at: int | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(final := original(error), Final):
                raise final
        failures = [explain(rank, error) for rank, error in sorted(worker_exceptions.items())]
        worst, step = cause(failures), summary(self._run_dir)["step"]
        attempt = max((event["attempt"] for event in read_events(self._run_dir)), default=0)
        Record(self._run_dir, attempt).event(
            "worker_lost" if worst.lost else "worker_failed", rank=worst.rank, step=step, reason=worst.reason,
            traceback=worst.traceback,
        )  # fmt: skip
        if final := verdict(failures, step, self._failed_at):
            raise final
        if not worst.lost:
            self._failed_at = step


def original(error: BaseException) -> BaseException:
    """The exception that a worker's own code raised, out of what Ray Train wraps it in."""
    return getattr(error, "_base_exc", error)


def explain(rank: int, error: BaseException) -> Failure:
    """One worker's error as a `Failure`."""
    raised = original(error)
    if isinstance(raised, ray.exceptions.RayActorError) or isinstance(
        getattr(raised, "health_check_failure", None), ray.exceptions.RayActorError
    ):
        return Failure(rank, "the process is gone (killed, out of memory, or crashed)", str(raised), lost=True)
    reason = f"{type(raised).__name__}: {' '.join(str(raised).split())}"[:400]
    return Failure(rank, reason, str(error))
