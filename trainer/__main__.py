"""`torchrun -m trainer CONFIG [key=value ...]`: train one run without Ray."""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from .processes.orphans import end_with

if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's agent is what started this; before anything that takes time
    end_with(os.getppid())

from torch import distributed as dist

from configs import ConfigError, ExitCode, load, mask, private_files

from .engine.precision import check_device
from .engine.start import start_processes
from .health.preflight import BadMachine, require_folder
from .loop import TrainingStopped, train
from .processes.collectives import from_chief
from .processes.device import device
from .processes.output import output_kept
from .processes.rendezvous import Incomplete
from .record.progress import Follower, ProgressView
from .record.terminal import Console, guard
from .run.folder import followed, is_finished, prepare_run, read_config
from .run.header import header
from .run.stop import take_stop
from .tracking import unsent


def main() -> ExitCode:
    private_files()
    guard()
    try:
        if len(sys.argv) < 2:
            raise ConfigError("usage: torchrun -m trainer CONFIG [key=value ...]")
        _refuse_passwords(sys.argv[1:])
        config = load(sys.argv[1], sys.argv[2:])
        start_processes(config.cluster.timeout)
        check_device(config, device())
        run_dir = _prepare(config)
        if is_finished(run_dir):
            _say(f"{run_dir} is finished")
            return ExitCode.FINISHED
        chief = dist.get_rank() == 0
        terminal = Console(file=os.fdopen(os.dup(1), "w", buffering=1))
        resolved = read_config(run_dir)
        for line in [*followed(run_dir, config), *header(run_dir, resolved)] if chief else []:
            terminal.print(line, soft_wrap=True)
        view = ProgressView(resolved.train.steps, console=terminal)
        with Follower(run_dir, view) if chief else nullcontext(), output_kept(run_dir):
            status = train(run_dir)
        if chief and status == "STOPPED":
            take_stop(run_dir)  # it has been followed: the same command goes on
        tracking = read_config(run_dir).tracking
        if tracking.enabled and not tracking.parent and (missing := unsent(run_dir)):
            _say(missing)
        _say(f"{run_dir}: {status}")
        return ExitCode.FINISHED if status == "FINISHED" else ExitCode.STOPPED
    except ConfigError as error:
        _say(f"muster: {error}")
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # torchrun ends every process with the first: let rank 0 say its message
        return ExitCode.MISTAKE
    except (TrainingStopped, BadMachine, Incomplete) as stopped:
        _say(f"muster: {stopped}")
        return ExitCode.FAILED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _refuse_passwords(arguments: list[str]) -> None:
    """Raise ConfigError for a password on the command line: torchrun's own, and those of all ranks, would show it to
    every user of the machine."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if mask(value) != value or mask(argument) != argument:
            raise ConfigError(
                f"{key if mask(key) == key else 'an argument'} holds a password, and every user of this machine can "
                f"read command lines: leave it out, and set MLFLOW_TRACKING_URI to the whole URI"
            )


def _prepare(config) -> Path:
    """Rank 0 makes the folder; a mistake it finds is every process's."""

    def prepare() -> tuple[str | None, str]:
        try:
            return str(prepare_run(config, workers=dist.get_world_size())), ""
        except ConfigError as error:
            return None, str(error)

    made, mistake = from_chief(prepare)
    if made is None:
        raise ConfigError(mistake)
    run_dir = Path(made)
    require_folder(run_dir)
    return run_dir


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(mask(text), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
