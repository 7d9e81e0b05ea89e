"""Read micro-batches ahead of the training thread."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from models.batch import Batch

from .reader import Dataset


class Loader:
    """Iterates over the batches of a list of index lists, which a thread reads ahead.

    An error of the thread (a bad page) is raised by `next()` where the batch would have come. Use it as a context
    manager or call `close()`.

    Args:
        dataset: read by the thread alone until `close()`.
        batches: for each micro-batch the sequence indices (-1: padding), see `Dataset.batch`; may be endless.
        depth: batches held ready at most.
    """

    def __init__(self, dataset: Dataset, batches: Iterable[Sequence[int]], depth: int):
        self.waited = 0.0
        """Seconds that `next()` has waited for data so far."""
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._read, args=(dataset, batches), name="data-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._done:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, Batch):
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

    def _read(self, dataset: Dataset, batches: Iterable[Sequence[int]]) -> None:
        try:
            for indices in batches:
                if self._stop.is_set() or not self._put(dataset.batch(indices)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
