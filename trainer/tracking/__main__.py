"""`python -P -m trainer.tracking RUN_DIR`: send a run's record to its tracker (what `start_shipper` runs)."""

import argparse
import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path

from configs import ConfigError, mask, private_files
from trainer.record.terminal import guard

from .shipper import ship
from .start import GRACE
from .sweep import ship_sweep

NICE = 5
"""Leaves it a quarter of a core that training wants too, enough to finish its seconds of work soon after training."""


def main() -> int:
    private_files()
    guard()
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--once", action="store_true", help="send what is missing, then exit")
    parser.add_argument("--attempt", type=int, help="the attempt that this record belongs to")
    parser.add_argument("--parent-pid", type=int, help="the training process, whose end is the attempt's end")
    parser.add_argument("--grace", type=float, default=GRACE, help="give up after this many seconds without success")
    parser.add_argument("--sweep", action="store_true", help="the folder is a sweep's: send its runs as well")
    args = parser.parse_args()
    send = ship_sweep if args.sweep else ship
    try:
        if args.once:
            done = send(args.run_dir, grace=args.grace)
        else:
            _stand_back()
            done = send(args.run_dir, attempt=args.attempt, parent=args.parent_pid, once=False, grace=args.grace)
    except Exception as error:
        print(error if isinstance(error, ConfigError) else mask(traceback.format_exc()), file=sys.stderr)
        return 1
    if done.missing:
        print(done.missing, file=sys.stderr)
    return 1 if done.missing else 0


def _stand_back() -> None:
    """Yield the CPU to training, and ignore signals that are meant for training."""
    os.nice(NICE)
    with contextlib.suppress(OSError):  # under autogroup scheduling, nice only counts within a session
        Path("/proc/self/autogroup").write_text(str(NICE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    raise SystemExit(main())
