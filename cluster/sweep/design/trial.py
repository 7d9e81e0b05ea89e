"""What a plan holds: the trials of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.gangs.share import Node, group_of, share_of_most, share_of_trial
from cluster.server.waiting import Gang
from configs import Config, ConfigError
from configs.sweep.definition import SweepConfig
from models.planning.cost import Parameters


class Trial(NamedTuple):
    """One run of a sweep."""

    name: str
    variant: str
    """Architecture: the variant's name, with a suffix if it has several choices of experts; "" if there are none."""
    budget: float | None
    """Training FLOPs asked for; None: its steps were given."""
    flops: float
    """Training FLOPs from step 0, exactly (models/planning/cost.py)."""
    tokens: int
    """Training tokens from step 0."""
    counts: Parameters
    config: Config
    """As a user would write it; run.root is the sweep's folder of trials, run.name the trial's name."""
    resolved: Config
    """The same with every derived value."""
    after: str | None = None
    """The trial whose checkpoint it starts from."""
    from_step: int | None = None
    """The step of that checkpoint."""
    values: Mapping[str, Any] = {}
    """Values of the sweep's axes, by config key."""

    @property
    def spent(self) -> float:
        """Training FLOPs that the trial itself takes: fewer than `flops` if it starts from another's checkpoint."""
        return self.flops * (1 - (self.from_step or 0) / self.config.train.steps)


def gang_of(config: Config, nodes: Sequence[Node], wait: bool = False) -> Gang:
    """The gang that a trial needs.

    Args:
        config: resolved.
        wait: see `share_of_gang`.

    Raises:
        ConfigError: it asks for more than the machines have.
    """
    each = share_of_most(config, lambda config: share_of_trial(config, nodes, wait))
    return Gang(config.parallel.world_size, each, group_of(config))


class Plan(NamedTuple):
    """All that a sweep will train, as far as it is known."""

    sweep: SweepConfig
    vocab_size: int
    trials: tuple[Trial, ...]
    warnings: tuple[str, ...]
    open: int
    """Number of trials of an Optuna search that the losses of earlier ones will choose."""

    @property
    def widest(self) -> int:
        """Largest number of processes, with one device each, of any trial."""
        return max((trial.resolved.parallel.world_size for trial in self.trials), default=1)

    def check_gpus(self, gpus: int | None) -> None:
        """Raise ConfigError if this many devices are too few for a trial."""
        if gpus is not None and gpus < self.widest:
            raise ConfigError(
                f"--gpus {gpus}: a trial takes {self.widest} devices: raise --gpus, or lower the degrees (set.parallel)"
            )
