"""Train one run in one process per device: the loop, and what surrounds an attempt."""

import shutil
import signal
import sys
import threading
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from configs import Config, ConfigError, counted, with_workers
from configs.reading.parse import clip
from models.families import family_of
from models.flops import flops_of_example

from .bookkeeping import Books, Launched, TrainingStopped, after_evaluation, ends_early, report_bad_pages
from .checkpoint.cadence import Cadence, is_due
from .checkpoint.export import export
from .checkpoint.manifest import committed
from .checkpoint.resume import resume, roll_back
from .checkpoint.save import Saver
from .data.kinds import ExampleReader, kind_of, typical
from .data.read.loader import Loader
from .data.read.shards import DataError
from .engine.precision import check_device
from .engine.private import VERSION
from .engine.start import start_processes
from .health.clock import own_time, stopwatch
from .health.preflight import preflight
from .health.straggler import among_all
from .health.watchdog import Beat, watchdog
from .late import Late, sum_over_all
from .observe.evaluation import evaluate
from .observe.tracing import Profiler
from .processes.collectives import from_chief
from .processes.device import be_deterministic, device
from .record.events import CHECKPOINT, DATA, EARLY
from .record.forecast import Forecast, refuse_too_large
from .record.lines import Record, read_events
from .run import revision
from .run.durable_state import change_durable_state
from .run.folder import attempts, read_config, run_lock
from .run.plugins import with_plugins
from .run.stop import stop_requested
from .state import TrainState
from .step import micro_batches
from .tracking import start_shipper
from .trainee import build_trainee


def train(run_dir: Path, patience: float = 0.0) -> str:
    """Run one attempt of a run, in each of its processes, under torchrun's environment variables.

    Args:
        run_dir: a folder made by `trainer.run.folder.prepare_run`; its config.yaml is all that is read.
        patience: seconds to wait for another process that trains the run, such as one whose machine is cut off.

    Returns:
        `FINISHED`, or `STOPPED` after a signal or a stop request: a checkpoint is written and the run can go on.

    Raises:
        TrainingStopped: train.max_nonfinite_steps steps were skipped in a row, or a page of the data is damaged.
        ConfigError: the run's checkpoints or data are not what they should be.
        BadMachine: a machine, a link or the run's folder is not what training needs (trainer.health.preflight).
    """
    config = read_config(run_dir)
    stop = _catch_signals()
    config = with_plugins(config)
    start_processes(config.cluster.timeout)
    if config.train.deterministic:
        be_deterministic()
    config = with_workers(config, dist.get_world_size())
    chief = dist.get_rank() == 0
    dist.barrier()  # past which no process counts attempts (trainer.processes.output)
    attempt = from_chief(lambda: attempts(run_dir) + 1)
    with run_lock(run_dir, patience) if chief else nullcontext():
        record = Record(run_dir, attempt) if chief else None
        state = TrainState()
        shipper, status, reason = None, "FAILED", ""
        cause: dict[str, Any] = {}
        try:
            if record:
                inputs = kind_of(config).inputs(config.data)
                change_durable_state(run_dir, attempt=attempt, inputs=[entry["digest"] for entry in inputs])
                record.event("attempt_started", **_surroundings(), **revision.of(Path.cwd()), inputs=inputs)
                own = config.tracking.enabled and not config.tracking.parent
                shipper = start_shipper(run_dir, config) if own else None
            with watchdog(run_dir, attempt, config) as beat:
                status = _steps(run_dir, config, state, record, attempt, stop, beat)
            reason = "reached train.steps" if status == "FINISHED" else "stopped by request"
            if status == "FINISHED" and state.step < config.train.steps:
                reason = f"no lower held-out loss in {counted(state.since_best, 'evaluation')}"
                cause = {"cause": EARLY, "in_a_row": state.since_best}
            if record and status == "FINISHED" and config.tracking.enabled and config.tracking.export_model:
                _export(run_dir, config, record)
        except DataError as error:
            reason, cause = str(error), {"cause": DATA}
            raise TrainingStopped(reason, DATA) from None
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            cause = {"cause": error.cause} if isinstance(error, TrainingStopped) else {}
            if record:
                record.event("failure", step=state.step, reason=reason, traceback=traceback.format_exc())
            raise
        finally:
            if record:
                record.event("attempt_ended", status=status, reason=reason, step=state.step, **cause)
                record.close()
            # After a failure the next attempt must not wait for a tracker: the shipper goes on alone.
            if shipper and status != "FAILED" and (missing := shipper.finish(timeout=60.0)):
                print(missing, file=sys.stderr)
    return status


