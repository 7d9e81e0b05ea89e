"""Encode batches in several processes, in order and in bounded memory."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from .encode import EncodedBatch, Encoder, EncodeSpec
from .sources import Record, Refusal

Records = list[Record | Refusal]


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def encode_all(batches: Iterator[Records], spec: EncodeSpec, workers: int) -> Generator[EncodedBatch]:
    """Encode every batch; results come in the order of the batches, whatever the number of workers.

    At most `4 * workers` batches and results stand in memory.

    Raises:
        RuntimeError: a worker process died.
    """
    if workers <= 1:
        yield from map(Encoder(spec), batches)
        return
    pool = _Workers(workers, spec)
    try:
        numbered = enumerate(batches)
        results: dict[int, EncodedBatch] = {}
        following, exhausted = 0, False
        while True:
            while pool.idle and not exhausted:
                number, batch = next(numbered, (-1, []))
                exhausted = number < 0
                if not exhausted:
                    pool.send(number, batch)
                if number - following >= 4 * workers:
                    break
            while following in results:
                yield results.pop(following)
                following += 1
            if not pool.busy:
                return
            results.update(pool.receive())
    finally:
        pool.close()


class _Workers:
    # Started as programs of their own rather than by multiprocessing, which would import the caller's __main__
    # (and with it torch and DeepSpeed) again in each of them.

    def __init__(self, count: int, spec: EncodeSpec):
        self.processes: list[subprocess.Popen] = []
        self.idle: list[Connection] = []
        self.busy: dict[Connection, int] = {}
        for _ in range(count):
            ours, theirs = Pipe()
            descriptor = theirs.fileno()
            code = f"from trainer.data.encode import serve; serve({descriptor}, {os.getpid()})"
            command = [sys.executable, "-P", "-c", code]
            self.processes.append(subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL))
            theirs.close()
            with contextlib.suppress(BrokenPipeError):  # one that died at once is noticed at its first batch
                ours.send(spec)
            self.idle.append(ours)

    def send(self, number: int, batch: Records) -> None:
        connection = self.idle.pop()
        self.busy[connection] = number
        try:
            connection.send(batch)
        except OSError:
            self._died()

    def receive(self) -> dict[int, EncodedBatch]:
        results = {}
        for connection in wait(list(self.busy)):
            assert isinstance(connection, Connection)
            try:
                results[self.busy.pop(connection)] = connection.recv()
            except (EOFError, OSError):
                self._died()
            self.idle.append(connection)
        return results

    def _died(self) -> None:
        codes = [code for process in self.processes if (code := process.poll())]
        why = signal.Signals(-codes[0]).name if codes and codes[0] < 0 else f"exit code {codes[0] if codes else '?'}"
        raise RuntimeError(f"a tokenizer process ended ({why}): out of memory? Try fewer workers")

    def close(self) -> None:
        for connection in (*self.idle, *self.busy):
            connection.close()
        for process in self.processes:
            if self.busy:
                process.terminate()
            process.wait()
