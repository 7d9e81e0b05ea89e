"""What the machine of rank 0 does while it trains: CPU, memory, disk, network and GPUs, as MLflow shows them."""

import contextlib
from collections import deque
from collections.abc import Callable

from .tracker import Point

EVERY = 10.0
"""Seconds between two samples, as in MLflow's own monitor; that one gives up for good when its server fails once."""
KEPT = 1000
"""Samples that wait for a tracker that does not answer: three hours; the oldest go first."""


class SystemMetrics:
    """Samples of this machine, which are kept until they are sent.

    Args:
        started: Unix seconds from which the samples are counted: their step is the second.
    """

    def __init__(self, started: float) -> None:
        # MLflow's, which take a second to import.
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._started = started
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no GPU, or no library that asks it
            self._monitors.append(GPUMonitor())
        self._monitors[0].collect_metrics()  # the first share of a CPU is always 0
        self._monitors[0].clear_metrics()
        self._last = 0.0
        self.waiting: deque[Point] = deque(maxlen=KEPT)

    def sample(self, now: float, last: bool = False) -> None:
        """Take one if it is time, or if it is the last."""
        if now - self._last < (1.0 if last else EVERY):
            return
        self._last = now
        values: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # a device that went away is no reason to lose the record
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        named = {f"system/{name}": float(value) for name, value in values.items()}
        self.waiting.append(Point(max(0, round(now - self._started)), now, named))

    def send(self, log: Callable[[list[Point]], None]) -> None:
        """Send what waits; what `log` raises is raised, and then all of it waits on."""
        if points := list(self.waiting):
            log(points)
            self.waiting.clear()
