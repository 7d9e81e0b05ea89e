"""Prefetches micro-batches in a thread, and copies them to the device before they are needed."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from models.batch import MicroBatch
from trainer.data.kinds import ExampleReader


class Loaded(NamedTuple):
    """A micro-batch on the device."""

    batch: MicroBatch
    weight: int
    """See `MicroBatch.weight`."""
    copied: torch.cuda.Event | None
    """On a GPU, the event that a stream waits for before it uses the batch."""


class Loader:
    """Iterates over the batches of a list of index lists, which a thread prefetches.

    An error in the thread (a bad page) is raised by `next()` in place of the batch. Use it as a context manager or call
    `close()`.

    Args:
        dataset: read by the thread alone until `close()`.
        batches: the indices of the examples of each micro-batch (-1: padding); may be infinite.
        depth: most batches held ready.
        here: the device that they are copied to.
    """

    def __init__(self, dataset: ExampleReader, batches: Iterable[Sequence[int]], depth: int, here: torch.device):
        self._here = here
        self.waited = 0.0
        """Seconds that `next()` has waited for data so far."""
        self._queue: queue.Queue[Loaded | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._read, args=(dataset, batches), name="data-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        if self._done:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, Loaded):
            if item.copied:
                stream = torch.cuda.current_stream()
                stream.wait_event(item.copied)
                for tensor in item.batch.tensors().values():
                    tensor.record_stream(stream)
            return item
        self._done = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop reading and wait for the thread to end."""
        self._stop.set()
        self._done = True
        self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, dataset: ExampleReader, batches: Iterable[Sequence[int]]) -> None:
        try:
            stream = torch.cuda.Stream(self._here) if self._here.type == "cuda" else None
            for indices in batches:
                if self._stop.is_set() or not self._put(_load(dataset.examples(indices), stream)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Loaded | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _load(batch: MicroBatch, stream: torch.cuda.Stream | None) -> Loaded:
    """Start copying a batch on a stream of its own, overlapped with computation."""
    weight = batch.weight()
    if stream is None:
        return Loaded(batch, weight, None)
    with torch.cuda.stream(stream):
        return Loaded(batch.pinned().to(stream.device, non_blocking=True), weight, stream.record_event())
