"""Faults that make one process of several a bad machine, and preflights to run in a team."""

import errno
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from configs import Config
from trainer import loop
from trainer.health import links, preflight, rates
from trainer.health.preflight import BadMachine
from trainer.record.lines import Record


def nothing() -> None: ...


def wrong_product() -> None:
    """Flip a bit of one element of each matrix product that is checked."""
    original = rates._Product.multiply

    def wrapped(self, dtype):
        original(self, dtype)
        self._result[3, 5] += 1

    rates._Product.multiply = wrapped  # type: ignore[method-assign]


def wrong_sums() -> None:
    original = dist.all_reduce

    def wrapped(tensor, *arguments, **keywords):
        work = original(tensor, *arguments, **keywords)
        tensor.view(-1)[-1] += 1
        return work

    dist.all_reduce = wrapped


def garbled_link() -> None:
    """Send numbers other than those asked for."""
    original = links._numbers
    links._numbers = lambda rank, here: original(rank, here) + (rank == dist.get_rank())


def other_host(name: str) -> None:
    preflight.socket.gethostname = lambda: name


def clock_ahead(seconds: float) -> None:
    original = time.time
    links.time.time = lambda: original() + seconds


def other_torch() -> None:
    preflight._versions = lambda: {"python": "3.12.0", "torch": "2.0.0", "deepspeed": "0.19.8"}


def slow_link(seconds: float) -> None:
    """Make this process slow to send and receive."""
    original = dist.batch_isend_irecv

    def wrapped(operations):
        time.sleep(seconds)
        return original(operations)

    dist.batch_isend_irecv = wrapped


def own_machine(fault: Any = nothing, ranks: tuple[int, ...] = (), *arguments: Any) -> None:
    """Make each process look like a machine of its own, and put a fault into some."""
    rank = int(os.environ["RANK"])
    other_host(f"node-{rank}")
    if rank in ranks:
        fault(*arguments)


def checked(folders: list[Path], config: Config, fault: Any = nothing, ranks: Any = (), *arguments: Any) -> Any:
    """Run the preflight with a folder for each rank, as if each were on a machine of its own.

    Returns:
        the number of rates, or the message of BadMachine.
    """
    own_machine(fault, ranks, *arguments)
    record = Record(folders[0], 1) if dist.get_rank() == 0 else None
    preflight.PATIENCE = 0.2
    try:
        return len(preflight.preflight(folders[dist.get_rank()], config, record))
    except BadMachine as bad:
        return str(bad), bad.hosts, bad.ranks


def trained(run_dir: Path, fault: Any = nothing, ranks: Any = (), *arguments: Any) -> Any:
    own_machine(fault, ranks, *arguments)
    try:
        return loop.train(run_dir)
    except BadMachine as bad:
        return bad.hosts


def random_states(folder: Path, config: Config) -> bool:
    """Whether a preflight leaves every random generator of this process as it was."""

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    before = states()
    preflight.preflight(folder, config, Record(folder, 1) if dist.get_rank() == 0 else None)
    return states() == before


def timetable(machines: list[str]) -> list[int]:
    """Exchange numbers with `links.rounds`. Returns those that arrived wrong."""
    return links.exchange(machines, torch.device("cpu"))[1]


def cannot_write() -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    preflight.os.fsync = refuse


def blind() -> None:
    """Make this process see no folder that another process has created."""
    preflight._appears = lambda path: False
