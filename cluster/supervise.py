"""Ray Train as this system uses it: what it starts, and when it may start a failed worker group again."""

from pathlib import Path
from typing import Any

import ray.exceptions
from ray.train import UserCallback
from ray.train.torch import TorchTrainer

from trainer.record import Record, read_events, summary
from trainer.run import read_config

from .failures import Failed, Failure, Final, cause, hung
from .policy import decide, history, kind_of, memory_advice


class Trainer(TorchTrainer):
    """Ray Train without two helper processes, each of which would cost 2 s of every start."""

    def _create_default_callbacks(self) -> list[Any]:
        # We read no Ray Datasets, and a placement group ends with the job that holds it.
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        every = super()._create_default_callbacks()  # type: ignore[misc]  # type checkers are shown Ray Train V1
        return [each for each in every if type(each).__name__ not in unused]


class Supervisor(UserCallback):
    """Applies `cluster.policy` in Ray Train's controller: what it raises ends the run, else Ray starts it again."""

    def __init__(self, run_dir: Path, cpu: bool) -> None:
        self._run_dir, self._cpu = run_dir, cpu

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, Final):
                raise error
        worst = cause([explain(rank, error) for rank, error in worker_exceptions.items()])
        step, config = summary(self._run_dir)["step"], read_config(self._run_dir)
        events = read_events(self._run_dir)
        attempt = max((event["attempt"] for event in events), default=0)
        record = Record(self._run_dir, attempt)
        hangs = [event for event in events if event["event"] == "hang" and event["attempt"] == attempt]
        worst = hung(hangs[-1], worst) if hangs else worst
        name = "worker_lost" if worst.lost else "worker_failed"
        kind = "hang" if hangs else kind_of(worst)
        details = {"rank": worst.rank, "kind": kind, "step": step, "reason": worst.reason}
        record.event(name, **details, traceback=worst.traceback)
        past = history(read_events(self._run_dir))
        decision = decide(past, config.cluster.max_failures)
        reason = decision.reason
        if past[-1].kind == "memory":
            reason += f"; {memory_advice(config, self._cpu)}"
        record.event("policy", action=decision.action, reason=reason, failures=len(past))
        if decision.action == "stop":
            raise Final("failure", f"{reason}; rank {worst.rank}: {worst.reason}")


def explain(rank: int, error: BaseException) -> Failure:
    """One worker's error, as Ray Train gives it, in plain words."""
    if isinstance(error, Failed):
        return Failure(rank, error.reason, error.traceback)
    # A worker that died fails its health check, which holds Ray's own error.
    if isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError):
        return Failure(rank, "the process is gone (killed, out of memory, or crashed)", str(error), lost=True)
    return Failure(rank, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400], str(error))
