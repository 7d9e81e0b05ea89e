"""What the planner said of a run, and what came of it: peak memory and time of a step."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from configs import Config
from models.plan import predict

from .rates import Rates, device_facts

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


class Forecast:
    """A prediction made before the model is built, and the measurements to hold it to, from here on.

    Args:
        here: this process's device.
        measured: gives what each process measured of its own; what it leaves in memory counts as the run's.
    """

    def __init__(self, config: Config, here: torch.device, measured: Callable[[], Sequence[Rates]]):
        self._memory = PeakMemory(here)
        device = device_facts(here, config.train.kept_in, measured())
        self._plan = predict(config, device) if device else None
        self._seconds: list[float] = []

    def step_took(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def predicted(self) -> dict[str, Any]:
        """Details of the event `plan`: bytes, seconds; empty on a device that the planner does not know."""
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
