"""Where the processes of a run live: Ray and the share of a node each one gets."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator

from configs.base import Section

Workers = Annotated[int, Field(gt=0, le=2**14)]
"""Each number of processes between fewest and most is considered."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join; None: RAY_ADDRESS, else a local Ray for this run."""
    cpus_per_worker: PositiveFloat | None = None
    """CPUs that each worker process reserves and computes with; None: this machine's share."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """None: 1 where the node has GPUs, else 0."""
    workers: tuple[Workers, Workers] | None = None
    """Fewest and most processes (elastic): a run shrinks to what is left of the cluster and grows again, by its data
    parallelism, with the same global batch. None: always all of parallel.*"""
    max_failures: NonNegativeInt = 3
    """Lost processes without a new checkpoint between after which the run is not started again."""
    timeout: PositiveFloat = 1800.0
    """Seconds a collective, or anything between two steps, may take before the attempt is ended."""
    hang_timeout: PositiveFloat = 300.0
    """Seconds without a step, at least, after which the attempt is ended; ten times its slowest of late, if more."""

    @field_validator("workers")
    @classmethod
    def _fewest_first(cls, workers: tuple[int, int] | None) -> tuple[int, int] | None:
        if workers and workers[0] > workers[1]:
            raise ValueError(f"fewest first, then most: [{workers[1]}, {workers[0]}]")
        return workers
