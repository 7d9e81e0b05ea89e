"""Train the trials of a sweep on the cluster, as many at a time as fit: `muster sweep run`."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.attempts.launch import close_record
from cluster.gangs.access_token import Address, in_config, in_environment
from cluster.gangs.machine import this_node
from cluster.gangs.session import RayThread, Session, clear_away, end_children
from cluster.gangs.share import Node
from cluster.sweep.design.trial import Plan
from configs import ConfigError, ExitCode, counted, mask
from configs.sweep.definition import SweepConfig
from trainer.files.own_files import require_own
from trainer.record.lines import Record, last_attempt, read_events
from trainer.record.terminal import Console
from trainer.run import revision
from trainer.run.folder import attempts, hold
from trainer.tracking import ShipperHandle, hand_down_password, send_apart, start_shipper
from trainer.tracking.sweep import TRIALS, sweep_config

from .display import View, booked, failures
from .order import Order
from .progress import books, progress, write_plan
from .setting import Setting
from .trial_state import OVER, Ledger


def run_sweep(sweep: SweepConfig, gpus: int | None = None, overrides: Sequence[str] = ()) -> int:
    """Train until every trial is finished or has failed for good, or the user stops it.

    Args:
        gpus: maximum number of devices; None: all that are free.
        overrides: the part of the sweep that the user gave on the command line.

    Returns:
        The exit code: 0 all finished, 75 stopped (the same command continues), 1 some failed.

    Raises:
        ConfigError: a mistake of the user's; raised before any device is held.
    """
    require_own(sweep.folder, without=(TRIALS,))  # each of them is checked when it is trained
    setting = Setting(sweep)
    setting.plan().check_gpus(gpus)  # before spending a minute on the default data
    out = Console(soft_wrap=True)
    with _only_one(setting.sweep_dir):
        setting.prepare_data()
        plan = setting.plan()
        setting.refuse_changed(plan.trials)
        address = in_config(setting.base.cluster.address, overrides) or in_environment("RAY_ADDRESS")
        node = this_node()
        if address is None:
            for trial in plan.trials:
                setting.job(trial, [node])
        setting.write_sweep()
        write_plan(setting.sweep_dir, plan)
        found = progress(setting.sweep_dir)
        out.print(f"sweep {sweep.name} in {setting.sweep_dir}: {counted(len(plan.trials), 'trial')}")
        if not found.open and found.count("finished") == len(plan.trials):
            out.print("all are finished")
            return ExitCode.FINISHED
        for warning in plan.warnings:
            out.print(f"warning: {warning}")
        return _run(setting, gpus, address, node, out)


def _run(setting: Setting, gpus: int | None, address: Address | None, node: Node, out: Console) -> int:
    record, shipper = _begin_record(setting)
    session = _Session(setting, gpus, record, address, node)
    with View(setting.sweep_dir, out) as view, contextlib.ExitStack() as handlers:
        session.follow(handlers, lambda: _on_signal(session), view.update)
        view.update(last=True)
        code, message = _outcome(session)
        _end_record(session, code, message)
        session.code = code
        if shipper and (missing := shipper.finish()):
            print(missing, file=sys.stderr)
    found = progress(setting.sweep_dir)
    for line in failures(found):
        out.print(line)
    out.print(booked(found.books))
    done, count = found.count("finished"), len(found.items)
    if code in (ExitCode.FAILED, ExitCode.MISTAKE) and session.error:
        print(f"muster: {mask(message)}", file=sys.stderr)
    elif code == ExitCode.STOPPED:
        out.print(f"stopped with {done} of {counted(count, 'trial')} finished: run the same command to continue")
    else:
        out.print(f"{done} of {counted(count, 'trial')} finished: {setting.sweep_dir}")
    return code


class _Session(RayThread):
    """Ray's part of a sweep."""

    def __init__(self, setting: Setting, gpus: int | None, record: Record, address: Address | None, node: Node) -> None:
        super().__init__(address, node)
        self.setting, self.gpus, self.record = setting, gpus, record
        self.order: Order | None = None
        self.trials: Any = None
        self.code: int | None = None
        """Set once only the record is left to be sent."""

    def work(self, session: Session) -> None:
        from cluster.attempts.many_runs import (
            Trials,  # imports Ray, which reads the environment that the session has set
        )

        setting, nodes = self.setting, session.nodes
        plan = setting.plan()
        total = {"cpus": sum(node.cpus for node in nodes), "gpus": sum(node.gpus for node in nodes)}
        if self.gpus is not None and plan.trials:  # the time of the other devices is not the sweep's
            each = setting.job(plan.trials[0], nodes).gang.each._asdict()
            total = {kind: min(count, self.gpus * each[kind]) for kind, count in total.items()}
        self.record.event("cluster", machines=len(nodes), **total)
        over = setting.over(plan.trials)
        self.order = Order(plan, over, lambda trial: setting.job(trial, nodes), self._again, self.record)
        joined = self.address is not None
        self.trials = Trials(self.order, setting.environment, joined, folder=os.getcwd(), most=self.gpus)
        self.connected.set()
        count = len(over)
        for ended in self.trials:
            self.order.ended(ended)
            if ended.status == "FAILED" and attempts(ended.run_dir):
                close_record(ended.run_dir, "FAILED", ended.reason.splitlines()[0])
            elif ended.status == "STOPPED":
                close_record(ended.run_dir, "STOPPED", "stopped by request while no process trained")
            count += ended.status != "STOPPED"
            self.record.metrics({"step": count, "failed": len(self.order.failed())})

    def _again(self, failed: Sequence[str]) -> Plan:
        plan = self.setting.plan_again(failed)
        plan.check_gpus(self.gpus)  # a draw may be wider than those before
        write_plan(self.setting.sweep_dir, plan)  # before any of the new trials begins
        return plan


