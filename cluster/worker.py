"""What Ray runs in each worker process of a run."""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from .failures import Failed, Final


def work(job: dict[str, Any]) -> str:
    """Train, under the environment variables Ray Train sets as torchrun would.

    Args:
        job: `run_dir`, and `folder`, the user's working directory.

    Returns:
        FINISHED or KILLED, as `trainer.loop.train`.

    Raises:
        Final: a mistake in the config or data, or a stop of the trainer's own.
        Failed: any other error.
    """
    run_dir, folder = Path(job["run_dir"]), job["folder"]
    if os.path.isdir(folder):
        os.chdir(folder)
    # Ours first: once these are loaded, a folder of the user's named like one of them cannot take its place.
    for package in ("configs", "models", "trainer"):
        importlib.import_module(package)
    if folder not in sys.path:
        sys.path.append(folder)  # plugins named as modules

    # After the path is set, and not where the driver imports this file.
    from configs import ConfigError
    from trainer.loop import TrainingStopped, train
    from trainer.output import output_kept

    try:
        with output_kept(run_dir):
            return train(run_dir)
    except ConfigError as error:
        raise Final("mistake", str(error)) from None
    except TrainingStopped as error:
        raise Final("stopped", str(error)) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        raise Failed(reason, traceback.format_exc()) from None
