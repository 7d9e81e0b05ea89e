"""A child process with limits on memory and CPU time, for reading untrusted files with libraries that have none.

A child answers in JSON and bytes, never in pickles: the file that it reads may have taken control of it.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

MIB = 1 << 20
_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own pool reserves much address space, which counts
    "TOKENIZERS_PARALLELISM": "false",
    "RUST_BACKTRACE": "0",
}


class ChildDied(Exception):
    """A child ended before it answered; the text says why."""

    said = ""
    """The last lines of its stderr."""


class Child:
    """A process that runs `MODULE.serve(descriptor, ...)` on its end of a pipe and exits when the pipe closes.

    Args:
        module: full name of the module with `serve`.
        descriptors: further file descriptors that it inherits, passed to `serve` after the pipe's.
    """

    # Not a process of multiprocessing, which would import the caller's __main__ (and with it torch and DeepSpeed)
    # again. What a library prints when it panics is not shown to the user, who gets one message.
    def __init__(self, module: str, descriptors: Sequence[int] = ()):
        ours, theirs = Pipe()
        with theirs:
            given = [theirs.fileno(), *descriptors]
            code = (
                f"from trainer.processes.orphans import end_with; end_with({os.getpid()})\n"
                f"from {module} import serve; serve({', '.join(map(str, given))})"
            )
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                pass_fds=given,
                stdin=subprocess.DEVNULL,
                stderr=self._errors,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # a signal to the group is for the parent, which may still need an answer
            )
        self.connection: Connection = ours

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and wait for its answer. Raises ChildDied."""
        try:
            self.connection.send_bytes(json.dumps(request).encode())
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise self.died() from None

    def died(self) -> ChildDied:
        """Why it ended, once the pipe has closed."""
        self.connection.close()
        self._process.kill()  # no effect on a dead one; one that has only closed its pipe is not waited for
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-500:].decode(errors="replace").strip()
        last = said.rpartition("\n")[2]
        why = f"ended its process (exit code {code}{last and ': '}{last})"
        if code == -signal.SIGXCPU:
            why = "takes too long"
        elif code in (-signal.SIGABRT, -signal.SIGKILL):
            why = f"takes too much memory, or crashes its library ({signal.Signals(-code).name})"
        elif code < 0:
            why = f"crashes its library ({signal.Signals(-code).name})"
        died = ChildDied(why)
        died.said = said
        return died

    def close(self) -> None:
        """Kill the process, whatever it is doing."""
        self.connection.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Bounds:
    """In a child: limits from here on, in addition to what it had used when this was created (its imports).

    Only Linux reports and limits the memory of a process; elsewhere only the time is limited.
    """

    def __init__(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        self._before = _address_space()

    def memory(self, size: int) -> None:
        """Allow `size` bytes of memory. A request for more raises MemoryError, or aborts."""
        if self._before:
            _lower(resource.RLIMIT_AS, self._before + size)

    def seconds(self, seconds: float) -> None:
        """Allow this much CPU time (a second more at most), after which the process is killed."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1)


def _lower(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _address_space() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