def _begin_record(setting: Setting) -> tuple[Record, ShipperHandle | None]:
    sweep_dir = setting.sweep_dir
    hand_down_password(setting.base)
    record = Record(sweep_dir, last_attempt(read_events(sweep_dir)) + 1)
    tracking = setting.tracking.model_copy(update={"parent": None})
    record.event("attempt_started", tracking=tracking.model_dump(mode="json"), **revision.of(Path.cwd()))
    if not tracking.enabled:
        return record, None
    return record, start_shipper(sweep_dir, sweep_config(sweep_dir), sweep=True)


def _end_record(session: _Session, code: int, reason: str) -> None:
    ledger = Ledger(session.setting.sweep_dir)
    found = progress(session.setting.sweep_dir, ledger)
    kept = books(ledger)
    totals: dict[str, Any] = {state: found.count(state) for state in (*OVER, "stopped", "waiting")}
    totals |= {"trials": len(found.items), "in_steps": f"{kept.in_steps:.4f}", "device_seconds": f"{kept.total:.0f}"}
    # Trials that failed for good are part of the sweep's result: the counts show them.
    status = "STOPPED" if code == ExitCode.STOPPED else "FAILED" if session.error else "FINISHED"
    session.record.event("attempt_ended", status=status, reason=reason.splitlines()[0], step=0, totals=totals)
    session.record.close()


def _outcome(session: _Session) -> tuple[int, str]:
    error = session.error
    if isinstance(error, ConfigError):
        return ExitCode.MISTAKE, str(error)
    if error is not None:
        return ExitCode.FAILED, "Ray failed\n" + "".join(traceback.format_exception(error))
    assert session.order
    if session.stopping or session.order.stopped:
        return ExitCode.STOPPED, "stopped by request"
    if failed := session.order.failed():
        return ExitCode.FAILED, f"{counted(len(failed), 'trial')} failed for good"
    return ExitCode.FINISHED, "all trials finished"


def _on_signal(session: _Session) -> None:
    """First signal: the running trials write a checkpoint and end. Second, or one before any began: end at once."""
    if session.code is not None:
        os._exit(session.code)  # the process that sends the record finishes on its own
    if not session.stopping and session.trials is not None:
        session.stopping = True
        session.trials.stop()
        print("muster: stopping, with a checkpoint of each trial; a second signal stops at once", file=sys.stderr)
        return
    if session.address is None:
        end_children()
    clear_away(session.folder)
    runs = list(session.order.training()) if session.order else []
    for run_dir in runs:
        close_record(run_dir, "STOPPED", "stopped at once by a signal")
    session.record.event("attempt_ended", status="STOPPED", reason="stopped at once by a signal", step=0)
    if session.setting.tracking.enabled:
        send_apart(session.setting.sweep_dir, sweep=True)  # its own sender was killed
    goes_on = "continue from the last checkpoints" if any(map(attempts, runs)) else "start again"
    print(f"muster: stopped at once; run the same command to {goes_on}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(ExitCode.STOPPED)  # the thread that waits for Ray cannot be interrupted


@contextlib.contextmanager
def _only_one(sweep_dir: Path) -> Iterator[None]:
    """Hold the sweep. Raises ConfigError if another process runs it, or its folder cannot be written."""
    busy = f"sweep {sweep_dir.name} is being run by {{}}: wait for it, stop it, or choose another name"
    with contextlib.ExitStack() as stack:
        try:
            sweep_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(hold(sweep_dir / "lock", busy))
        except OSError as error:
            raise ConfigError(f"{sweep_dir}: {error.strerror or error}; choose another root for the sweep") from None
        yield
