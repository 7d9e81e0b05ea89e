"""Ray for one run: join the given cluster, or start a private one on this machine and shut it down afterwards."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from configs import ConfigError, ExitCode, mask
from configs.reading.parse import clip
from trainer.files.scratch import make_folder, remove_folder, sweep
from trainer.processes.orphans import sweep_after

from .access_token import Address, refuse_open, remember, use_token
from .ray_folder import closed, open_to_others, ray_parent
from .share import Node

SAME_SIGNAL = 0.5
"""Seconds within which a repeated signal counts as one: `timeout` and others send it to a process and to its group."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing large goes through Ray's object store; its default is a third of the memory."""


@dataclass(frozen=True)
class Session:
    """A connection to Ray."""

    nodes: list[Node]
    """The machines of the cluster."""


@contextlib.contextmanager
def ray_session(address: Address | None, node: Node, folder: Path) -> Iterator[Session]:
    """Connect to Ray while the block runs.

    No process of a private Ray outlives the block. They are tied to the calling thread, so they end even if this
    process is killed.

    Args:
        address: of the cluster to join; None: start a private one.
        node: this machine, for a private one.
        folder: of the private Ray's files, made by `session_folder`.

    Raises:
        ConfigError: the cluster does not answer.
    """
    with contextlib.ExitStack() as stack:
        if address is not None:
            address = found_by_ray(address)
            use_token(address)
        _environment(folder, private=address is None)
        import ray  # reads the environment set above

        from . import ray_private

        ray_private.silence_errors()
        # Ray puts the working directory first on its workers' sys.path: there a user's `models/` would shadow ours.
        here = os.getcwd()
        stack.callback(os.chdir, here)
        os.chdir(folder)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            stack.callback(end_children, _children())
            with ray_private.lean():
                ray.init(
                    address="local",
                    num_cpus=int(node.cpus),
                    num_gpus=int(node.gpus),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **ray_private.files_in(folder / "ray"),
                    **quiet,
                )
        else:
            try:
                check_reachable(address.where)
                ray.init(address=address.where, **quiet)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                reason = clip(error)
                raise ConfigError(
                    f"cluster.address={mask(address.where)}: no Ray cluster answers there ({reason}).\n"
                    f"Start one with `muster cluster up`, name its token file in RAY_AUTH_TOKEN_PATH, or unset "
                    f"cluster.address and RAY_ADDRESS"
                ) from None
            remember(address.where)
        stack.callback(ray.shutdown)
        os.chdir(here)
        if address is None:
            yield Session([node])
        else:
            if open_to_others(session := ray_private.session_folder()):
                print(f"muster: {OPEN.format(session)}", file=sys.stderr, flush=True)
            # A dashboard on the head's loopback cannot be reached from another machine.
            with contextlib.suppress(OSError):
                if dashboard := ray_private.dashboard():
                    refuse_open(f"http://{dashboard}")
            alive = [entry["Resources"] for entry in ray.nodes() if entry["Alive"]]
            yield Session([Node(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in alive])


OPEN = (
    "other users of this machine can write into Ray's folder {}, and so run code as you: start Ray there with "
    "`muster cluster up` or `muster cluster join`"
)


def found_by_ray(address: Address) -> Address:
    """Resolve `auto` by Ray's search among all processes of this machine; any other address is returned as it is.

    Raises:
        ConfigError: there is none.
    """
    if address.where != "auto":
        return address
    if closed(ray_parent()):  # where `muster cluster up` puts its address: preferred to what others write to /tmp/ray
        os.environ.setdefault("RAY_TMPDIR", str(ray_parent()))
    from .ray_private import address_on_this_machine

    try:
        return Address(address_on_this_machine(), "found")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cluster.address=auto: no Ray runs on this machine ({error})") from None


def check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at `host:port`, ValueError if that is malformed: Ray would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdigit():
        raise ValueError("it is not host:port, such as 10.0.0.1:6379")
    socket.create_connection((host, int(port)), timeout=5).close()


def _environment(folder: Path, private: bool) -> None:
    """Set what Ray reads from the environment, here and in the processes it starts."""
    if private:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def session_folder() -> Path:
    """A new temporary folder that only this user can read, unlike the one Ray makes in it."""
    # Ray's socket below it must have a path of at most 107 bytes.
    return make_folder(None if len(tempfile.gettempdir()) < 30 else "/tmp")


def clear_away(folder: Path) -> None:
    """Remove a session's folder, and those of its workers, which have been killed."""
    remove_folder(folder)
    for place in {folder.parent, Path(tempfile.gettempdir())}:
        sweep(place)


def stop_early() -> None:
    """End a command that has nothing to lose yet, with the processes it started and without a traceback."""
    end_children()
    print("muster: stopped before training began; run the same command to start", file=sys.stderr, flush=True)
    os._exit(ExitCode.STOPPED)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def end_children(before: frozenset[psutil.Process] | set[psutil.Process] = frozenset()) -> None:
    """Kill the descendants of this process except those in `before`: what a private Ray has left behind."""
    left = _children() - before
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


class RayThread(threading.Thread):
    """Ray's part of a command, off the main thread, which handles signals and the display.

    Args:
        address: of the cluster to join; None: start a private one.
        node: this machine, for a private one.
    """

    def __init__(self, address: Address | None, node: Node) -> None:
        super().__init__(name="ray", daemon=True)
        self.address, self.node = address, node
        self.folder = session_folder()
        sweep_after(str(self.folder))
        self.error: BaseException | None = None
        self.stopping = False
        self.connected, self.ended = threading.Event(), threading.Event()

    def work(self, session: Session) -> None:
        """What the command does with Ray; sets `connected` once signal handlers may be installed again."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            with ray_session(self.address, self.node, self.folder) as session:
                self.work(session)
        except BaseException as error:
            self.error = error
        finally:
            clear_away(self.folder)
            self.connected.set()
            self.ended.set()

    def follow(
        self, handlers: contextlib.ExitStack, on_signal: Callable[[], None], look: Callable[[], None] = lambda: None
    ) -> None:
        """Start it and wait for its end, in the main thread.

        Args:
            handlers: keeps the signal handlers for as long as the caller wants them.
            look: called each second.
        """
        self.start()
        # Ray installs its own handler of SIGTERM while it connects: ours is installed before that and again after it.
        for phase in (self.connected, self.ended):
            handlers.enter_context(signals(on_signal))
            while not phase.wait(1.0):
                look()


@contextlib.contextmanager
def signals(handle: Callable[[], None]) -> Iterator[None]:
    """Call `handle` on SIGINT, SIGTERM and SIGHUP, unless they are ignored (nohup)."""
    last = float("-inf")

    def once(*_: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > SAME_SIGNAL:
            handle()

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, once) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
