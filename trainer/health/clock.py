"""How long a step takes, and how much of it is this process's own time: by CUDA events where the host runs ahead.

On a GPU the host launches work and goes on, so both are measured with pairs of CUDA events on the training stream. They
are read once the device has passed them, in a later step: nothing here waits.
"""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import distributed as dist


class Event(Protocol):
    """The part of torch.cuda.Event that is used here."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds until `end`."""


def _timing_event() -> Event:
    return torch.cuda.Event(enable_timing=True)


class Took(NamedTuple):
    """A step's duration in seconds, and when it ended, in Unix seconds."""

    seconds: float
    ended: float


def stopwatch(here: torch.device, event: Callable[[], Event] = _timing_event) -> Callable[[], Callable[[], Took]]:
    """Start measuring. Returns a function that stops it and returns another, which gives the time measured: call that
    one once the device has passed the stop."""
    if here.type != "cuda":
        began = time.perf_counter()

        def stop() -> Callable[[], Took]:
            took = Took(time.perf_counter() - began, time.time())
            return lambda: took

        return stop
    first = event()
    first.record()

    def stop_device() -> Callable[[], Took]:
        last = event()
        last.record()
        # The end is when the host reads it: as soon as the device is done, or later if the host lags behind.
        return lambda: Took(first.elapsed_time(last) / 1000, time.time())

    return stop_device


class OwnTime:
    """This process's seconds in a step, less those in which it waits for others.

    A step as a whole takes equally long on every rank, as collectives make all wait for the slowest. All of them, and
    a pipeline's sends and receives, wait in `Work.wait`, whatever calls them (ZeRO's gathers and reductions, the layers
    of tensor, expert and sequence parallelism). What is left is reading data and computing this rank's part of the
    model and the optimizer, in every topology. With expert parallelism a rank with popular experts computes more.
    """

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0
        _wrap(dist.Work, "wait", self.waiting)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block runs, this process waits for others."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def begin(self) -> None:
        """Call when a step begins."""
        self._began, self._waited = time.perf_counter(), 0.0

    def seconds(self) -> float:
        """Own seconds since `begin`."""
        return time.perf_counter() - self._began - self._waited


COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "all_gather_single", "all_gather_single_coalesced", "reduce_scatter",
    "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "broadcast", "reduce",
    "gather", "scatter", "send", "recv", "recv_anysource", "barrier", "_end_coalescing",
)  # fmt: skip
"""Methods of torch's process groups (2.11 to 2.13) by which torch.distributed starts a collective. A synchronous one
runs on the stream that it was called on, and waits there for the other ranks."""


class DeviceOwnTime:
    """The same on a GPU: the device's time from the beginning of a step to its end, less its waits in between.

    The training stream waits where a collective runs on it, in `Work.wait`, and where it waits for a stream on which
    DeepSpeed overlaps collectives with computation. Waits of other streams cost it nothing.

    Args:
        event: makes an event.
        training: whether the current stream is the training stream.
    """

    def __init__(self, event: Callable[[], Event], training: Callable[[], bool]) -> None:
        self._event, self._training = event, training
        self._free: list[Event] = []
        self._now: _Marks | None = None
        self._done: deque[_Marks] = deque()
        self._seconds = 0.0

    def watch(self) -> None:
        """From now on, measure this process's waits."""
        _wrap(dist.Work, "wait", self.waiting)
        _wrap(torch.cuda.Stream, "wait_stream", self.waiting)
        for name in COLLECTIVES:
            if hasattr(dist.ProcessGroup, name):
                _wrap(dist.ProcessGroup, name, self.waiting)

    def begin(self) -> None:
        # A failed measurement must not fail the step: the step is then not measured.
        with contextlib.suppress(Exception):
            self._now = None
            self._now = _Marks(self._mark())

    def seconds(self) -> float:
        """Own seconds of the last step that the device has finished; 0 if there is none yet."""
        with contextlib.suppress(Exception):
            if self._now:
                self._now.end = self._mark()
                self._done.append(self._now)
                self._now = None
            while self._done and (end := self._done[0].end) and end.query():
                marks = self._done.popleft()
                self._seconds = marks.seconds()
                self._free += marks.events()
        return self._seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block runs, the training stream waits for others, if it is the current stream."""
        pair = None
        with contextlib.suppress(Exception):
            if self._now and self._training():
                pair = self._mark()
        try:
            yield
        finally:
            with contextlib.suppress(Exception):
                if pair and self._now:
                    self._now.waits.append((pair, self._mark()))

    def _mark(self) -> Event:
        event = self._free.pop() if self._free else self._event()
        event.record()
        return event


class _Marks:
    """A step's events."""

    def __init__(self, begin: Event) -> None:
        self.begin = begin
        self.end: Event | None = None
        self.waits: list[tuple[Event, Event]] = []

    def seconds(self) -> float:
        assert self.end
        waited = sum(first.elapsed_time(last) for first, last in self.waits)
        return max(0.0, self.begin.elapsed_time(self.end) - waited) / 1000

    def events(self) -> list[Event]:
        assert self.end
        return [self.begin, self.end, *(event for pair in self.waits for event in pair)]


def _wrap(owner: Any, name: str, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        with around():
            return function(*arguments, **keywords)

    setattr(owner, name, wrapped)


class NoOwnTime:
    """For a single process, which waits for nobody."""

    def begin(self) -> None: ...

    def seconds(self) -> float:
        return 0.0


@functools.cache
def own_time() -> OwnTime | DeviceOwnTime | NoOwnTime:
    """The one clock of this process; the process group must exist."""
    if dist.get_world_size() == 1:
        return NoOwnTime()
    if dist.get_backend() != "nccl":
        return OwnTime()
    main = torch.cuda.current_stream()
    clock = DeviceOwnTime(_timing_event, lambda: torch.cuda.current_stream() == main)
    clock.watch()
    return clock