def _steps(
    run_dir: Path,
    config: Config,
    state: TrainState,
    record: Record | None,
    attempt: int,
    stop: threading.Event,
    beat: Beat,
) -> str:
    """The training loop; `state` follows it. Returns FINISHED or STOPPED."""
    train, here = config.train, device()
    check_device(config, here)
    refuse_too_large(config, here)
    kind = kind_of(config)
    dataset, held_out = kind.open(config, "train"), kind.open(config, "held_out")
    assert dataset
    flops = _flops(config, dataset, record)
    # Before the model takes memory.
    forecast = Forecast(config, here, lambda: preflight(run_dir, config, record))
    if record:
        record.event("plan", **forecast.predicted(flops))
    trainee = build_trainee(config, here, warm=not from_chief(lambda: committed(run_dir)), dataset=dataset)
    engine, engines, where = trainee.engine, list(trainee.engines.values()), trainee.where
    resume(run_dir, engines, state, trainee.learner, record)
    if state.step:
        trainee.remember(state.memory)
    state.networks, state.frozen = trainee.networks, trainee.frozen
    saver = Saver(run_dir, config.model_dump(mode="json"), record, config.checkpoint.background, config.cluster.timeout)
    profiler = Profiler(run_dir, train.profile, enabled=dist.get_rank() == 0)
    accumulate, stragglers = engine.accumulation, among_all(config)

    def load() -> Loader:
        return Loader(dataset, micro_batches(config, state.cursor, where.dp), config.data.prefetch, here)

    def riders() -> tuple[float, float]:
        """What every process must know to leave, and to write checkpoints, at the same step as the others."""
        return stop.is_set() or stop_requested(run_dir), cadence.every if cadence else 0

    loader = load()
    cadence = None  # rank 0 chooses the steps between checkpoints, and tells the others with each step
    if record and config.checkpoint.every == "auto":
        cadence = Cadence(read_events(run_dir), dist.get_world_size(), record)
    books = Books(trainee, state, record, stragglers, forecast, cadence, saver, flops)
    asked, every = sum_over_all(riders(), here).tolist()
    books.asked_to_stop, books.checkpoint_every = asked > 0, int(every)
    saved, reported = state.step, 0
    try:
        while books.step < train.steps and not books.asked_to_stop and not ends_early(state, config):
            step, stopped, waited, writing = books.step + 1, stopwatch(here), loader.waited, saver.writing
            own_time().begin()
            profiler.before(step)
            beat(step, "data")
            loaded = [next(loader) for _ in range(accumulate)]
            batches = [trainee.part(each.batch) for each in loaded]
            waited = loader.waited - waited
            reported = report_bad_pages(dataset, reported, run_dir, attempt)

            beat(step, "step")
            read = sum_over_all([sum(each.weight for each in loaded)], here)[0]
            weight = read * config.parallel.dp / dist.get_world_size()  # the other ranks read the same
            rate = trainee.set_learning_rate(step, state.lr_drops)
            values, took = trainee.step(batches, weight, riders(), step), stopped()
            books.launched(Launched(Late(values), took, rate, waited, writing, engine.loss_scale()))

            if train.spike.action == "rollback" and books.settle():
                beat(step, "rollback")
                saver.wait()
                roll_back(run_dir, engines, state, config, record)
                trainee.remember(state.memory)
                saved = state.step
                loader.close()
                loader = load()
                continue
            if profiler.ends(step):
                books.settle()
                profiler.after(step, record)
            last = step == train.steps
            if held_out and (last or (train.eval_every and step % train.eval_every == 0)):
                books.settle()
                loss = evaluate(run_dir, trainee, held_out, step, record, beat)
                after_evaluation(state, loss, config, record)
            if (
                last
                or ends_early(state, config)
                or is_due(config.checkpoint.every, step, saved, books.checkpoint_every)
            ):
                books.settle()
                beat(step, "checkpoint")
                saver.save(engines, state, attempt)
                saved = step
                if cadence:
                    cadence.began_write(saver.took)
        books.settle()
        beat(state.step, "end")
        killed = state.step < train.steps and not ends_early(state, config)
        if killed:
            if record:
                record.event("signal", step=state.step, reason="a signal, or the file `stop` in the run's folder")
            if saved != state.step:
                saver.save(engines, state, attempt)
    except DataError:
        books.settle()  # the steps before it are part of the record
        raise
    finally:
        loader.close()
        saver.wait()
        if record and trainee.compilations.any:
            record.event("compiled", **trainee.compilations.summary())
    if not killed and (failed := from_chief(lambda: saver.failed)):
        why = f"the last checkpoint could not be written; start the run again to continue: {failed}"
        raise TrainingStopped(why, CHECKPOINT)
    if record:
        record.event("measured", **forecast.measured())
    return "STOPPED" if killed else "FINISHED"


def _flops(config: Config, dataset: ExampleReader, record: Record | None) -> float | None:
    """Training FLOPs of an example; None where they cannot be counted, which the record says."""
    try:
        return flops_of_example(config, lambda: dataset.examples(typical(dataset)))
    except (RuntimeError, ValueError) as error:
        if record:
            record.event("flops_unknown", reason=clip(error, 300))
        return None


def _export(run_dir: Path, config: Config, record: Record) -> None:
    """Leave the final model in Hugging Face format, where the tracker picks it up."""
    target = run_dir / "model"
    shutil.rmtree(target, ignore_errors=True)  # of an earlier end, before train.steps was raised
    if not family_of(config.model).exported:
        return
    try:
        export(run_dir, target)
    except (ConfigError, OSError) as error:
        record.event("export_skipped", reason=str(error))


def _surroundings() -> dict:
    return {
        "world_size": dist.get_world_size(),
        "device": str(device()),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "deepspeed": VERSION,
        },
    }


def _catch_signals() -> threading.Event:
    """SIGTERM, SIGHUP and Ctrl-C ask for a checkpoint and a clean end, but for one that is ignored (nohup); only the
    main thread of a process may hear them."""
    asked = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: asked.set())
    return asked
