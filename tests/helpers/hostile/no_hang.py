"""A time limit for what might hang, so generous that no test fails on a slow machine."""

import contextlib
import signal
from collections.abc import Iterator

PROCESSOR_S, CLOCK_S = 60, 600


@contextlib.contextmanager
def ends() -> Iterator[None]:
    """Fail the block after a minute of CPU time, or ten of wall-clock time. In the main thread only."""

    def give_up(number: int, _: object) -> None:
        raise AssertionError(f"it did not end: {signal.Signals(number).name}")

    limits = ((signal.ITIMER_PROF, signal.SIGPROF, PROCESSOR_S), (signal.ITIMER_REAL, signal.SIGALRM, CLOCK_S))
    before = {number: signal.signal(number, give_up) for _, number, _ in limits}
    try:
        for timer, _, seconds in limits:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for timer, _, _ in limits:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
