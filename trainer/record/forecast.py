"""What the planner said of a run, and what came of it: peak memory and time of a step."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from configs import Config, ConfigError
from configs.units import byte_size
from models.planning.cost import has_formulas
from models.planning.memory import memory
from models.planning.plan import predict
from trainer.health.rates import Rates, device_facts

SPARE = 2
"""Times the memory there is that a prediction of the rest, which may be off, is let go on with."""
WARM_UP = 2
"""Steps that are left out of the median."""


class PeakMemory:
    """Peak memory of this process since a point in time: allocated on a GPU, resident on a CPU less what it was then.

    Where the system does not tell a process's peak (other than Linux), `bytes` is None.
    """

    def __init__(self, here: torch.device):
        self._here, self._before = here, 0
        if here.type == "cuda":
            torch.cuda.reset_peak_memory_stats(here)
        else:
            with contextlib.suppress(OSError):  # forgets the peak of the imports
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _peak_resident() or 0

    def bytes(self) -> int | None:
        if self._here.type == "cuda":
            return torch.cuda.max_memory_allocated(self._here)
        peak = _peak_resident()
        return None if peak is None else peak - self._before


def _peak_resident() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def refuse_too_large(config: Config, here: torch.device, there: int | None = None) -> None:
    """Before anything is allocated, see whether one process can hold its part of the model at all.

    Args:
        config: resolved.
        there: bytes that it may use; None: all memory of the device, or of the machine.

    Raises:
        ConfigError: its weights, gradients and optimizer states alone need more, or all that training holds needs more
            than twice as much.
    """
    if not has_formulas(config.model):
        return
    cpu = here.type == "cpu"
    if there is None:
        there = psutil.virtual_memory().total if cpu else torch.cuda.get_device_properties(here).total_memory
    held = memory(config, cpu)
    if held.states > there or held.needed > SPARE * there:
        what = "this machine" if cpu else torch.cuda.get_device_name(here)
        raise ConfigError(
            f"one process needs {byte_size(held.needed)}, {byte_size(held.states)} of it for weights, "
            f"gradients and optimizer states, but {what} has {byte_size(there)}:\n"
            "lower model.* or train.micro_batch, or raise parallel.* or parallel.zero_stage; `muster plan` shows what "
            "takes the memory"
        )


class Forecast:
    """A prediction made before the model is built, and the measurements to hold it to, from here on.

    Args:
        here: this process's device.
        measured: gives what each process measured of its own; what it leaves in memory counts as the run's.
    """

    def __init__(self, config: Config, here: torch.device, measured: Callable[[], Sequence[Rates]]):
        self._memory = PeakMemory(here)
        device = device_facts(here, config.train.kept_in, measured())
        device = device if has_formulas(config.model) else None
        self._plan = predict(config, device) if device else None
        self._seconds: list[float] = []

    def step_took(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def predicted(self) -> dict[str, Any]:
        """Details of the event `plan`: bytes, seconds; empty where the planner knows not the device or family."""
        return self._plan.summary() if self._plan else {}

    def measured(self) -> dict[str, Any]:
        """Details of the event `measured`, this process's; bytes and seconds, None before there is anything to tell.

        The peak is that of the whole run so far: evaluation and the checkpoints' copies count, as in the prediction.
        """
        times = self._seconds[WARM_UP:]
        measured: dict[str, Any] = {
            "peak_memory": self._memory.bytes() if times else None,
            "step_time": statistics.median(times) if times else None,
        }
        if self._plan:
            measured |= {
                "predicted_peak_memory": self._plan.memory.allocated,
                "predicted_step_time": self._plan.step_time,
            }
        return measured
