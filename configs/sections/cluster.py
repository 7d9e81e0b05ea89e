"""Where a run's processes live: Ray, and each process's share of a node."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from configs.base import Section

Workers = Annotated[int, Field(gt=0, le=2**14)]
"""Upper bound on `workers`: every number of processes in the range is considered."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join; None: RAY_ADDRESS, else a local Ray for this run."""
    cpus_per_worker: PositiveFloat | None = None
    """CPUs that each worker process reserves and computes with; None: an equal share of this machine."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs per worker; None: 1 if the node has GPUs, else 0."""
    workers: tuple[Workers, Workers] | None = None
    """Minimum and maximum number of processes (elastic): a run shrinks to what is left of the cluster and grows again
    through its data parallelism, at the same global batch. None: always all of parallel.*"""
    max_failures: NonNegativeInt = 3
    """Worker failures in a row, without a new checkpoint in between, after which the run is not restarted."""
    timeout: PositiveFloat = 1800.0
    """Seconds that a collective, or anything else between two steps, may take before the attempt is ended."""
    hang_timeout: PositiveFloat = 300.0
    """Minimum number of seconds without a step after which the attempt is ended; ten times the slowest recent step if
    that is more."""

    @field_validator("workers")
    @classmethod
    def _fewest_first(cls, workers: tuple[int, int] | None) -> tuple[int, int] | None:
        if workers and workers[0] > workers[1]:
            raise ValueError(f"minimum first, then maximum: [{workers[1]}, {workers[0]}]")
        return workers
