"""Encodes batches in several processes, in order and in bounded memory."""

import contextlib
import os
import tempfile
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection, wait

from configs import ConfigError
from trainer.data.child import Child
from trainer.data.sources.read import Record, Refusal

from .encode import EncodedBatch, Encoder, EncodeSpec, receive

Records = list[Record | Refusal]

MAX_DEATHS = 20
"""Records that may each kill their worker before the tokenizer itself is rejected."""


def default_workers() -> int:
    """Number of CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def encode_all(batches: Iterator[Records], spec: EncodeSpec, workers: int) -> Generator[EncodedBatch]:
    """Encode every batch; results come in the order of the batches, whatever the number of workers.

    At most `4 * workers` batches and results are in memory. A record that kills its worker (by using too much memory,
    or by making the tokenizer hang or crash) is refused, and the rest of its batch is still encoded.

    Args:
        workers: processes; 0: encode in this one, without limits.

    Raises:
        ConfigError: the tokenizer kills its process on every record, or on many.
        RuntimeError: a worker process cannot even start.
    """
    if not workers:
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


class _Worker(Child):
    def __init__(self, spec: EncodeSpec):
        self._progress = tempfile.TemporaryFile()  # noqa: SIM115
        self._progress.write((-1).to_bytes(8, "little", signed=True))
        self._progress.flush()
        super().__init__("trainer.data.prepare.encode", [self._progress.fileno()])
        self.send(spec)

    def send(self, value: object) -> None:
        with contextlib.suppress(OSError):  # it has died, which `receive` will notice
            self.connection.send(value)

    def record(self) -> int:
        """Number of the last record that it worked on; -1: none yet."""
        return int.from_bytes(os.pread(self._progress.fileno(), 8, 0), "little", signed=True)

    def close(self) -> None:
        super().close()
        self._progress.close()


class _Workers:
    def __init__(self, count: int, spec: EncodeSpec):
        self.spec = spec
        self.idle = [_Worker(spec) for _ in range(count)]
        self.busy: dict[Connection, tuple[_Worker, int, Records]] = {}
        self._encoded = self._deaths = 0

    def send(self, number: int, batch: Records) -> None:
        self._give(self.idle.pop(), number, batch)

    def receive(self) -> dict[int, EncodedBatch]:
        results = {}
        for connection in wait(list(self.busy)):
            assert isinstance(connection, Connection)
            worker, number, batch = self.busy.pop(connection)
            try:
                results[number] = receive(connection, self.spec.dtype)
            except (EOFError, OSError):
                self._give(_Worker(self.spec), number, self._without_the_last(worker, batch))
                continue
            self._encoded += len(batch)
            self.idle.append(worker)
        return results

    def _give(self, worker: _Worker, number: int, batch: Records) -> None:
        self.busy[worker.connection] = worker, number, batch
        worker.send(batch)

    def _without_the_last(self, worker: _Worker, batch: Records) -> Records:
        """The batch, with the record that killed its worker replaced by a refusal."""
        why, index = worker.died(), worker.record()
        worker.close()
        if index < 0:
            raise RuntimeError(f"a tokenizer process died at startup (it {why}): out of memory? Try fewer workers")
        self._deaths += 1
        if self._deaths > (MAX_DEATHS if self._encoded else 2):
            raise ConfigError(
                f"the tokenizer failed on {self._deaths} records, the last one in {batch[index].path} (it {why}).\n"
                "Use another one, or raise `--limit memory=MIB` or `--limit seconds=N`"
            )
        refusal = Refusal(batch[index].path, batch[index].where, "cannot be tokenized", f"it {why}")
        return [*batch[:index], refusal, *batch[index + 1 :]]

    def close(self) -> None:
        for worker in (*self.idle, *(worker for worker, _, _ in self.busy.values())):
            worker.close()
