"""`muster train`: check a run, start or join Ray, watch the workers, return an exit code."""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.gangs.access_token import Address, in_config, in_environment
from cluster.gangs.machine import memory_bytes, this_node
from cluster.gangs.session import RayThread, Session, clear_away, end_children
from cluster.gangs.share import Node, Share, group_of, share, share_of_most
from configs import Config, ConfigError, ExitCode, counted, mask
from trainer.checkpoint.manifest import committed
from trainer.engine.precision import check_device
from trainer.processes.output import LOGS
from trainer.record.events import EARLY
from trainer.record.forecast import refuse_too_large
from trainer.record.lines import Record, last_attempt, read_events, status_of, summary
from trainer.record.progress import Follower, ProgressView
from trainer.record.terminal import Console
from trainer.run.folder import attempts, followed, is_finished, prepare_run, read_config, run_lock
from trainer.run.header import header
from trainer.run.resolved import resolve_config
from trainer.run.stop import request_stop
from trainer.tracking import send_apart, unsent

from .failures import Final

TRACKER = tuple(f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"))
"""Environment variables with the tracker's address and credentials."""


def launch(
    config: Config, fork: str | None = None, overrides: Sequence[str] = (), submitted: float | None = None
) -> int:
    """Train a run through Ray until it is finished, stopped or has failed.

    Args:
        config: as the user wrote it.
        fork: name of a new run that starts from the last checkpoint of `run.name`.
        overrides: the part of it that the user gave on the command line.
        submitted: see `prepare_run`.

    Returns:
        The exit code.

    Raises:
        ConfigError: a mistake of the user's; raised before any device is held.
    """
    address = in_config(config.cluster.address, overrides) or in_environment("RAY_ADDRESS")
    node = this_node()
    if address is None:
        asked, _ = resolve_config(config, prepare=False)
        share_of_most(asked, lambda config: share(config, [node]))  # before spending a minute on the default data
        if not node.gpus:
            check_device(asked, torch.device("cpu"))
            refuse_too_large(asked, torch.device("cpu"), memory_bytes())
    run_dir = prepare_run(config, fork=fork, submitted=submitted)
    notes = followed(run_dir, config)
    config = read_config(run_dir)
    out = Console(soft_wrap=True)
    if is_finished(run_dir):
        end = [event for event in read_events(run_dir) if event["event"] == "attempt_ended"][-1]
        early = end["reason"] if end.get("cause") == EARLY else ""
        key = "train.early_stop.patience" if early else "train.steps"
        why = f"at step {end['step']}: {early}" if early else counted(config.train.steps, "step")
        out.print(f"run {config.run.name} is finished ({why}): raise {key} to continue")
        return ExitCode.FINISHED
    out.print(f"run {config.run.name}")
    for line in [*notes, *header(run_dir, config)]:
        out.print(f"  {line}")

    attempts_before = attempts(run_dir)
    job = _Job(config, run_dir, address, node)
    with Follower(run_dir, ProgressView(config.train.steps)), contextlib.ExitStack() as handlers:
        job.follow(handlers, lambda: _on_signal(job, attempts_before))
    return _report(job, out, attempts_before)


class _Job(RayThread):
    """Ray's part of a run."""

    def __init__(self, config: Config, run_dir: Path, address: Address | None, node: Node) -> None:
        super().__init__(address, node)
        self.config, self.run_dir = config, run_dir
        self.status: str | None = None

    def work(self, session: Session) -> None:
        self.connected.set()
        # Imported here because they import Ray, which reads the environment that the session has set.
        from cluster.gangs.gang import Gang

        from .supervise import Supervisor

        each = share_of_most(self.config, lambda config: share(config, session.nodes))
        own = os.environ.get("OMP_NUM_THREADS") if self.config.cluster.cpus_per_worker is None else None
        with Gang(each, group_of(self.config), worker_environment(each, own)) as gang:
            supervisor = Supervisor(self.run_dir, gang, joined=self.address is not None, folder=os.getcwd())
            self.status = supervisor.run()


def worker_environment(each: Share, threads: str | None = None) -> dict[str, str]:
    """Environment of the training processes: Ray would set one thread each, and torch reads the number on import.

    Args:
        threads: threads of each process; None: as many as it reserves CPUs.
    """
    forwarded = {key: os.environ[key] for key in TRACKER if key in os.environ}
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")  # why: trainer/__init__.py
    return {"OMP_NUM_THREADS": threads or str(each.threads), "GOMP_SPINCOUNT": spin} | forwarded


def _on_signal(job: _Job, attempts_before: int) -> None:
    """First signal: ask for a checkpoint and a clean end. Second, or one before training has begun: end at once."""
    if not job.stopping and attempts(job.run_dir) > attempts_before:
        job.stopping = True
        request_stop(job.run_dir)
        print("muster: stopping after this step, with a checkpoint; a second signal stops at once", file=sys.stderr)
        return
    if job.address is None:
        end_children()
    clear_away(job.folder)
    close_record(job.run_dir, "STOPPED", "stopped at once by a signal")
    if _is_tracked(job.config) and attempts(job.run_dir) > attempts_before:
        send_apart(job.run_dir)  # its own sender was killed
    print(f"muster: stopped at once; {_goes_on(job.run_dir)}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(ExitCode.STOPPED)  # the thread that waits for Ray cannot be interrupted


def _goes_on(run_dir: Path) -> str:
    steps = committed(run_dir)
    return "run the same command to " + (f"continue from step {steps[-1]}" if steps else "start again")


def _report(job: _Job, out: Console, attempts_before: int) -> int:
    """Print how it ended, close a record that its writer could not close, and return the exit code."""
    if job.error is None:
        last = summary(job.run_dir)
        loss = "" if last["eval_loss"] is None else f", held-out loss {last['eval_loss']:.4f}"
        if job.status == "FINISHED":
            out.print(f"finished at step {last['step']}{loss}: {job.run_dir}")
        else:
            close_record(job.run_dir, "STOPPED", "stopped by request while no process trained")
            ends = [event for event in read_events(job.run_dir) if event["event"] == "attempt_ended"]
            step = ends[-1].get("step", last["step"]) if ends else last["step"]  # metrics may be recorded less often
            out.print(f"stopped after step {step}: {_goes_on(job.run_dir)}")
        _say_unsent(job)
        return ExitCode.FINISHED if job.status == "FINISHED" else ExitCode.STOPPED
    code, message = _explain(job)
    print(f"muster: {mask(message)}", file=sys.stderr)
    if code == ExitCode.FAILED and (logs := job.run_dir / LOGS).exists():
        print(f"Output of the workers: {logs}", file=sys.stderr)
    if attempts(job.run_dir) > attempts_before:
        close_record(job.run_dir, "FAILED", message.splitlines()[0])
        if _is_tracked(job.config):
            with contextlib.suppress(subprocess.TimeoutExpired):
                send_apart(job.run_dir).wait(timeout=90)  # as a killed worker could not
            _say_unsent(job)
    return code


def _is_tracked(config: Config) -> bool:
    """Whether the run's record is sent on its own, not with a sweep's."""
    return config.tracking.enabled and not config.tracking.parent


def _say_unsent(job: _Job) -> None:
    if _is_tracked(job.config) and (missing := unsent(job.run_dir)):
        print(mask(missing), file=sys.stderr)


def _explain(job: _Job) -> tuple[int, str]:
    error = job.error
    assert error
    if isinstance(error, ConfigError):
        return ExitCode.MISTAKE, str(error)
    if isinstance(error, Final):
        if error.kind == "mistake":
            return ExitCode.MISTAKE, error.reason
        return ExitCode.FAILED, error.reason + (_traceback(job.run_dir) if error.kind == "failure" else "")
    return ExitCode.FAILED, "Ray failed\n" + "".join(traceback.format_exception(error))


def _traceback(run_dir: Path, lines: int = 12) -> str:
    """The last lines of the last worker's traceback."""
    ends = [event for event in read_events(run_dir) if event["event"] in ("worker_lost", "worker_failed")]
    return "".join(f"\n  {line}" for line in ends[-1].get("traceback", "").splitlines()[-lines:]) if ends else ""


def close_record(run_dir: Path, status: str, reason: str) -> None:
    """Record the end of the last attempt if its process could not, or of a launch that never became an attempt."""
    events = read_events(run_dir)
    with contextlib.suppress(ConfigError), run_lock(run_dir):  # held: someone else trains this run
        last = last_attempt(events)
        ended = any(event["event"] == "attempt_ended" and event["attempt"] == last for event in events)
        if not ended if last else status_of(events)[0] == "NEW":
            Record(run_dir, last).event("attempt_ended", status=status, reason=reason, step=summary(run_dir)["step"])
