"""One worker of a gang: a Ray actor that holds a share of a machine and keeps a warm process there to train with."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import ray

from configs import private_files
from trainer.files.scratch import make_folder, remove_folder
from trainer.processes.protocol import Began, Failed, Order, Outcome, read_outcome

ENVIRONMENT = {
    # A fork keeps only the thread that forked, so pyarrow's allocator and numpy's BLAS must start no others. BLAS would
    # start OMP_NUM_THREADS of them, and training does not use it.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Makes it safe for `trainer.processes.warm` to fork."""


class Facts(NamedTuple):
    """Where a worker runs."""

    node: str
    address: str
    """The one by which Ray reaches the machine."""
    interface: str | None
    """The network interface of that address."""
    gpus: tuple[str, ...]
    port: int
    """A free one."""


class Worker:
    """Lives as long as the gang, through all attempts of a run; Ray runs its methods concurrently."""

    def __init__(self, environment: dict[str, str]) -> None:
        private_files()
        self._environment = os.environ | ENVIRONMENT | environment
        self._pid: int | None = None
        self._ending = False
        self._folder: Path | None = None
        self._warm = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "trainer.processes.warm"]
        pipe = subprocess.PIPE
        # In a session of its own, so that Ctrl-C in the user's terminal does not reach it.
        return subprocess.Popen(
            command, env=self._environment, text=True, stdin=pipe, stdout=pipe, start_new_session=True
        )

    def facts(self) -> Facts:
        context = ray.get_runtime_context()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        address = ray.util.get_node_ip_address()
        interfaces = psutil.net_if_addrs().items()
        found = [name for name, entries in interfaces if any(entry.address == address for entry in entries)]
        return Facts(
            node=context.get_node_id(),
            address=address,
            interface=os.environ.get("GLOO_SOCKET_IFNAME") or next(iter(found), None),
            gpus=tuple(context.get_accelerator_ids().get("GPU", [])),
            port=port,
        )

    def open_store(self) -> str:
        """The rendezvous file of an attempt's processes, in a new folder that only this user can enter."""
        self.close_store()
        self._folder = make_folder()
        return str(self._folder / "store")

    def close_store(self) -> None:
        """Remove the rendezvous file."""
        if self._folder:
            remove_folder(self._folder)
            self._folder = None

    def train(self, order: Order) -> Outcome:
        """Run one process of an attempt. Returns how it ended."""
        self._ending = False
        try:
            if self._warm.poll() is not None:
                self._warm = self._start()
            assert self._warm.stdin
            self._warm.stdin.write(order.model_dump_json() + "\n")
            self._warm.stdin.flush()
            self._pid = Began.model_validate_json(self._answer()).pid
            if self._ending:
                self.end()
            outcome = read_outcome(self._answer())
            return outcome.model_copy(update={"ended": self._ending}) if isinstance(outcome, Failed) else outcome
        except (OSError, ValueError):  # it was killed
            reason = f"the process is gone with its parent (exit code {self._warm.wait()})"
            return Failed(kind="lost", reason=reason)
        finally:
            self._pid = None

    def _answer(self) -> str:
        assert self._warm.stdout
        return self._warm.stdout.readline()

    def end(self) -> None:
        """End the attempt's process at once, if there is one."""
        self._ending = True
        if pid := self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
