"""The planner's prediction for a run beside what was measured: peak memory and time per step."""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from configs import Config, ConfigError
from configs.units import byte_size, short
from models.families import parameter_count
from models.planning.cost import has_formulas
from models.planning.memory import memory
from models.planning.plan import predict
from trainer.health.rates import Rates, device_facts

SPARE = 2
"""A predicted total, which may be off, is refused above this multiple of the available memory."""
WARM_UP = 2
"""First steps, which are left out of the median."""


class PeakMemory:
    """Peak memory of this process since this was created: allocated on a GPU; on a CPU resident, less what it was then.

    `bytes` is None where the system does not report a process's peak (other than on Linux).
    """

    def __init__(self, here: torch.device):
        self._here, self._before = here, 0
        if here.type == "cuda":
            torch.cuda.reset_peak_memory_stats(here)
        else:
            with contextlib.suppress(OSError):  # resets the peak, which the imports have raised
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
    """Before anything is allocated, check that one process can hold its part of the model at all.

    Args:
        config: resolved.
        there: bytes that it may use; None: all memory of the device, or of the machine.

    Raises:
        ConfigError: weights, gradients and optimizer states alone need more, or the predicted total is more than
            `SPARE` times as much; for a family without formulas, weights (and gradients, in one process) need more.
    """
    cpu = here.type == "cpu"
    if there is None:
        there = psutil.virtual_memory().total if cpu else torch.cuda.get_device_properties(here).total_memory
    if not has_formulas(config.model):
        _refuse_uncounted(config, there)
        return
    held = memory(config, cpu)
    if held.states > there or held.needed > SPARE * there:
        what = "this machine" if cpu else torch.cuda.get_device_name(here)
        raise ConfigError(
            f"one process needs {byte_size(held.needed)}, {byte_size(held.states)} of it for weights, "
            f"gradients and optimizer states, but {what} has {byte_size(there)}:\n"
            "lower model.* or train.micro_batch, or raise parallel.* or parallel.zero_stage; `muster plan` shows what "
            "takes the memory"
        )


def _refuse_uncounted(config: Config, there: int) -> None:
    count = parameter_count(config.model)
    alone = config.parallel.world_size == 1
    if (least := 4 * count * (2 if alone else 1)) > there:
        what = "weights and gradients" if alone else "weights"
        raise ConfigError(
            f"one process needs at least {byte_size(least)} for {what} of {short(count)} parameters, but there are "
            f"{byte_size(there)}: lower model.*"
        )


class Forecast:
    """A prediction made before the model is built, and measurements from here on to compare it with.

    Args:
        here: this process's device.
        measured: returns what each process measured of its device; memory that it leaves allocated counts as the run's.
    """

    def __init__(self, config: Config, here: torch.device, measured: Callable[[], Sequence[Rates]]):
        self._memory, self._model = PeakMemory(here), config.model
        device = device_facts(here, config.train.kept_in, measured())
        device = device if has_formulas(config.model) else None
        self._plan = predict(config, device) if device else None
        self._seconds: list[float] = []

    def step_took(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def predicted(self, flops_of_example: float | None = None) -> dict[str, Any]:
        """Details of the event `plan`, in bytes and seconds; what is counted, if the planner lacks device or family.

        Args:
            flops_of_example: FLOPs per example in training; None: they could not be counted.
        """
        if self._plan:
            return self._plan.summary()
        counted: dict[str, Any] = {"flops_per_example": flops_of_example} if flops_of_example else {}
        with contextlib.suppress(RuntimeError, ValueError):  # a plugin's model may need a real device
            counted["parameters"] = parameter_count(self._model)
        return counted

    def measured(self) -> dict[str, Any]:
        """Details of the event `measured` for this process, in bytes and seconds; None until there are enough steps.

        The peak is that of the whole run so far, including evaluation and the copies for checkpoints, like the
        prediction.
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
