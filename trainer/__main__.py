"""`torchrun -m trainer CONFIG [key=value ...]`: train one run without Ray."""

import os
import sys

# `python -m` puts the working directory first, where a user's own folder `models/` or `configs/` would win over ours.
if sys.path and sys.path[0] in ("", os.getcwd()):
    sys.path.append(sys.path.pop(0))


def main() -> int:
    """Returns the exit code: 0 finished, 75 stopped and resumable, 2 a mistake in what was asked, 1 failure."""
    from configs import ConfigError, load

    try:
        if len(sys.argv) < 2:
            raise ConfigError("usage: torchrun -m trainer CONFIG [key=value ...]")
        config = load(sys.argv[1], sys.argv[2:])
        from pathlib import Path

        from torch import distributed as dist

        from .engine import start_processes
        from .loop import TrainingStopped, train
        from .resume import from_chief
        from .run import is_finished, prepare_run

        start_processes(config.cluster.timeout)

        def prepare() -> tuple[Path | None, str]:
            try:
                return prepare_run(config), ""
            except ConfigError as error:
                return None, str(error)

        run_dir, mistake = from_chief(prepare)
        chief = dist.get_rank() == 0
        if run_dir is None:
            if chief:
                print(f"muster: {mistake}", file=sys.stderr)
            return 2
        if is_finished(run_dir):
            if chief:
                print(f"{run_dir} is finished")
            return 0
        try:
            status = train(run_dir)
        except TrainingStopped as stopped:
            if chief:
                print(f"muster: {stopped}", file=sys.stderr)
            return 1
        return 0 if status == "FINISHED" else 75
    except ConfigError as error:
        print(f"muster: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
