"""One worker of a gang: a Ray actor that holds a share of a machine and keeps a warm process there to train with."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import ray

from configs import private_files
from trainer.files.scratch import make_folder, remove_folder

ENVIRONMENT = {
    # A fork has only the thread that forked: no threads of pyarrow's allocator, nor of numpy's BLAS, which would start
    # as many as OMP_NUM_THREADS says and which training does not use.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OPENBLAS_NUM_THREADS": "1",
}
"""What lets `trainer.processes.warm` fork."""


class Worker:
    """Lives as long as the gang, through all attempts of a run; Ray runs its methods side by side."""

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
        # In a session of its own, where Ctrl-C in the user's terminal does not reach it.
        return subprocess.Popen(
            command, env=self._environment, text=True, stdin=pipe, stdout=pipe, start_new_session=True
        )

    def facts(self) -> dict[str, Any]:
        """Where this worker is, the network interface of Ray's address there, its GPUs, and a port that is free."""
        context = ray.get_runtime_context()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        address = ray.util.get_node_ip_address()
        interfaces = psutil.net_if_addrs().items()
        found = [name for name, entries in interfaces if any(entry.address == address for entry in entries)]
        return {
            "node": context.get_node_id(),
            "address": address,
            "interface": os.environ.get("GLOO_SOCKET_IFNAME") or next(iter(found), None),
            "gpus": context.get_accelerator_ids().get("GPU", []),
            "port": port,
        }

    def open_store(self) -> str:
        """A file, in a new folder of this user's alone, by which the processes of one attempt find each other."""
        self.close_store()
        self._folder = make_folder()
        return str(self._folder / "store")

    def close_store(self) -> None:
        """Remove it."""
        if self._folder:
            remove_folder(self._folder)
            self._folder = None

    def train(self, job: dict[str, Any]) -> dict[str, Any]:
        """Be one process of an attempt.

        Args:
            job: as `trainer.processes.warm` reads it.

        Returns:
            How it ended, in the words of `trainer.processes.warm`.
        """
        self._ending = False
        try:
            if self._warm.poll() is not None:
                self._warm = self._start()
            assert self._warm.stdin
            self._warm.stdin.write(json.dumps(job) + "\n")
            self._warm.stdin.flush()
            self._pid = self._answer()["pid"]
            if self._ending:
                self.end()
            return self._answer() | ({"ended": True} if self._ending else {})
        except (OSError, ValueError):  # it was killed
            return {"kind": "lost", "reason": f"the process is gone with its parent (exit code {self._warm.wait()})"}
        finally:
            self._pid = None

    def _answer(self) -> dict[str, Any]:
        assert self._warm.stdout
        return dict(json.loads(self._warm.stdout.readline()))

    def end(self) -> None:
        """End the attempt's process at once, if there is one."""
        self._ending = True
        if pid := self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
