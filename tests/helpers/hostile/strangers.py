"""What the processes of a group do in tests of hostile messages: `in_team` runs these functions by name."""

import os
import pickle
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed as dist

from trainer import loop
from trainer.processes import collectives, rendezvous
from trainer.processes.collectives import from_all, from_chief, to_chief


class Payload:
    """Its pickle creates a file when loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.mark), 0o600)


def sent_around(values: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """What arrives when rank 0 sends values, and when all do."""
    alone = [from_chief(lambda value=value: value if dist.get_rank() == 0 else "another's") for value in values]
    return alone, [from_all([dist.get_rank(), value]) for value in values]


def bytes_to_chief(sizes: list[int]) -> list[list[int]] | None:
    """Each rank sends that many bytes, each of them its rank plus one."""
    rank = dist.get_rank()
    found = to_chief(torch.full((sizes[rank],), rank + 1, dtype=torch.uint8))
    return found and [part.tolist() for part in found]


def says(call: Any) -> str:
    try:
        return str(call())
    except RuntimeError as error:
        return str(error)


def told_nonsense(kind: str) -> str:
    """What `from_all` and `from_chief` raise if rank 0 sends something other than they expect."""
    if dist.get_rank():
        return says((lambda: from_chief(dict)) if kind.startswith("chief") else lambda: from_all("mine"))
    pickled = pickle.dumps(Payload(Path("/nowhere")))
    lengths = {"pickle": len(pickled), "long": 1 << 40, "negative": -5}
    length = torch.tensor([lengths[kind.split()[-1]]])
    if kind.startswith("chief"):
        dist.broadcast(length, src=0)
    else:
        dist.all_gather([torch.empty_like(length) for _ in range(dist.get_world_size())], length)
    if kind.endswith("pickle"):
        sent = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
        if kind.startswith("chief"):
            dist.broadcast(sent, src=0)
        else:
            dist.all_gather([torch.empty_like(sent) for _ in range(dist.get_world_size())], sent)
    return ""


def by_object_collectives(mark: Path) -> list[str]:
    """What ranks raise that receive a payload through each of torch's object collectives."""
    rank, world = dist.get_rank(), dist.get_world_size()
    payload = Payload(mark)

    def receive(call: Any) -> str:
        return says(call) if rank else str(says(call) and "")

    found = [
        says(lambda: dist.broadcast_object_list([payload if rank == 0 else None], src=0)),
        says(lambda: dist.all_gather_object([None] * world, payload)),
        says(lambda: dist.gather_object(payload, [None] * world if rank == 0 else None, dst=0)),
        says(lambda: dist.scatter_object_list([None], [payload] * world if rank == 0 else None, src=0)),
    ]
    if rank == 0:
        dist.send_object_list([payload], dst=1)
    else:
        found.append(says(lambda: dist.recv_object_list([None], src=0)))
    return found


def _shut(*_: Any, **__: Any) -> None:
    raise AssertionError("something was unpickled")


class Shut(pickle.Unpickler):
    """A class that torch can derive its own unpicklers from."""

    load = _shut


def forbid_pickles() -> None:
    """Make every reader of pickles in this process raise and say where, with our own guard removed."""
    collectives.refuse_pickles = lambda: None
    collectives.c10d._tensor_to_object = collectives.c10d._unpickler = _shut
    pickle.load = pickle.loads = pickle._load = pickle._loads = torch.load = _shut
    pickle.Unpickler = pickle._Unpickler = Shut


def train_without_pickles(run_dir: Path) -> str:
    forbid_pickles()
    return loop.train(run_dir)


def proves(secrets: list[str]) -> str:
    """What each rank raises when the group must prove that it knows the secret, but each has its own."""
    return says(lambda: rendezvous.prove(secrets[dist.get_rank()]))


def start_alone(rank: int, environment: dict[str, str], pipe: Any) -> None:
    """Be one process of a starting attempt, and report the outcome through a pipe.

    It reports the addresses of its listening ports, or why it did not start.
    """
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    from trainer.engine.start import start_processes

    try:
        start_processes(float(os.environ.get("TEST_PATIENCE", "60")))
        given = {rendezvous.STORE, rendezvous.SECRET} & os.environ.keys()
        connections = psutil.Process().net_connections("inet")
        listening = sorted({each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN})
        pipe.send((from_all(rank), listening, sorted(given)))
    except RuntimeError as error:
        pipe.send(str(error))
    pipe.recv()
