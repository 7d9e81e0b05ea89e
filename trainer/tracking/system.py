"""System metrics of rank 0's machine during training: CPU, memory, disk, network and GPUs, named as MLflow does."""

import contextlib
from collections import deque
from collections.abc import Callable

from .tracker import Point

EVERY = 10.0
"""Seconds between two samples, as in MLflow's own monitor; that one gives up for good when its server fails once."""
KEPT = 1000
"""Samples kept while the tracker does not answer: almost three hours; the oldest are dropped first."""


class SystemMetrics:
    """Samples of this machine, kept until they are sent.

    Args:
        started: Unix seconds; a sample's step is the number of seconds since then.
    """

    def __init__(self, started: float) -> None:
        # MLflow's monitors, which take a second to import.
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._started = started
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no GPU, or no library to query it
            self._monitors.append(GPUMonitor())
        self._monitors[0].collect_metrics()  # the first CPU utilisation is always 0
        self._monitors[0].clear_metrics()
        self._last = 0.0
        self.waiting: deque[Point] = deque(maxlen=KEPT)

    def sample(self, now: float, last: bool = False) -> None:
        """Take a sample if one is due, or if it is the last."""
        if now - self._last < (1.0 if last else EVERY):
            return
        self._last = now
        values: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # a device that went away must not cost the others
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        named = {f"system/{name}": float(value) for name, value in values.items()}
        self.waiting.append(Point(max(0, round(now - self._started)), now, named))

    def send(self, log: Callable[[list[Point]], None]) -> None:
        """Send the kept samples; if `log` raises, that is raised, and they are kept."""
        if points := list(self.waiting):
            log(points)
            self.waiting.clear()
