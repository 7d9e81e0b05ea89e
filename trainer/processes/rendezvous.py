"""How the processes of a run find each other, and keep strangers out.

torch's store answers anybody who reaches it, and gloo and NCCL connect to whatever addresses it holds. So the launcher
of an attempt gives its processes a secret, MUSTER_SECRET, and each proves to all others that it knows it. On a single
machine the launcher also names a file, MUSTER_STORE, in a folder that only this user can enter, and the store has no
port. Without these variables the store is the one of torch's environment variables, as under torchrun; the user may
set a secret there.
"""

import contextlib
import hmac
import os
import secrets
import socket
from collections.abc import Iterator
from datetime import timedelta

import psutil
from torch import distributed as dist

from configs.reading.parse import clip

from .collectives import from_all

STORE, SECRET = "MUSTER_STORE", "MUSTER_SECRET"
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Incomplete(RuntimeError):
    """Not every process of the run joined in time."""


@contextlib.contextmanager
def all_expected(timeout_s: float) -> Iterator[None]:
    """Turn a timeout of torch's store, which has waited for the others, into Incomplete."""
    try:
        yield
    except dist.DistStoreError as error:
        reason = clip(error, 200)
        raise Incomplete(
            f"not all {os.environ['WORLD_SIZE']} processes of the run joined within cluster.timeout={timeout_s:g} s: "
            f"check that each was started and can reach {os.environ['MASTER_ADDR']}, and that {SECRET} is the same for "
            f"all or set for none\n({reason})"
        ) from error


def take_secret() -> str:
    """The secret of this attempt, '' if there is none. It leaves the environment, so that no child process sees it."""
    return os.environ.pop(SECRET, "")


def open_store(secret: str, timeout_s: float) -> dist.Store | None:
    """The store where the processes exchange their addresses; None: torch's own, by its environment variables."""
    rank, world, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_s)
    path = os.environ.pop(STORE, "")
    if world == 1:
        return dist.HashStore()  # needs no port that another run on this machine could have taken
    if path:
        return dist.FileStore(path, world)
    if not secret:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    store = dist.TCPStore(host, port, world, serves, timeout, master_listen_fd=_listen(host, port) if serves else None)
    # Whoever connects can list the keys: the prefix keeps out those who do not look, and `prove` those who do.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(hmac.digest(secret.encode(), attempt.encode(), "sha256").hex(), store)


def prove(secret: str) -> None:
    """Check that every process of the group knows the secret, without sending any of it. A collective.

    Raises:
        RuntimeError: one does not.
    """
    nonces = from_all(secrets.token_hex(32))
    words = from_all(_word(secret, dist.get_rank(), nonces))
    if strangers := [rank for rank, word in enumerate(words) if not _same(word, _word(secret, rank, nonces))]:
        raise RuntimeError(
            f"the process that joined this run as rank {', '.join(map(str, strangers))} does not know its secret: "
            "somebody else can reach the ports of the run"
        )


def stay_here() -> None:
    """Make gloo and NCCL listen on the loopback interface only, if all processes are on this machine."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ["WORLD_SIZE"]
    if local != world and os.environ.get("MASTER_ADDR") not in LOOPBACK:
        return
    running = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if running[name].isup and any(each.address == "127.0.0.1" for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _listen(host: str, port: int) -> int | None:
    """A socket that listens on the interface of `host` alone; None: `host` is not an address of this machine.

    torch itself would listen on all interfaces.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(where)
            found.listen(4096)
            return found.detach()
    except OSError:
        return None


def _word(secret: str, rank: int, nonces: list[str]) -> str:
    return hmac.digest(secret.encode(), f"{rank} {nonces}".encode(), "sha256").hex()


def _same(word: object, expected: str) -> bool:
    return isinstance(word, str) and hmac.compare_digest(word.encode(), expected.encode())
